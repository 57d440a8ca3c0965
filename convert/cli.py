"""The commands `convert_jax_model_to_pytorch` and `convert_pytorch_model_to_jax`.

The flags are those of openpi's own script. What a user did wrong ends with a message that names
it and status 2; a result that does not act as its source, under `--verify`, with status 1.
"""

import contextlib
import dataclasses
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from convert import conversion, inspection
from convert.conversion import Conversion
from convert.reading import open_checkpoint
from convert.source import open_source
from pruner_spec.layout import flatten

BAD_INPUT, NOT_THE_SAME, INTERRUPTED = 2, 1, 128 + signal.SIGINT


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxToPytorch:
    """Convert an openpi JAX checkpoint to safetensors, for openpi's PyTorch model or LeRobot.

    What the checkpoint is of is read off its arrays. Adapters are never dropped.

    Attributes:
        checkpoint_dir: the Orbax checkpoint: its folder, or the one above its params.
        output_path: the folder to write: model.safetensors, config.json and assets.
        config_name: the openpi config it is expected to be of; another one is an error.
        precision: of the weights; float32 has the source's values, bit for bit.
        format: whose files: openpi's, or those that LeRobot's π0.5 policy loads.
        lora: merge adapters into the weights, or keep them beside in PEFT's format.
        lora_scale: alpha / rank of the attention's adapters; what a config says, or 1.
        max_shard_size: of a file, such as 5GB; one file if not given.
        omit_unused_lm_head: leave out the action expert's head for text, which nothing reads.
        asset_id: whose statistics LeRobot's files are to have, where there are several.
        verify: load both in their own framework, and compare loss and sampled actions.
        inspect_only: show what the checkpoint holds, and write nothing.
        allow_non_finite: take infinities and NaN.
        overwrite: replace what is at the output path.
    """

    checkpoint_dir: str
    output_path: Path | None = None
    config_name: str | None = None
    precision: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    format: Literal["openpi", "lerobot"] = "openpi"
    lora: Literal["merge", "keep"] = "merge"
    lora_scale: float | None = None
    max_shard_size: str | None = None
    omit_unused_lm_head: bool = False
    asset_id: str | None = None
    verify: bool = False
    inspect_only: bool = False
    allow_non_finite: bool = False
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PytorchToJax:
    """Convert safetensors, openpi's or LeRobot's, to an Orbax checkpoint that openpi restores.

    Attributes:
        checkpoint_dir: the folder with model.safetensors, or with its shards and their index.
        output_path: the folder to write: params, config.json and assets.
        config_name: the openpi config it is expected to be of; another one is an error.
        precision: of the weights; float32 has the source's values, bit for bit.
        lora: keep an adapter beside the weights as openpi's LoRA arrays, or merge it.
        verify: load both in their own framework, and compare loss and sampled actions.
        inspect_only: show what the checkpoint holds, and write nothing.
        allow_non_finite: take infinities and NaN.
        overwrite: replace what is at the output path.
    """

    checkpoint_dir: str
    output_path: Path | None = None
    config_name: str | None = None
    precision: Literal["bfloat16", "float32", "float16"] = "float32"
    lora: Literal["merge", "keep"] = "keep"
    verify: bool = False
    inspect_only: bool = False
    allow_non_finite: bool = False
    overwrite: bool = False


Options = JaxToPytorch | PytorchToJax


def convert_jax_model_to_pytorch(arguments: Sequence[str] | None = None) -> None:
    """The command; None for the process's own arguments."""
    _main("convert_jax_model_to_pytorch", JaxToPytorch, arguments)


def convert_pytorch_model_to_jax(arguments: Sequence[str] | None = None) -> None:
    """The command; None for the process's own arguments."""
    _main("convert_pytorch_model_to_jax", PytorchToJax, arguments)


def _main(name: str, options: type[Options], arguments: Sequence[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no π is no error
    given = tyro.cli(options, prog=name, args=arguments, use_underscores=True)
    try:
        with _terminable():
            status = run(given)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        status = BAD_INPUT
    sys.exit(status)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A request to end, as batch systems send it, unwinds: what was half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: Options) -> int:
    """Inspects or converts; gives the exit status.

    Raises:
        ValueError, OSError: as `convert.jax_to_pytorch`.
    """
    console = Console(highlight=False)
    if options.inspect_only:
        lora_scale = options.lora_scale if isinstance(options, JaxToPytorch) else None
        _inspect(options.checkpoint_dir, options.config_name, lora_scale, console)
        return 0
    if options.output_path is None:
        raise ValueError("output_path: expected a folder to write, or --inspect_only; got neither")
    done = _convert(options)
    _report(done, console)
    if not options.verify:
        return 0
    from pruner_run import verification  # needs both frameworks, where all else needs none

    result = verification.verify(done, console)
    return 0 if result.is_the_same else NOT_THE_SAME


def _inspect(
    checkpoint_dir: str, config_name: str | None, lora_scale: float | None, console: Console
) -> None:
    """Shows what is there, whatever it is, before it is said what is wrong with it."""
    try:
        source = open_source(checkpoint_dir, config_name, lora_scale)
    except ValueError:
        arrays = flatten(open_checkpoint(checkpoint_dir))
        names = {name.replace("/", "."): array for name, array in arrays.items()}
        console.print(inspection.tree(escape(checkpoint_dir), names, "."))
        raise
    inspection.show(source, console)


def _convert(options: Options) -> Conversion:
    functions: dict[type, Callable[..., Conversion]] = {
        JaxToPytorch: conversion.jax_to_pytorch,
        PytorchToJax: conversion.pytorch_to_jax,
    }
    fields = {**vars(options)}
    for name in ("verify", "inspect_only"):
        del fields[name]
    with _progress_bar() as bar:

        def start(total: int) -> Callable[[int], None]:
            task = bar.add_task("writing", total=total)
            return lambda count: bar.advance(task, count)

        return functions[type(options)](**fields, start=start)


def _progress_bar() -> Progress:
    """On standard error, so that what is printed can be kept."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(done: Conversion, console: Console) -> None:
    source, config = done.source, done.target.config
    name = inspection.model_name
    if source.side.config.has_lora and not config.has_lora:
        change = f"{name(source.side.config)}, merged"
    else:
        change = name(config)
    print_ = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    print_(f"{change}: {source.place} -> {done.output}")
    print_(f"{done.nbytes / 1e9:.2f} GB in {done.precision}, {done.format}'s format")
    if source.stats:
        print_(f"statistics: {', '.join(sorted(source.stats))}")
    else:
        print_(
            "statistics: no norm_stats.json was found beside or above the weights; a policy needs "
            "one in assets/<asset_id>"
        )
    for field in source.assumed:
        value = getattr(config, field, 1.0)
        told = "a flag of that name" if field == "lora_scale" else "--config_name"
        print_(f"assumed: {field} {value}; weights do not say it, {told} does")
