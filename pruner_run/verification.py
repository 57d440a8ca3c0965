"""Whether a converted checkpoint acts as its source, each in its own framework.

Both compute in float32, the source with its weights rounded as the result's are, so that what is
left is the order of sums; a swapped axis or a lost adapter is orders of magnitude more. Each runs
in a process of its own, one after the other: memory holds one model at a time.
"""

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float
from rich import box
from rich.console import Console
from rich.table import Table

from convert.conversion import Conversion
from convert.lazy_array import LazyArray
from convert.reading import open_checkpoint
from pruner_run import backend as backends
from pruner_run.comparison import decision_margins
from pruner_spec import layout
from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.observation import Observation

# Of the largest value. JAX and PyTorch with the same weights are at most this far apart.
TOLERANCE = 5e-5
# With adapters merged and then rounded to 16 bits there is no source that is rounded alike.
ROUNDED_TOLERANCE = 5e-2
# Below this margin of scores, two correct backends may keep different patches.
NEAR_TIE = 1e-4

_KEEP_RATIO = 0.25
_PROMPT = 48  # tokens at most: enough to be attended to, and little to wait for
_QUANTITIES = ("loss", "actions", "loss, pruned", "actions, pruned")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a checkpoint's model makes of the fixed inputs.

    Attributes:
        values: of `_QUANTITIES` by name, [B, ...].
        kept: patches that the pruned model kept, [B, C, N].
        margins: by how much score the closest decision was made, [B].
    """

    values: dict[str, Float[np.ndarray, "B ..."]]
    kept: Bool[np.ndarray, "B C N"]
    margins: Float[np.ndarray, "B"]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a result is from its source.

    Attributes:
        differences: the largest, over the largest value, by quantity.
        tolerance: what they may be.
        near_ties: samples in which the two kept different patches, for a tie of scores.
        other_selections: samples in which they did for no such reason.
    """

    differences: dict[str, float]
    tolerance: float
    near_ties: int
    other_selections: int

    @property
    def is_the_same(self) -> bool:
        """Whether all is within tolerance; NaN never is."""
        within = all(difference <= self.tolerance for difference in self.differences.values())
        return within and not self.other_selections


def verify(done: Conversion, console: Console) -> Verification:
    """Compares loss and sampled actions of a conversion's source and result, and prints a table.

    Raises:
        ValueError: a framework that is needed is not installed.
    """
    names = ("jax", "torch") if done.source.is_orbax else ("torch", "jax")
    for name in names:
        backends.choose(name)
    evaluations = []
    for name, checkpoint, config, rounding in _sides(done, names):
        with console.status(f"{name}: loss and sampled actions, unpruned and pruned"):
            evaluations.append(_in_a_process(name, checkpoint, config, rounding))
    result = compare(evaluations[0], evaluations[1], _tolerance(done))
    _show(result, evaluations[0], names, console)
    return result


def compare(source: Evaluation, result: Evaluation, tolerance: float) -> Verification:
    """The differences; pruned values are compared where both kept the same patches."""
    same = (source.kept == result.kept).all(axis=(1, 2))
    is_near = np.minimum(source.margins, result.margins) < NEAR_TIE
    differences = {}
    for name in _QUANTITIES:
        chosen = same if "pruned" in name else np.ones_like(same)
        found, expected = (each.values[name][chosen] for each in (result, source))
        difference = np.abs(found - expected).max(initial=0.0)
        differences[name] = float(difference / max(np.abs(expected).max(initial=0.0), 1e-30))
    return Verification(
        differences=differences,
        tolerance=tolerance,
        near_ties=int((~same & is_near).sum()),
        other_selections=int((~same & ~is_near).sum()),
    )


def evaluate(
    name: str, checkpoint: str, config: Pi0Config, rounding: dict[str, np.dtype]
) -> Evaluation:
    """A checkpoint's model in a framework, on fixed inputs.

    Args:
        name: of the backend.
        checkpoint: its path.
        config: of the model; computed in float32, whatever its dtype.
        rounding: dtypes to which stored arrays are rounded first, by name.
    """
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # read when JAX starts
    backend = backends.load(name)
    config = dataclasses.replace(
        config, dtype="float32", max_token_len=min(config.max_token_len, _PROMPT)
    )
    pruning = dataclasses.replace(
        config, token_pruning_enabled=True, token_prune_keep_ratio=_KEEP_RATIO
    )
    observation, (actions, noise), time = inputs(config)
    values = {}
    for suffix, each in (("", config), (", pruned", pruning)):
        model = backend.model(each, _rounded(checkpoint, rounding))
        values[f"loss{suffix}"] = model.loss(observation, actions, noise, time)
        values[f"actions{suffix}"] = model.sample_actions(observation, noise, num_steps=10)
        if each is pruning:
            selection = model.pruned()
            margins = decision_margins(selection, pruning).reshape(len(time), -1).min(axis=1)
            return Evaluation(values, selection.kept, margins)
        del model  # before the next one is loaded
        gc.collect()
    raise AssertionError("the pruned model comes last")


def inputs(config: Pi0Config) -> tuple[Observation, Float[np.ndarray, "2 B H A"], np.ndarray]:
    """Two samples, of prompts of different lengths."""
    generator, size = np.random.default_rng(0), 2
    length, vocabulary = config.max_token_len, config.paligemma.vocab_size
    lengths = np.array([length, max(1, length // 2)])
    mask = np.arange(length) < lengths[:, None]
    tokens = generator.integers(2, vocabulary, (size, length)).astype(np.int32)
    shape = (size, IMAGE_SIZE, IMAGE_SIZE, 3)
    observation = Observation(
        images={name: generator.uniform(-1, 1, shape).astype(np.float32) for name in CAMERAS},
        image_masks={name: np.ones(size, dtype=bool) for name in CAMERAS},
        state=generator.uniform(-1, 1, (size, config.action_dim)).astype(np.float32),
        tokenized_prompt=np.where(mask, tokens, 0),
        tokenized_prompt_mask=mask,
    )
    chunks = generator.standard_normal((2, size, config.action_horizon, config.action_dim))
    return observation, chunks.astype(np.float32), np.array([0.3, 0.8], np.float32)


def _sides(
    done: Conversion, names: tuple[str, str]
) -> Iterator[tuple[str, str, Pi0Config, dict[str, np.dtype]]]:
    source = done.source
    rounding = {} if _merges(done) else _rounding(done)
    yield names[0], str(source.place), source.side.config, rounding
    place = done.output / "params" if done.format == "orbax" else done.output
    yield names[1], str(place), done.target.config, {}


def _merges(done: Conversion) -> bool:
    return done.source.side.config.has_lora and not done.target.config.has_lora


def _tolerance(done: Conversion) -> float:
    is_rounded_alike = done.precision == "float32" or not _merges(done)
    return TOLERANCE if is_rounded_alike else ROUNDED_TOLERANCE


def _rounding(done: Conversion) -> dict[str, np.dtype]:
    """What the source's arrays are rounded to in the result, by the names of its rows."""
    side = done.source.side
    return {
        name: done.stored_dtype(row.ours[0])
        for row in side.layout.rows_of(side.config)
        for name in row.names(side.config)
    }


def _rounded(checkpoint: str, rounding: dict[str, np.dtype]) -> dict[str, LazyArray]:
    flat = layout.flatten(open_checkpoint(checkpoint))
    arrays = layout.renamed(flat, layout.detect(flat))
    return {
        name: _cast(array, rounding[name]) if name in rounding else array
        for name, array in arrays.items()
    }


def _cast(array: LazyArray, dtype: np.dtype) -> LazyArray:
    def read(index: object) -> np.ndarray:
        return array.read(index).astype(dtype).astype(np.float32)

    return LazyArray(array.shape, np.dtype(np.float32), read)


def _in_a_process(*arguments: object) -> Evaluation:
    """`evaluate` where its memory is given back when it ends."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(evaluate, *arguments).result()  # type: ignore[arg-type]


def _show(
    result: Verification, source: Evaluation, names: tuple[str, str], console: Console
) -> None:
    titles = {"jax": "JAX", "torch": "PyTorch"}
    table = Table(f"{titles[names[0]]} against {titles[names[1]]}, float32", box=box.SIMPLE_HEAD)
    columns = ("largest value", "difference over it", "allowed", "")
    for column in columns:
        table.add_column(column, justify="right")
    for name, difference in result.differences.items():
        verdict = "ok" if difference <= result.tolerance else "differs"
        largest = np.abs(source.values[name]).max()
        row = (f"{largest:.4g}", f"{difference:.1e}", f"{result.tolerance:.0e}", verdict)
        table.add_row(name, *row)
    console.print(table)
    for line in _selections(result, len(source.margins)):
        console.print(line)


def _selections(result: Verification, samples: int) -> Iterator[str]:
    differing = result.near_ties + result.other_selections
    yield f"The same patches are kept in {samples - differing} of {samples} samples."
    if result.near_ties:
        yield (
            f"In {result.near_ties} the closest decision was a tie to {NEAR_TIE:g} of a score, "
            "which rounding decides; their pruned values are left out."
        )
    if result.other_selections:
        yield f"In {result.other_selections} other patches are kept, and no tie explains it."
