"""Whether speed costs accuracy: actions against those of a float32 model of the same numbers.

Three models of one backend answer the same inputs: the measured path in its dtype, the plain path
in that dtype, and the plain path in float32 with products in full precision, the reference.

Which patches are kept is a choice, and near a tie rounding turns it over: the actions then differ
by what was seen, not by how precisely it was computed. So the other two get the patches that the
measured path kept, and what each would have kept itself is compared apart, as `same_kept`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pruner_run import bench_weights
from pruner_run.backend import Backend, Model
from pruner_run.bench_cases import Case, Setup, inputs
from pruner_run.bench_results import Accuracy, Closeness
from pruner_spec.config import Pi0Config

SAMPLES = 8  # at least, of a case: the distances of one sample alone are a matter of luck

Kept = Mapping[str, Bool[np.ndarray, "B N"]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of one call's inputs.

    Attributes:
        actions: [B, H, A].
        kept: what it would keep itself, by camera; None of a model that does not prune.
    """

    actions: Float[np.ndarray, "B H A"]
    kept: Kept | None


Answers = Sequence[Answer]


def answers(
    model: Model, case: Case, setup: Setup, given: Sequence[Kept | None] | None = None
) -> Answers:
    """What a model makes of a case's inputs, of a few seeds.

    Args:
        model: of the case's config.
        case: the sizes.
        setup: of all cases.
        given: the patches to keep, for each call; None for those that the model chooses.
    """
    prunes = setup.model_config(case).prunes_at_inference
    found = []
    for number in range(math.ceil(SAMPLES / case.batch)):
        observation, noise = inputs(case, dataclasses.replace(setup, seed=setup.seed + number))
        kept = None if given is None else given[number]
        if kept is None:
            actions = model.sample_actions(observation, noise, case.num_steps)
        else:
            actions = model.sample_kept(observation, noise, case.num_steps, kept)
        found.append(Answer(actions, model.kept() if prunes else None))
    return found


def events(
    backend: Backend,
    setup: Setup,
    cases: Sequence[Case],
    measured: Mapping[int, Answers],
    *,
    is_plain: bool,
) -> Iterator[dict[str, Any]]:
    """Each case's "accuracy", or why it is "unjudged". One model is in memory at a time.

    Args:
        backend: that measured them.
        setup: of all cases.
        cases: all of them.
        measured: what the measured path answered, by a case's place.
        is_plain: whether that was the plain path.
    """
    groups: dict[Pi0Config, list[int]] = {}
    for place in measured:
        groups.setdefault(setup.model_config(cases[place]), []).append(place)
    for config, places in groups.items():
        mine = {place: measured[place] for place in places}
        yield from _Judge(backend, setup, cases, mine).events(config, is_plain=is_plain)


class _Judge:
    """Judges cases of one config."""

    def __init__(
        self,
        backend: Backend,
        setup: Setup,
        cases: Sequence[Case],
        measured: Mapping[int, Answers],
    ) -> None:
        self._backend, self._setup, self._cases = backend, setup, cases
        self._measured = measured
        self._errors: dict[int, str] = {}

    def events(self, config: Pi0Config, *, is_plain: bool) -> Iterator[dict[str, Any]]:
        plain, reference = self._others(config, is_plain=is_plain)
        for place, answers_ in self._measured.items():
            if place in self._errors:
                yield {"event": "unjudged", "place": place, "error": self._errors[place]}
                continue
            found = Accuracy(
                path=closeness(answers_, reference[place]),
                plain=closeness(plain[place], reference[place]),
            )
            yield {"event": "accuracy", "place": place, "accuracy": dataclasses.asdict(found)}

    def _others(
        self, config: Pi0Config, *, is_plain: bool
    ) -> tuple[Mapping[int, Answers], Mapping[int, Answers]]:
        """What the plain model and the reference answer, which has the plain one's numbers."""
        try:
            weights, _ = bench_weights.clocked(self._setup.checkpoint)
            model = self._backend.model(config, weights)
            plain = self._measured if is_plain else self._ask(model)
            return plain, self._ask(model.widened())
        except Exception as error:  # no memory for a model
            self._errors |= dict.fromkeys(self._measured, in_a_line(error))
            return {}, {}

    def _ask(self, model: Model) -> dict[int, Answers]:
        found = {}
        for place, mine in self._measured.items():
            try:
                kept = [answer.kept for answer in mine]
                found[place] = answers(model, self._cases[place], self._setup, kept)
            except Exception as error:  # no memory for this case
                self._errors[place] = in_a_line(error)
        return found


def closeness(found: Answers, reference: Answers) -> Closeness:
    """How close answers are to the reference's."""
    pairs = [
        (one.reshape(-1).astype(np.float64), other.reshape(-1).astype(np.float64))
        for mine, theirs in zip(found, reference, strict=True)
        for one, other in zip(mine.actions, theirs.actions, strict=True)
    ]
    shares = [
        _share(mine.kept, theirs.kept)
        for mine, theirs in zip(found, reference, strict=True)
        if mine.kept is not None and theirs.kept is not None
    ]
    norm: Callable[..., Any] = np.linalg.norm
    return Closeness(
        cosine=[float(one @ other / (norm(one) * norm(other))) for one, other in pairs],
        distance=[float(norm(one - other) / norm(other)) for one, other in pairs],
        same_kept=float(np.mean(shares)) if shares else None,
    )


def _share(kept: Kept, reference: Kept) -> float:
    """Of the patches that the reference keeps."""
    both = sum(int((kept[camera] & reference[camera]).sum()) for camera in reference)
    return both / sum(int(each.sum()) for each in reference.values())


def in_a_line(error: Exception) -> str:
    """What went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
