"""`pruner compute-norm-stats`: the statistics that a config's training needs."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pruner_run.data.norm_stats import dataset_norm_stats
from pruner_run.data.normalization import FeatureStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compute mean, deviation and quantiles of a config's state and actions.

    Writes <assets>/<config>/<asset id>/norm_stats.json, which training and policies read.

    Attributes:
        config_name: a training config, of those that `pruner configs` lists.
        max_frames: of that many frames only; all, if not given.
        repo_id: another dataset than the config's.
        assets_base_dir: for statistics, in place of the config's.
    """

    config_name: str
    max_frames: int | None = None
    repo_id: str | None = None
    assets_base_dir: Path | None = None


def run(options: Options) -> None:
    """Computes and writes them.

    Raises:
        ValueError: there is no such config, its data is generated, or its dataset does not fit.
        OSError: the dataset is missing, or the statistics cannot be written.
    """
    from pruner_run import configs  # reads every config, which `pruner --help` need not

    config = configs.get(options.config_name)
    data, assets = config.data, config.assets_dirs
    if options.repo_id is not None:
        data = dataclasses.replace(data, repo_id=options.repo_id, fake=False)
    if options.assets_base_dir is not None:
        assets = options.assets_base_dir / options.config_name
    if data.fake:
        raise ValueError(
            f"config_name: expected one with a dataset, got {options.config_name!r}, whose data is "
            "generated and needs no statistics"
        )
    console = Console(highlight=False)
    folder = assets / data.stats_id  # raises where no dataset is named
    with console.status(f"{data.repo_id}: reading"):
        stats = dataset_norm_stats(data, config.model.action_horizon, max_frames=options.max_frames)
    for key, feature in vars(stats).items():
        console.print(_table(key, feature))
    console.print(f"Wrote {stats.write(folder)}", soft_wrap=True)
    if data.assets_dir is not None:
        console.print(
            f"Training reads those in {data.assets_dir} (data.assets_dir), not these, until that "
            "is unset."
        )


def _table(name: str, stats: FeatureStats) -> Table:
    """A row a number; one that never changes is marked, as its scale means nothing."""
    table = Table(name, "mean", "std", "q01", "q99", "")
    columns = [values for values in vars(stats).values() if values is not None]
    rows = np.stack(columns, axis=1)
    for number, row in enumerate(rows):
        constant = "constant" if row[2] == row[3] else ""
        table.add_row(str(number), *(f"{value:.4f}" for value in row), constant)
    return table
