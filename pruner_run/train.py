"""`pruner train CONFIG`, also `python -m pruner_run.train CONFIG`, also under torchrun."""

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from pruner_run import backend as backends
from pruner_run import configs, metrics, run_checkpoint, training_loop
from pruner_run.backend import Devices
from pruner_run.configs import TrainConfig
from pruner_run.data.hub import find_dataset
from pruner_run.data.loader import TrainingData
from pruner_run.data.norm_stats import checkpoint_assets, require_norm_stats
from pruner_run.tokenizer import load_tokenizer

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pruner_run.train") -> None:
    """Reads the command line and trains.

    Raises:
        SystemExit: with status 2 for what a user did wrong.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run(configs.parse(given, prog))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def run(config: TrainConfig) -> None:
    """Trains, from the beginning or from the last checkpoint.

    Raises:
        ValueError: the config, the dataset or a checkpoint is not as it must be.
        OSError: a file is missing, or cannot be written.
    """
    backends.choose(config.backend)
    metrics.check_installed(config)
    with contextlib.closing(backends.load(config.backend).devices(config.fsdp_devices)) as devices:
        _run(config, devices)


def _run(config: TrainConfig, devices: Devices) -> None:
    is_first = devices.process == 0
    console = Console(highlight=False, quiet=not is_first)
    logging.basicConfig(
        level=logging.INFO if is_first else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=console)],
    )
    _check_batch(config, devices)
    settings = config.settings
    if not config.data.fake:
        find_dataset(config.data.repo_id)  # without it, statistics are of no use
    stats = require_norm_stats(config)
    tokenizer = load_tokenizer(config.tokenizer_path, config.model)
    found = _found(config, devices)
    start = 0 if found is None else int(found.name) + 1
    if start >= config.num_train_steps:
        console.print(f"{config.run_dir}: all {config.num_train_steps} steps are made")
        return
    data = TrainingData(
        config.data,
        config.model,
        stats,
        tokenizer,
        seed=config.seed,
        batch_size=config.batch_size,
        workers=config.num_workers,
        start_step=start,
        process_index=devices.process,
        process_count=devices.processes,
    )
    state = None if found is None else run_checkpoint.load(found, config.model)
    # A state's own weights, as drawing others takes a minute for a model of the full size.
    weights = config.weights if state is None else state.parameters
    console.print(_beginning(config, found), soft_wrap=True)
    trainer = devices.trainer(config.model, settings, weights, config.pytorch_compile)
    if state is not None:
        trainer.restore(state)
    assets = checkpoint_assets(config, stats)
    last = training_loop.run(config, trainer, data, start, assets, console, devices)
    console.print(f"{config.run_dir / str(last)}", soft_wrap=True)


def _beginning(config: TrainConfig, found: Path | None) -> str:
    if found is not None:
        return f"going on from {found}"
    if config.weights is None:
        return "starting from random weights; --weight_path names a checkpoint to start from"
    return f"starting from {config.weights}"


def _check_batch(config: TrainConfig, devices: Devices) -> None:
    parts = config.accumulation * devices.count
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of {parts}, for {devices.count} devices and "
            f"accumulation={config.accumulation}; got {config.batch_size}"
        )


def _found(config: TrainConfig, devices: Devices) -> Path | None:
    """The checkpoint to go on from, which the first process looks for."""
    found = training_loop.prepare(config) if devices.process == 0 else None
    step = int(devices.largest(-1 if found is None else int(found.name)))
    return None if step < 0 else config.run_dir / str(step)


if __name__ == "__main__":
    main()
