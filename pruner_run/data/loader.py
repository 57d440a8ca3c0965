"""Batches of a run, from any step on, made ahead by threads.

Threads do: decoding and resizing, which are nearly all of the work, leave Python to others. They
write into the batch's own arrays; the order of batches and of samples is that of the steps.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from pruner_run.data.config import DataConfig
from pruner_run.data.normalization import NormStats
from pruner_run.data.samples import CACHE_BYTES, DatasetInputs, GeneratedInputs, Inputs
from pruner_run.data.sampling import positions, share
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.training import Batch

BATCHES_AHEAD = 2


class TrainingData:
    """An endless iterator over a run's batches, or over one process's share of them.

    Attributes:
        step: of the batch that comes next.
    """

    def __init__(
        self,
        data_config: DataConfig,
        model_config: Pi0Config,
        norm_stats: NormStats | None,
        tokenizer: PromptTokenizer | None,
        *,
        seed: int,
        batch_size: int,
        workers: int = 2,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ):
        """Opens the dataset; workers start with the first batch.

        Args:
            data_config: the dataset.
            model_config: the sizes of the model.
            norm_stats: of `require_norm_stats`; None for generated data alone.
            tokenizer: of prompts; None for generated data alone.
            seed: of the run.
            batch_size: samples a step, of all processes together.
            workers: threads; with 0 a batch is made when it is asked for.
            start_step: the step of the first batch.
            process_index, process_count: which share of each batch.
            cache_bytes: memory for decoded images, so that small datasets are decoded once.

        Raises:
            FileNotFoundError: there is no such dataset, or one of its files is missing.
            ValueError: the dataset is damaged or does not fit; or a number is not valid.
        """
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {workers}")
        self._share = share(batch_size, process_index, process_count)
        self._inputs = open_inputs(
            data_config, model_config, norm_stats, tokenizer, cache_bytes=cache_bytes
        )
        self._model = model_config
        self._seed, self._batch_size = seed, batch_size
        self.step = start_step
        self._indices(start_step)  # raises for a number that is not valid
        self._pool = ThreadPoolExecutor(workers, "data") if workers else None
        self._made: deque[tuple[Batch, list[Future[None]]]] = deque()

    def __len__(self) -> int:
        """Samples of the dataset."""
        return len(self._inputs)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            ValueError: a sample cannot be made; the message says which, and names the file.
        """
        while len(self._made) < (BATCHES_AHEAD if self._pool else 1):
            self._made.append(self._begin(self.step + len(self._made)))
        batch, jobs = self._made.popleft()
        if self._pool:
            self._made.append(self._begin(self.step + 1 + len(self._made)))
        try:
            for job in jobs:
                job.result()
        except BaseException:
            self.close()
            raise
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops the workers; what they were making is given up."""
        self._made.clear()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _indices(self, step: int) -> np.ndarray:
        """The samples of this process's share of a batch."""
        return positions(step, self._batch_size, len(self), self._seed)[self._share]

    def _begin(self, step: int) -> tuple[Batch, list[Future[None]]]:
        """A step's batch, which is complete once its jobs are done."""
        indices = self._indices(step)
        places = np.arange(self._share.start, self._share.stop)
        batch = _empty(self._model, places)
        submit = self._pool.submit if self._pool else _run_now
        return batch, [
            submit(self._fill, batch, row, int(index)) for row, index in enumerate(indices)
        ]

    def _fill(self, batch: Batch, row: int, index: int) -> None:
        try:
            sample = self._inputs[index]
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._inputs.where(index)}: {error}") from error
        for camera in CAMERAS:
            batch.images[camera][row] = sample[f"image/{camera}"]
            batch.image_masks[camera][row] = sample[f"image_mask/{camera}"]
        for key in ("state", "tokenized_prompt", "tokenized_prompt_mask", "actions"):
            getattr(batch, key)[row] = sample[key]


def open_inputs(
    data: DataConfig,
    model: Pi0Config,
    stats: NormStats | None,
    tokenizer: PromptTokenizer | None,
    *,
    cache_bytes: int = CACHE_BYTES,
) -> Inputs:
    """The model's inputs that a config names. Errors as `TrainingData`."""
    if data.fake:
        return GeneratedInputs(model)
    if stats is None or tokenizer is None:
        raise ValueError("norm_stats, tokenizer: expected both for a dataset, got None")
    return DatasetInputs(data, model, stats, tokenizer, cache_bytes=cache_bytes)


def _empty(model: Pi0Config, places: np.ndarray) -> Batch:
    """A batch to be filled."""
    size = len(places)
    return Batch(
        images={c: np.empty((size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for c in CAMERAS},
        image_masks={camera: np.empty(size, bool) for camera in CAMERAS},
        state=np.empty((size, model.action_dim), np.float32),
        tokenized_prompt=np.empty((size, model.max_token_len), np.int32),
        tokenized_prompt_mask=np.empty((size, model.max_token_len), bool),
        actions=np.empty((size, model.action_horizon, model.action_dim), np.float32),
        places=places,
    )


def _run_now(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """As an executor's `submit`, in this thread; an error is raised at once."""
    function(*arguments)
    done: Future[None] = Future()
    done.set_result(None)
    return done
