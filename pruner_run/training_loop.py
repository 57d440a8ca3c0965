"""The one training loop. A backend's trainer takes batches of arrays and gives numbers.

Steps are counted from 0. A checkpoint bears the number of the last step in it, and a resumed run
makes the next one: its data, its random numbers and its learning rate are functions of that number
alone, so that it cannot tell that it was interrupted.
"""

import contextlib
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

from convert import output
from pruner_run import metrics, run_checkpoint
from pruner_run.backend import Devices, Trainer
from pruner_run.configs import TrainConfig
from pruner_spec.training import Batch


class Data(Protocol):
    """Batches, from a step on."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class _Stop:
    """Set by SIGTERM: the step that is being made is the last one.

    Of several processes the first to know tells the others, and all leave a step later: nobody
    waits for a step that was only just begun.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices, self._is_asked, self._answer = devices, False, None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def is_agreed(self) -> bool:
        """Whether to leave; all processes must ask, once a step."""
        if self._devices.processes == 1:
            return self._is_asked
        before, self._answer = self._answer, self._devices.largest(int(self._is_asked))
        return before is not None and bool(int(before))


def prepare(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, if there is one; nothing is written or deleted yet.

    Raises:
        FileExistsError: there is a run already, and neither --resume nor --overwrite.
        ValueError: both are set, or the checkpoint is of another config; or the run's name would
            put it somewhere else.
    """
    parts = Path(config.exp_name).parts
    if not parts or ".." in parts or Path(config.exp_name).is_absolute():
        raise ValueError(f"exp_name: expected a name for a folder, got {config.exp_name!r}")
    if config.resume and config.overwrite:
        raise ValueError("resume: expected one of --resume and --overwrite, got both")
    begun = bool(run_checkpoint.steps(config)) or (config.run_dir / metrics.FILE).exists()
    if begun and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"{config.run_dir}: expected no run, or --resume to go on with it or --overwrite to "
            "begin again; got one"
        )
    return run_checkpoint.newest(config) if config.resume else None


def run(
    config: TrainConfig,
    trainer: Trainer,
    data: Data,
    start: int,
    stats: Mapping[str, bytes],
    console: Console,
    devices: Devices,
) -> int:
    """Makes the steps from `start` on, and gives the number of the last one.

    Args:
        config: the run's; what its folder has is deleted here if it is to be overwritten.
        trainer: in the state before step `start`.
        data: from step `start` on.
        start: the first step to make.
        stats: normalisation statistics, which go into every checkpoint.
        console: for the progress.
        devices: of the trainer; the first process writes, the others make its steps with it.

    Raises:
        OSError: a checkpoint cannot be written; those before are still there. Or another process
            makes this run.
    """
    stop = _Stop(devices)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with _writers(config, start, devices) as writers, _progress(console) as bar:
            task = bar.add_task("", total=config.num_train_steps, completed=start)
            log = _Log(config, writers, bar, task)
            batches = iter(data)
            for step in range(start, config.num_train_steps):
                log.add(step, trainer.step(next(batches)))
                stops = stop.is_agreed()
                is_last = step == config.num_train_steps - 1 or stops
                saves = is_last or (step % config.save_interval == 0 and step > start)
                if saves or (step + 1) % config.log_interval == 0:
                    log.flush()
                if saves:
                    state = trainer.state(everywhere=False)
                    if state is not None:
                        run_checkpoint.save(config, step, state, stats)
                if stops:
                    console.print(f"stopped after step {step}, which is saved; --resume goes on")
                    return step
        return config.num_train_steps - 1
    finally:
        signal.signal(signal.SIGTERM, before)
        data.close()


@contextlib.contextmanager
def _writers(config: TrainConfig, start: int, devices: Devices) -> Iterator[list[metrics.Writer]]:
    """The first process's, which makes the run's folder and holds it; the others have none."""
    if devices.process:
        yield []
        return
    config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with output.locked(config.run_dir):
        if config.overwrite and config.run_dir.exists():
            shutil.rmtree(config.run_dir)
        config.run_dir.mkdir(exist_ok=True)
        run_checkpoint.tidy(config)
        with metrics.writers(config, run_checkpoint.described(config), start) as found:
            yield found


class _Log:
    """Metrics that have not been looked at yet: reading them waits for the device."""

    def __init__(
        self,
        config: TrainConfig,
        writers: list[metrics.Writer],
        bar: Progress,
        task: Any,
    ) -> None:
        self._config, self._writers, self._bar, self._task = config, writers, bar, task
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._since, self._warned = time.perf_counter(), False

    def add(self, step: int, found: Mapping[str, Any]) -> None:
        self._pending.append((step, found))
        self._bar.advance(self._task)

    def flush(self) -> None:
        """Writes a line a step, and shows the last one."""
        if not self._pending:
            return
        step, values = 0, {}
        for step, found in self._pending:
            values = {name: float(value) for name, value in found.items()}
            values["learning_rate"] = self._config.lr_schedule.learning_rate(step)
            _check_finite(step, values)
            for writer in self._writers:
                writer.write(step, values)
            if not self._warned:
                self._warned = metrics.warn_of_collapse(step, values)
        now = time.perf_counter()
        rate = len(self._pending) * self._config.batch_size / (now - self._since)
        self._since, self._pending = now, []
        line = _line(values, rate)
        self._bar.update(self._task, description=line)
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"step {step}: {line}", markup=False)


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises ValueError where a step went wrong; its norms show it before the next step's loss."""
    for name in ("loss", "grad_norm", "param_norm"):
        if not math.isfinite(found := values.get(name, 0.0)):
            raise ValueError(
                f"{name}: expected a finite number in step {step}, got {found}; the last "
                "checkpoint is from before"
            )


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
