"""Writes `docs/training-parity.md`: trains the tests' runs in both backends, and tables how far
apart they are.

python -m parity_tests.training_report
"""

import dataclasses

import matplotlib
import numpy as np
from matplotlib import pyplot

from parity_tests import conftest  # noqa: F401  # threads and precision as in the suite
from parity_tests.harness import error
from parity_tests.report import ROOT, made_with, write_generated
from parity_tests.tolerances import tolerance
from parity_tests.training_runs import RUNS, Course, Flip, course, flips, until_flip

PAGE, PICTURE = ROOT / "docs" / "training-parity.md", ROOT / "docs" / "training-parity.png"
STEPS = 50
FLIPPING = "float32, pruned"  # the run whose votes are looked at
WINDOW = 10  # steps of a running mean


@dataclasses.dataclass(frozen=True)
class Row:
    """A run of the table.

    Attributes:
        run: of `RUNS`.
        what: differs from the first one.
        meaning: of the numbers, for a user.
    """

    run: str
    what: str
    meaning: str


ROWS = (
    Row(
        "pruned",
        "pruning with noise, augmentation, average of the weights",
        "the two trainers are one computation; what is left is rounding",
    ),
    Row("unpruned", "without pruning", "openpi's own training, in either framework"),
    Row(
        "adapted",
        "π0 with LoRA in both experts, one pool for all cameras, constant noise, no average",
        "a LoRA run can change frameworks too, weights that are frozen are",
    ),
    Row("accumulated", "`--accumulation 2`", "a batch cut to fit the memory is the same batch"),
    Row(
        "checkpointed",
        "`--gradient_checkpointing full`",
        "memory is saved, the run is not another one",
    ),
    Row(
        "float32",
        "without pruning",
        "curves from both frameworks can be laid on each other; what parts them is a bug",
    ),
    Row(
        "float32, pruned",
        "up to the first flip, see below",
        "the same, until two patches tie; then too the curves stay together",
    ),
)


def main() -> None:
    """Trains, draws the picture and replaces the page's generated part."""
    pairs = {row.run: pair(row.run, votes=row.run == FLIPPING) for row in ROWS}
    narrow, other_seed = pair("bfloat16"), pair("bfloat16, another seed")
    draw(pairs, narrow, other_seed)
    found = flips(*pairs[FLIPPING])
    text = "\n".join(
        [*table(pairs, found), *flip_lines(pairs[FLIPPING], found), *spread(narrow, other_seed)]
    )
    write_generated(PAGE, "parity_tests.training_report", text)


def pair(run: str, *, votes: bool = False) -> tuple[Course, Course]:
    """A run in JAX and in PyTorch."""
    return course("jax", run, STEPS, votes), course("torch", run, STEPS, votes)


def apart(courses: tuple[Course, Course]) -> np.ndarray:
    """How far the losses are apart in every step, relative to PyTorch's."""
    jax, torch = (each.losses() for each in courses)
    return np.abs(jax - torch) / np.abs(torch)


