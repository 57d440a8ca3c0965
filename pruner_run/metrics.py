"""What a run says as it goes: a line a step in metrics.jsonl, and what else was asked for."""

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pruner_run.configs import TrainConfig

FILE = "metrics.jsonl"

# As few kept in a sample, or one patch with this share of the votes, and the selection has as good
# as collapsed: a patch a camera.
COLLAPSED_TOKENS, COLLAPSED_SHARE = 3.0, 0.95

_ADVICE = (
    "step %d: the pruner's selection has collapsed: %.1f patches kept a sample, the most voted one "
    "has %.0f %% of the votes. Try a floor (--model.token_prune_min_keep 16), a budget "
    "(--model.token_prune_keep_ratio 0.25), noise for longer (--token_prune_noise_schedule "
    "constant), or one pool a camera (--model.token_prune_scope camera)."
)

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl; a resumed run goes on without gaps or repeats.

    Args:
        path: the file.
        start: the first step to come; lines from it on are of steps that are made again.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = _lines_before(path, start)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)  # a line at a time, so that none is cut off

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self._file.close()


def _lines_before(path: Path, start: int) -> list[str]:
    if not path.exists() or start == 0:
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off as the process was killed; its step is made again
        if step < start and line.endswith("\n"):
            kept.append(line)
    return kept


class TensorBoard:
    """Event files for TensorBoard, one for each part of a run.

    Args:
        folder: for them.
        start: the first step to come; what earlier files say of it and later ones is void.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        # Without the suffix, a file of the same second would be written over.
        self._writer = SummaryWriter(str(folder), purge_step=start, filename_suffix=f".{start:09d}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a millisecond, and nothing is lost with a run that is killed

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on where it was.

    Steps that a resumed run makes again have the numbers they had: it does not take them twice.
    """

    def __init__(self, config: TrainConfig, described: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        path = config.run_dir / "wandb_id.txt"
        known = path.read_text().strip() if config.resume and path.exists() else None
        try:
            self._run = wandb.init(
                project=config.project_name,
                name=config.exp_name,
                dir=str(config.run_dir),
                id=known,
                resume="allow" if known else None,
                config=dict(described),
            )
        except wandb.Error as error:
            raise ValueError(f"wandb_enabled: expected a run to begin, got: {error}") from error
        path.write_text(self._run.id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def check_installed(config: TrainConfig) -> None:
    """Raises ValueError if a package is missing for what the config asks for."""
    for option, package in (("tensorboard_enabled", "tensorboardX"), ("wandb_enabled", "wandb")):
        if getattr(config, option) and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{option}: expected {package} to be installed: pip install 'pi05-pruner[logging]'"
            )


@contextlib.contextmanager
def writers(
    config: TrainConfig, described: Mapping[str, Any], start: int
) -> Iterator[list[Writer]]:
    """All that the config asks for, metrics.jsonl first; see `check_installed`.

    Raises:
        ValueError: Weights & Biases refuses the run.
    """
    found: list[Writer] = [JsonLines(config.run_dir / FILE, start)]
    try:
        if config.tensorboard_enabled:
            found.append(TensorBoard(config.run_dir / "tensorboard", start))
        if config.wandb_enabled:
            found.append(WeightsAndBiases(config, described))
        yield found
    finally:
        for writer in found:
            writer.close()


def warn_of_collapse(step: int, metrics: Mapping[str, float]) -> bool:
    """Warns when the pruner's selection has collapsed; says what to try."""
    kept = metrics.get("prune/kept_tokens_mean")
    share = metrics.get("prune/argmax_top1_share", 0.0)
    if kept is None or (kept > COLLAPSED_TOKENS and share < COLLAPSED_SHARE):
        return False
    logger.warning(_ADVICE, step, kept, 100 * share)
    return True
