"""Training's speed on one GPU: samples a second, peak memory, model FLOPs utilisation.

    python -m benchmarks.train_speed --output results.json

Full fine-tuning of full-size π0.5 with random weights, float32 masters and bfloat16 compute, a
batch of random images, both backends, LightVLA off and on, each in a process of its own. A step is
all of it: random numbers, loss, gradients, clipping, AdamW. Medians, after warm-up.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.parameters import parameter_table
from pruner_spec.training import Batch, GradientCheckpointing, TrainingSettings

TFLOP_A_SAMPLE = 13.9  # three times the forward pass over 968 + 50 tokens
_ROW = "TRAIN_SPEED_ROW"  # tells a process which row it is to measure

PEAK_TFLOPS = 794.0  # bfloat16 products measured on an H200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training.

    Attributes:
        backends: which.
        pruning: LightVLA off, on, or both.
        size: "full" is π0.5's; "tiny" tries the script.
        batch_size: samples a step.
        steps: that are timed.
        warmup: that are not.
        gradient_checkpointing: what is computed again in the backward pass.
        augment: images.
        ema: keeps an average of the weights.
        output: for the numbers, as JSON.
    """

    backends: tuple[Literal["jax", "torch"], ...] = ("jax", "torch")
    pruning: tuple[Literal["off", "on"], ...] = ("off", "on")
    size: Literal["full", "tiny"] = "full"
    batch_size: int = 32
    steps: int = 8
    warmup: int = 3
    gradient_checkpointing: GradientCheckpointing = "products"
    augment: tyro.conf.FlagConversionOff[bool] = False
    ema: tyro.conf.FlagConversionOff[bool] = False
    output: Path | None = None


def main() -> None:
    """Runs each row in a process, and prints the table."""
    options = tyro.cli(Options, use_underscores=True)
    if _ROW in os.environ:
        backend, pruning = os.environ[_ROW].split("/")
        print(json.dumps(measure(options, backend, pruning == "on")))
        return
    rows = list(_rows(options))
    Console(width=120).print(table(rows, options))
    if options.output is not None:
        options.output.write_text(json.dumps({"options": _plain(options), "rows": rows}, indent=2))


def _rows(options: Options) -> Iterator[dict[str, Any]]:
    for backend in options.backends:
        for pruning in options.pruning:
            command = [sys.executable, "-m", "benchmarks.train_speed", *sys.argv[1:]]
            environment = os.environ | {_ROW: f"{backend}/{pruning}"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            lines = done.stdout.splitlines()
            if done.returncode or not lines:
                yield {"backend": backend, "pruning": pruning, "error": done.returncode}
                continue
            yield {"backend": backend, "pruning": pruning} | json.loads(lines[-1])


def measure(options: Options, backend: str, prunes: bool) -> dict[str, Any]:
    """Seconds of each step, and the memory that was needed at most."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    config = _config(options, prunes)
    settings = TrainingSettings(
        gradient_checkpointing=options.gradient_checkpointing,
        augment=options.augment,
        ema_decay=0.99 if options.ema else None,
    )
    trainer, device = _trainer(backend, config, settings)
    batch = _batch(config, options.batch_size)
    seconds, losses = [], []
    for step in range(options.warmup + options.steps):
        start = time.perf_counter()
        losses.append(float(trainer.step(batch)["loss"]))  # waits for the step
        seconds.append(time.perf_counter() - start)
        if step == 0:
            print(f"{backend}: first step {seconds[0]:.1f} s", file=sys.stderr, flush=True)
    timed = sorted(seconds[options.warmup :])
    median = timed[len(timed) // 2]
    return {
        "device": device(),
        "first": seconds[0],
        "seconds": seconds,
        "median": median,
        "samples_per_second": options.batch_size / median,
        "peak_gib": _peak(backend) / 2**30,
        "losses": losses,
    }


def _config(options: Options, prunes: bool) -> Pi0Config:
    sizes: dict[str, Any] = {}
    if options.size == "tiny":
        sizes = {
            "paligemma_variant": "tiny",
            "action_expert_variant": "tiny_expert",
            "vision_variant": "tiny/14",
        }
    return Pi0Config(pi05=True, dtype="bfloat16", token_pruning_enabled=prunes, **sizes)


def _trainer(backend: str, config: Pi0Config, settings: TrainingSettings) -> tuple[Any, Any]:
    weights = _weights(config)
    if backend == "jax":
        import jax

        from pruner_jax.training import Trainer

        return Trainer(config, settings, weights), lambda: jax.devices()[0].device_kind
    import torch

    from pruner_torch.training import Trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name if device == "cuda" else lambda: "cpu"
    return Trainer(config, settings, weights, device=device), name


def _peak(backend: str) -> int:
    if backend == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _weights(config: Pi0Config) -> dict[str, Any]:
    """Random ones, drawn fast: their values do not matter, that they are no zeros does."""
    generator = np.random.Generator(np.random.SFC64(0))
    found = {}
    for name, parameter in parameter_table(config).items():
        values = generator.random(parameter.stacked_shape, dtype=np.float32)
        values -= np.float32(0.5)
        values *= np.float32(3.4 / np.sqrt(parameter.shape[0]))
        found[name] = values
    return found


def _batch(config: Pi0Config, size: int) -> Batch:
    generator = np.random.default_rng(0)
    shape = (size, IMAGE_SIZE, IMAGE_SIZE, 3)
    length = config.max_token_len
    mask = np.broadcast_to(np.arange(length) < min(50, length), (size, length))
    tokens = generator.integers(2, config.paligemma.vocab_size, (size, length)).astype(np.int32)
    chunk = (size, config.action_horizon, config.action_dim)
    return Batch(
        images={name: generator.integers(0, 256, shape, dtype=np.uint8) for name in CAMERAS},
        image_masks={name: np.ones(size, dtype=bool) for name in CAMERAS},
        state=generator.uniform(-1, 1, (size, config.action_dim)).astype(np.float32),
        tokenized_prompt=np.where(mask, tokens, 0),
        tokenized_prompt_mask=np.array(mask),
        actions=generator.standard_normal(chunk).astype(np.float32),
        places=np.arange(size),
    )


def table(rows: list[dict[str, Any]], options: Options) -> Table:
    """A row a measurement."""
    found = Table(title=f"π0.5 ({options.size}), batch {options.batch_size}", box=box.SIMPLE_HEAD)
    for column in (
        "",
        "LightVLA",
        "samples/s",
        "s a step",
        "peak GiB",
        "utilisation",
        "first step",
    ):
        found.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            found.add_row(row["backend"], row["pruning"], f"failed: {row['error']}")
            continue
        rate = row["samples_per_second"]
        found.add_row(
            row["backend"],
            row["pruning"],
            f"{rate:.1f}",
            f"{row['median']:.3f}",
            f"{row['peak_gib']:.1f}",
            f"{rate * TFLOP_A_SAMPLE / PEAK_TFLOPS:.0%}" if options.size == "full" else "",
            f"{row['first']:.0f} s",
        )
    return found


def _plain(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


if __name__ == "__main__":
    main()