def table(pairs: dict[str, tuple[Course, Course]], found: list[Flip]) -> list[str]:
    """A line a run."""
    lines = [
        f"\nMade on {made_with()}.\n",
        "| dtype | run | steps | loss | bound | weights at last | bound | what it means |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        dtype, jax, torch = RUNS[row.run].config.dtype, *pairs[row.run]
        steps = until_flip(found, STEPS) if row.run == FLIPPING else STEPS
        losses = apart(pairs[row.run])[:steps].max()
        weights = max(
            error(array, torch.final.parameters[name])
            for name, array in jax.final.parameters.items()
        )
        is_exact = dtype == "float64"
        bound = f"{tolerance('trained parameters', dtype):.0e}" if is_exact else ""
        lines.append(
            f"| {dtype} | {row.what} | {steps} | {losses:.1e} "
            f"| {tolerance('training loss', dtype):.0e} "
            f"| {f'{weights:.1e}' if is_exact else ''} | {bound} | {row.meaning} |"
        )
    return lines


def flip_lines(pair: tuple[Course, Course], found: list[Flip]) -> list[str]:
    """Where float32 selects other patches, and what became of the losses."""
    lines = [
        "\n## Pruning in float32: the first flip\n",
        "The votes of all patches in each step, noise included, in both backends. With the same "
        f"weights, in step 0, scores are {scores_apart(pair, 0):.1e} apart: rounding alone.\n",
    ]
    if not found:
        return [*lines, f"In {STEPS} steps no vote differs."]
    first, losses = found[0], apart(pair)
    return [
        *lines,
        "| | |",
        "|---|---|",
        f"| first step with other votes | {first.step} |",
        f"| votes that differ there | {first.count} of {first.of} |",
        f"| gap between the scores of the two choices | {first.gap:.1e} |",
        f"| scores of the two backends apart, at most | {first.apart:.1e} |",
        f"| losses apart in that step | {losses[first.step]:.1e} |",
        f"| later steps with other votes | {len(found) - 1} of {STEPS - 1 - first.step} |",
        f"| votes that differ, at most | {max(each.count for each in found)} of {first.of} |",
        f"| losses apart, at most | {losses.max():.1e} |",
    ]


def scores_apart(pair: tuple[Course, Course], step: int) -> float:
    """The largest difference between the backends' scores of valid patches in a step."""
    ours, theirs = (each.votes[step] for each in pair)
    return float(np.abs(ours.scores - theirs.scores)[ours.valid].max())


def spread(narrow: tuple[Course, Course], other_seed: tuple[Course, Course]) -> list[str]:
    """How far bfloat16's curves are apart: between backends, and between seeds."""
    (jax, torch), (jax_other, torch_other) = narrow, other_seed
    lines = [
        "\n## bfloat16 over float32 weights\n",
        f"| losses of {STEPS} steps | mean | max | max of the running mean over {WINDOW} steps |",
        "|---|---|---|---|",
    ]
    for what, one, other in (
        ("JAX – PyTorch, seed 7", jax, torch),
        ("JAX – PyTorch, seed 8", jax_other, torch_other),
        ("seed 7 – seed 8, JAX", jax, jax_other),
        ("seed 7 – seed 8, PyTorch", torch, torch_other),
    ):
        distance = np.abs(one.losses() - other.losses())
        smooth = np.abs(running(one.losses()) - running(other.losses())).max()
        lines.append(f"| {what} | {distance.mean():.1e} | {distance.max():.1e} | {smooth:.1e} |")
    return [*lines, ""]


def running(values: np.ndarray) -> np.ndarray:
    """The mean over a window, where it is full."""
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def draw(
    pairs: dict[str, tuple[Course, Course]],
    narrow: tuple[Course, Course],
    other_seed: tuple[Course, Course],
) -> None:
    """Writes the picture: bfloat16's curves, and how far the losses of the other runs are apart."""
    matplotlib.use("agg")
    figure, (curves, distances) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for losses, style, label in (
        (narrow[0], {"color": "#d55e00", "lw": 3, "alpha": 0.5}, "JAX, seed 7"),
        (narrow[1], {"color": "#0072b2", "lw": 1}, "PyTorch, seed 7"),
        (other_seed[0], {"color": "#888888", "lw": 1, "ls": "--"}, "JAX, seed 8"),
    ):
        curves.plot(losses.losses(), label=label, **style)
    curves.set(title="bfloat16 over float32 weights", xlabel="step", ylabel="loss")
    for name, color in (
        ("float32, pruned", "#d55e00"), ("float32", "#0072b2"), ("pruned", "#009e73"),
    ):  # fmt: skip
        label = {"pruned": "float64, pruned", "float32": "float32, not pruned"}.get(name, name)
        distances.semilogy(np.maximum(apart(pairs[name]), 1e-17), color=color, lw=1, label=label)
    for flip in flips(*pairs[FLIPPING]):
        distances.axvline(flip.step, color="#d55e00", ls=":", lw=1)
    distances.set(
        title="JAX – PyTorch, relative (dotted: a vote flips)", xlabel="step", ylabel="loss apart"
    )
    for axes in (curves, distances):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    # On its own ground, so that it can be read on a dark page too; no date inside.
    figure.savefig(PICTURE, dpi=90, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
