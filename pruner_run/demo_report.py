"""What `pruner demo` says: two tables for people, and the same numbers for programs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run import backend as backends
from pruner_run.comparison import Agreement, pruning_error
from pruner_run.measurement import Calls, Measurement
from pruner_run.recording import Recording
from pruner_spec.config import CAMERAS, Pi0Config


def rule(config: Pi0Config) -> str:
    """Which patches are kept, in words."""
    joint = config.token_prune_scope == "joint"
    if config.keep_budget is None:
        return f"the patches voted for, {'all cameras together' if joint else 'camera by camera'}"
    share = f"{config.keep_budget} patches of each camera"
    return f"{share} on average, all cameras together" if joint else share


def announce(console: Console, recording: Recording, config: Pi0Config, seed: int) -> None:
    """Says what is about to be done, and with which backend not."""
    console.print(
        f"Episode: “{recording.instruction}”\n"
        f"Frames:  {len(recording.frames)} of the recording's, spread evenly\n"
        f"Model:   a tiny π0.5 in {config.dtype}, random weights (seed {seed})\n"
        f"Kept:    {rule(config)}"
    )
    if absent := backends.missing():
        install = backends.how_to_install(absent)
        console.print(f"Missing: {', '.join(absent)}; {install}", markup=False)


def show(
    console: Console,
    measurements: list[Measurement],
    agreement: Agreement | None,
    config: Pi0Config,
) -> None:
    """Prints the tables."""
    table = Table("mean of the frames (least-most)", box=box.SIMPLE_HEAD)
    for measurement in measurements:
        table.add_column(f"{measurement.title}, {measurement.device}", justify="right")
    for label, value in _rows(config):
        table.add_row(label, *(value(measurement) for measurement in measurements))
    console.print(table)
    if agreement is not None:
        console.print(_agreement_table(agreement))
    console.print(
        "The weights are random: this shows the mechanism, not what a trained model\n"
        "attends to. Times are of a tiny model, one observation a call: a large model's\n"
        "are others. JAX compiles in its first calls; PyTorch computes on one thread,\n"
        "unless OMP_NUM_THREADS is set.\n"
    )


def numbers(
    recording: Recording,
    measurements: list[Measurement],
    agreement: Agreement | None,
    config: Pi0Config,
) -> dict[str, Any]:
    """What demo.json holds beside the options."""
    return {
        "weights": "random",
        "instruction": recording.instruction,
        "frames": recording.frames,
        "seconds": [round(float(second), 3) for second in recording.seconds],
        "patches_per_camera": config.vision.num_patches,
        "prefix_tokens": _prefix_tokens(config),
        "backends": {each.backend: _backend_numbers(each, config) for each in measurements},
        "agreement": None if agreement is None else dataclasses.asdict(agreement),
    }


def _backend_numbers(measurement: Measurement, config: Pi0Config) -> dict[str, Any]:
    kept = _kept(measurement)
    return {
        "device": measurement.device,
        "pruned_prefix_tokens": _pruned_prefix_tokens(measurement, config).tolist(),
        "kept": {camera: kept[:, place].tolist() for place, camera in enumerate(CAMERAS)},
        "pruning_error": pruning_error(measurement),
        "seconds_per_call": {
            "unpruned": _seconds(measurement.unpruned),
            "pruned": _seconds(measurement.pruned),
        },
        "top_votes_share": measurement.top_votes_share,
        "queries_spread": measurement.queries_spread,
    }


def _rows(config: Pi0Config) -> list[tuple[str, Callable[[Measurement], str]]]:
    """Labels of the table, and what stands beside them for a backend."""
    patches = config.vision.num_patches
    cameras = [
        (f"kept of {patches}, {camera}", lambda m, at=place: _mean(_kept(m)[:, at]))
        for place, camera in enumerate(CAMERAS)
    ]
    return [
        ("prefix tokens, unpruned", lambda m: str(_prefix_tokens(config))),
        ("prefix tokens, pruned", lambda m: _mean(_pruned_prefix_tokens(m, config))),
        *cameras,
        ("pruning changes the actions by", lambda m: f"{pruning_error(m):.1%}"),
        ("time of a call, unpruned", lambda m: _milliseconds(m.unpruned.warm)),
        ("time of a call, pruned", lambda m: _milliseconds(m.pruned.warm)),
        ("speed-up", lambda m: f"{m.unpruned.warm / m.pruned.warm:.1f}x"),
        ("first call, unpruned", lambda m: _milliseconds(m.unpruned.first)),
        ("first call, pruned", lambda m: _milliseconds(m.pruned.first)),
        ("collapse: votes for one patch", lambda m: f"{m.top_votes_share:.0%}"),
        ("collapse: spread of the queries", lambda m: f"{m.queries_spread:.2f}"),
    ]


def _agreement_table(agreement: Agreement) -> Table:
    where = "among all"
    verdict = f"the same {agreement.patches} times"
    if agreement.differing_patches:
        where = "where they differ"
        verdict = f"{agreement.differing_patches} of {agreement.patches} differ"
        verdict += f", in {agreement.differing_frames} frames"
    unpruned, pruned = (
        f"{difference:.1e} of {agreement.largest_action:.1f}"
        for difference in (agreement.unpruned_actions_difference, agreement.actions_difference)
    )
    table = Table("agreement of the backends", "", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    table.add_row("keep or drop a patch", verdict)
    table.add_row(f"closest decision {where}, by a score of", f"{agreement.closest_margin:.1e}")
    table.add_row("largest difference of actions, unpruned", unpruned)
    table.add_row("largest difference of actions, pruned", pruned)
    return table


def _prefix_tokens(config: Pi0Config) -> int:
    return len(CAMERAS) * config.vision.num_patches + config.max_token_len


def _pruned_prefix_tokens(measurement: Measurement, config: Pi0Config) -> Int[np.ndarray, "T"]:
    return _kept(measurement).sum(axis=-1) + config.max_token_len


def _kept(measurement: Measurement) -> Int[np.ndarray, "T C"]:
    return measurement.selection.kept.sum(axis=-1)


def _seconds(calls: Calls) -> dict[str, float]:
    return {"first": calls.first, "warm": calls.warm}


def _mean(counts: Int[np.ndarray, "T"]) -> str:
    least, most = counts.min(), counts.max()
    return f"{counts.mean():.1f} ({least}-{most})" if most > least else str(least)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
