"""One thread that computes, and the requests that wait for it, a batch at a time."""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """There are as many requests as may be."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        result: of the function, for this request.
        queue_ms: that it waited.
        infer_ms: that its batch took.
        batch_size: requests in the batch.
    """

    result: Any
    queue_ms: float
    infer_ms: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class _Request:
    item: Any
    future: Future[Answer]
    submitted: float


class Batcher:
    """Calls a function of several requests in a thread of its own.

    A batch is begun when it is full, when as many requests have come as there are clients, or when
    its first has waited long enough.

    Args:
        function: from requests to their results, in order.
        max_batch: requests in a batch.
        wait: seconds that a request waits for others.
        limit: requests that may be here at once, from `admitted` until it ends.
        clients: how many may send a request.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        wait: float,
        limit: int,
        clients: Callable[[], int],
    ) -> None:
        self._function, self._clients = function, clients
        self._max_batch, self._wait, self._limit = max_batch, wait, limit
        self._admitted = 0
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that are not being computed yet."""
        return self._requests.qsize()

    @property
    def admitted_count(self) -> int:
        """Requests that are here."""
        return self._admitted

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Holds a place for a request. To be called from one thread, the event loop's.

        Raises:
            BusyError: there is none left.
        """
        if self._admitted >= self._limit:
            raise BusyError(
                f"busy: expected fewer than {self._limit} requests at once; try again later"
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def submit(self, item: Any) -> Future[Answer]:
        """The answer to a request, which has its place."""
        future: Future[Answer] = Future()
        self._requests.put(_Request(item, future, time.perf_counter()))
        return future

    def close(self) -> None:
        """Ends the thread, after what has been submitted."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._requests.get()) is not None:
            batch = [first]
            is_last = self._fill(batch)
            self._answer([each for each in batch if each.future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _fill(self, batch: list[_Request]) -> bool:
        """Waits for more requests; whether there are none after these."""
        until = time.perf_counter() + self._wait
        while len(batch) < min(self._max_batch, max(self._clients(), len(batch) + self.waiting)):
            try:
                request = self._requests.get(timeout=max(until - time.perf_counter(), 0))
            except queue.Empty:
                return False
            if request is None:
                return True
            batch.append(request)
        return False

    def _answer(self, batch: list[_Request]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        try:
            results = self._function([request.item for request in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            logger.warning("a batch of %d failed; its requests are tried alone", len(batch))
            for request in batch:
                self._answer([request])
            return
        infer_ms = 1e3 * (time.perf_counter() - started)
        for request, result in zip(batch, results, strict=True):
            queue_ms = 1e3 * (started - request.submitted)
            request.future.set_result(Answer(result, queue_ms, infer_ms, len(batch)))
