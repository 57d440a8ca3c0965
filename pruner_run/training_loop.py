"""The one training loop. A backend's trainer takes batches of arrays and gives numbers.

Steps are counted from 0. A checkpoint bears the number of the last step in it, and a resumed run
makes the next one: its data, its random numbers and its learning rate are functions of that number
alone, so that it cannot tell that it was interrupted.
"""

import dataclasses
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pruner_run import metrics, run_checkpoint
from pruner_run.backend import Trainer
from pruner_run.configs import TrainConfig
from pruner_spec.training import Batch

logger = logging.getLogger(__name__)


class Data(Protocol):
    """Batches, from a step on."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@dataclasses.dataclass
class _Stop:
    """Set by SIGTERM: the step that is being made is the last one."""

    asked: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def prepare(config: TrainConfig) -> Path | None:
    """Makes the run's folder; the checkpoint to go on from, if there is one.

    Raises:
        FileExistsError: there is a run already, and neither --resume nor --overwrite.
        ValueError: both are set, or the checkpoint is of another config.
    """
    if config.resume and config.overwrite:
        raise ValueError("resume: expected one of --resume and --overwrite, got both")
    if config.overwrite and config.run_dir.exists():
        shutil.rmtree(config.run_dir)
    begun = bool(run_checkpoint.steps(config)) or (config.run_dir / metrics.FILE).exists()
    if begun and not config.resume:
        raise FileExistsError(
            f"{config.run_dir}: expected no run, or --resume to go on with it or --overwrite to "
            "begin again; got one"
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return run_checkpoint.newest(config) if config.resume else None


def run(
    config: TrainConfig,
    trainer: Trainer,
    data: Data,
    start: int,
    stats: Mapping[str, bytes],
    console: Console,
) -> int:
    """Makes the steps from `start` on, and gives the number of the last one.

    Args:
        config: the run's; its folder is there.
        trainer: in the state before step `start`.
        data: from step `start` on.
        start: the first step to make.
        stats: normalisation statistics, which go into every checkpoint.
        console: for the progress.

    Raises:
        OSError: a checkpoint cannot be written; those before are still there.
    """
    described = run_checkpoint.described(config)
    stop = _Stop()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with metrics.writers(config, described, start) as writers, _progress(console) as bar:
            task = bar.add_task("", total=config.num_train_steps, completed=start)
            log = _Log(config, writers, bar, task, start)
            batches = iter(data)
            for step in range(start, config.num_train_steps):
                log.add(step, trainer.step(next(batches)))
                is_last = step == config.num_train_steps - 1 or stop.asked
                if is_last or (step + 1) % config.log_interval == 0:
                    log.flush()
                if is_last or (step % config.save_interval == 0 and step > start):
                    log.flush()
                    run_checkpoint.save(config, step, trainer.state(), stats)
                if stop.asked:
                    console.print(f"stopped after step {step}, which is saved; --resume goes on")
                    return step
        return config.num_train_steps - 1
    finally:
        signal.signal(signal.SIGTERM, before)
        data.close()


class _Log:
    """Metrics that have not been looked at yet: reading them waits for the device."""

    def __init__(
        self,
        config: TrainConfig,
        writers: list[metrics.Writer],
        bar: Progress,
        task: Any,
        start: int,
    ) -> None:
        self._config, self._writers, self._bar, self._task = config, writers, bar, task
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._since, self._warned, self._done = time.perf_counter(), False, start

    def add(self, step: int, found: Mapping[str, Any]) -> None:
        self._pending.append((step, found))
        self._bar.advance(self._task)

    def flush(self) -> None:
        """Writes a line a step, and shows the last one."""
        values: dict[str, float] = {}
        step = 0
        for step, found in self._pending:
            values = {name: float(value) for name, value in found.items()}
            values["learning_rate"] = self._config.lr_schedule.learning_rate(step)
            if not math.isfinite(values["loss"]):
                raise ValueError(
                    f"loss: expected a finite number in step {step}, got {values['loss']}; the "
                    "last checkpoint is from before"
                )
            for writer in self._writers:
                writer.write(step, values)
            if not self._warned:
                self._warned = metrics.warn_of_collapse(step, values)
        if not self._pending:
            return
        for writer in self._writers:
            if isinstance(writer, metrics.JsonLines):
                writer.flush()
        now = time.perf_counter()
        rate = len(self._pending) * self._config.batch_size / (now - self._since)
        self._since, self._pending = now, []
        line, last = _line(values, rate), step
        self._bar.update(self._task, description=line)
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"step {last}: {line}", markup=False)


def _line(values: Mapping[str, float], rate: float) -> str:
    kept = values.get("prune/kept_tokens_mean")
    pruned = "" if kept is None else f", {kept:.1f} tokens kept"
    learning_rate = values["learning_rate"]
    return f"loss {values['loss']:.4f}, rate {learning_rate:.1e}, {rate:.1f} samples/s{pruned}"


def _progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )
