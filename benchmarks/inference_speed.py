r"""All that docs/speed.md tells of a call: the settings that robots run, and how cost grows.

On a GPU that nobody has tried before, in this order; each command is meant to end within 9 minutes
on an H200, and what was measured is kept after every row:

    PARITY_DEVICE=cuda python -m pytest parity_tests/test_kernels.py parity_tests/test_inference.py
    python -m benchmarks.kernels
    python -m benchmarks.inference_speed --part startup --output benchmarks/results/bench_startup
    python -m benchmarks.inference_speed --part settings --backend torch --path both \
        --output benchmarks/results/bench_settings_torch
    python -m benchmarks.inference_speed --part settings --backend jax --path both \
        --output benchmarks/results/bench_settings_jax
    python -m benchmarks.inference_speed --part prefix --output benchmarks/results/bench_prefix
    python -m benchmarks.inference_speed --part cameras --output benchmarks/results/bench_cameras
    python -m benchmarks.inference_speed --part batch --output benchmarks/results/bench_batch
    python -m benchmarks.inference_speed --part steps --output benchmarks/results/bench_steps
    pruner bench --report benchmarks/results/bench_*/results.json

Kernels that are wrong make speed worthless, so their tests come first. Start-up brings caches of
its own, empty ones; other parts use the user's, and find there what an earlier one compiled.

A part takes both backends unless told otherwise. `settings` holds the actions to a float32
reference; its plain path is timed by fewer calls, `--plain_calls`, since eager PyTorch's are slow.
"""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import random_checkpoint
from pruner_run import bench
from pruner_run.bench_cases import IMPLICIT, MODELS, UNPRUNED, Case

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
    "startup": [Case(keep=IMPLICIT)],
}
_STARTS = 2  # with nothing cached, and with all

# Where a process of either backend keeps what it compiled.
_CACHES = {
    "JAX_COMPILATION_CACHE_DIR": "jax",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a part of what docs/speed.md shows.

    Attributes:
        part: the settings that robots run, each stage timed and the actions held to float32's; what
            grows; or the start of a process with weights from a disk.
        backend: a list of jax and torch.
        path: the way through the model.
        device: the GPU; the CPU tries the script.
        config: the model; tiny tries the script.
        calls: that are timed, of each kind.
        plain_calls: the same of the plain path.
        weights: folder for the weights of `startup`, which are written once.
        output: folder for results.json.
        overwrite: replace a results.json that is there.
    """

    part: Literal["settings", "prefix", "cameras", "batch", "steps", "startup"]
    backend: str = "torch,jax"
    path: Literal["fast", "plain", "both"] = "fast"
    device: Literal["cuda", "cpu"] = "cuda"
    config: str = "pi05"
    calls: int = 100
    plain_calls: int = 20
    weights: Path = Path(tempfile.gettempdir()) / "pruner_startup"
    output: Path = Path("bench_output")
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False


def main() -> None:
    """Measures a part."""
    measure(tyro.cli(Options, use_underscores=True))


def measure(options: Options) -> None:
    """Measures a part.

    Raises:
        ValueError, OSError: as `bench.measure`.
    """
    is_settings = options.part == "settings"
    given = bench.Options(
        backend=options.backend,
        path=options.path,
        accuracy=is_settings,
        device=options.device,
        config=options.config,
        calls=options.calls,
        plain_calls=min(options.plain_calls, options.calls),
        no_stages=not is_settings,
        output=options.output,
        overwrite=options.overwrite,
    )
    if options.part == "startup":
        _measure_starts(given, options.weights)
    else:
        bench.measure(given, PARTS[options.part], bench.wide_console())


def _measure_starts(given: bench.Options, weights: Path) -> None:
    """Starts processes twice each, with weights on a disk: nothing is cached at first."""
    console = bench.wide_console()
    if given.config not in MODELS:
        raise ValueError(f"config: expected one of {', '.join(MODELS)}, got {given.config!r}")
    place = weights / given.config
    if not place.exists():
        with console.status(f"writing random weights to {place}"):
            random_checkpoint.write(place, MODELS[given.config])
    given = dataclasses.replace(given, checkpoint=place, starts=_STARTS)
    before = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory() as caches:
        os.environ.update({name: f"{caches}/{folder}" for name, folder in _CACHES.items()})
        try:
            bench.measure(given, PARTS["startup"], console)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


if __name__ == "__main__":
    main()
