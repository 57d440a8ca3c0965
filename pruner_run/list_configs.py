"""`pruner configs`: the training configs by name."""

import dataclasses
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run.assets import DEMO_EPISODE
from pruner_run.configs import CONFIGS, TrainConfig

_WIDTH = 110  # on a narrower screen lines run over, which is easier to read than folded names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """List the training configs. `pruner train NAME --help` shows what can be changed of one."""


def run(options: Options) -> None:
    """Prints a table."""
    del options
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("config", "model", "backend", "batch", "steps", "data"):
        justify = "right" if column in ("batch", "steps") else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for name, config in CONFIGS.items():
        steps, batch = f"{config.num_train_steps:,}", str(config.batch_size)
        table.add_row(name, model(config), config.backend, batch, steps, data(config))
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table)


def model(config: TrainConfig) -> str:
    """Such as "π0.5, pruned"."""
    words = ["π0.5" if config.model.pi05 else "π0"]
    words += ["pruned"] * config.model.token_pruning_enabled + ["LoRA"] * config.model.has_lora
    return ", ".join(words)


def data(config: TrainConfig) -> str:
    """The dataset, or what to set."""
    if config.data.fake:
        return "generated"
    if config.data.repo_id is None:
        return "--data.repo_id"
    ships = Path(config.data.repo_id) == DEMO_EPISODE
    return f"{DEMO_EPISODE.name}, which ships" if ships else config.data.repo_id
