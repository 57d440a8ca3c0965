"""`pruner train CONFIG`, also `python -m pruner_run.train CONFIG`, also under torchrun."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from pruner_run import backend as backends
from pruner_run import configs, run_checkpoint, training_loop
from pruner_run.configs import TrainConfig
from pruner_run.data.loader import TrainingData
from pruner_run.data.norm_stats import checkpoint_assets, require_norm_stats
from pruner_run.tokenizer import PromptTokenizer

BAD_INPUT = 2

# Where openpi's downloads are, below OPENPI_DATA_HOME.
_TOKENIZER = "big_vision/paligemma_tokenizer.model"


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
    console = Console(highlight=False)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)]
    )
    backends.choose(config.backend)
    _check_devices(config)
    settings = config.settings
    stats = require_norm_stats(config)
    tokenizer = PromptTokenizer(tokenizer_path(config), max_len=config.model.max_token_len)
    _check_vocabulary(config, tokenizer)
    found = training_loop.prepare(config)
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
    )
    trainer = backends.load(config.backend).trainer(
        config.model, settings, config.weights if found is None else None
    )
    if found is not None:
        console.print(f"going on from {found}")
        trainer.restore(run_checkpoint.load(found, config.model))
    assets = checkpoint_assets(config, stats)
    last = training_loop.run(config, trainer, data, start, assets, console)
    console.print(f"{config.run_dir / str(last)}")


def _check_devices(config: TrainConfig) -> None:
    """Raises a ValueError for what would silently be several runs, or one device's."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.fsdp_devices != 1 or processes != 1:
        raise ValueError(
            f"fsdp_devices: expected 1, in one process: several devices are not supported yet; got "
            f"{config.fsdp_devices} in {processes}"
        )


def tokenizer_path(config: TrainConfig) -> Path:
    """The config's tokenizer, or where openpi keeps PaliGemma's."""
    if config.tokenizer_path is not None:
        return config.tokenizer_path
    home = os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")
    return Path(home).expanduser() / _TOKENIZER


def _check_vocabulary(config: TrainConfig, tokenizer: PromptTokenizer) -> None:
    rows = config.model.paligemma.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer_path: expected at most the model's {rows} tokens, got "
            f"{tokenizer.vocab_size} in {tokenizer_path(config)}"
        )


if __name__ == "__main__":
    main()
