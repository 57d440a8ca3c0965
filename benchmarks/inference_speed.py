"""All that docs/speed.md tells of a call: the settings that robots run, and how cost grows.

    python -m benchmarks.inference_speed --part settings --output benchmarks/results/bench_settings
    python -m benchmarks.inference_speed --part prefix --output benchmarks/results/bench_prefix
    ...
    pruner bench --report benchmarks/results/bench_*/results.json

One part, in both backends by one path, is meant to end within 9 minutes on an H200; where it is
not, give one backend at a time. What was measured is kept after every row.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from pruner_run import bench
from pruner_run.bench_cases import IMPLICIT, UNPRUNED, Case

# Unpruned and the whole prompt; a budget; the votes' union, filled up to 60 in all.
SETTINGS = (
    Case(keep=UNPRUNED, prompt=200),
    Case(keep="64"),
    Case(keep=IMPLICIT),
)
_BATCHES = (1, 2, 4, 8, 16, 32)
_STEPS = (1, 2, 5, 10, 20)
# Budgets a camera and prompts, for prefixes of 64 to 968 tokens.
_PREFIXES = (
    ("16", 16),
    ("24", 50),
    ("64", 50),
    ("128", 50),
    ("192", 50),
    (UNPRUNED, 50),
    (UNPRUNED, 200),
)

PARTS: dict[str, list[Case]] = {
    "settings": [dataclasses.replace(case, batch=batch) for case in SETTINGS for batch in (1, 8)],
    "prefix": [Case(keep=keep, prompt=prompt) for keep, prompt in _PREFIXES],
    "cameras": [
        dataclasses.replace(case, cameras=cameras)
        for case in (Case(keep="64"), Case(keep=UNPRUNED))
        for cameras in (1, 2, 3)
    ],
    "batch": [Case(keep="64", batch=batch) for batch in _BATCHES],
    "steps": [Case(keep="64", num_steps=steps) for steps in _STEPS],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a part of what docs/speed.md shows.

    Attributes:
        part: the settings that robots run, each stage timed; or what grows.
        backend: a list of jax and torch.
        path: the way through the model.
        device: the GPU; the CPU tries the script.
        config: the model; tiny tries the script.
        calls: that are timed, of each kind.
        output: folder for results.json.
        overwrite: replace a results.json that is there.
    """

    part: Literal["settings", "prefix", "cameras", "batch", "steps"]
    backend: str = "torch,jax"
    path: Literal["fast", "plain", "both"] = "plain"
    device: Literal["cuda", "cpu"] = "cuda"
    config: str = "pi05"
    calls: int = 100
    output: Path = Path("bench_output")
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False


def main() -> None:
    """Measures a part."""
    options = tyro.cli(Options, use_underscores=True)
    given = bench.Options(
        backend=options.backend,
        path=options.path,
        device=options.device,
        config=options.config,
        calls=options.calls,
        no_stages=options.part != "settings",
        output=options.output,
        overwrite=options.overwrite,
    )
    bench.measure(given, PARTS[options.part], bench.wide_console())


if __name__ == "__main__":
    main()
