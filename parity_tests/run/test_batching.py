"""Requests in batches: how they fill, what their limit is, and that one's fault is its own."""

import threading
import time
from concurrent.futures import wait

import pytest

from pruner_run.batching import Batcher, BusyError

LONG = 30.0  # seconds; nothing here waits for them


class Doubler:
    """Doubles numbers; waits for its gate, and fails for negative ones."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()

    def __call__(self, numbers):
        self.gate.wait()
        self.batches.append(list(numbers))
        if min(numbers) < 0:
            raise RuntimeError(f"{numbers}: expected positive numbers")
        return [2 * number for number in numbers]


@pytest.fixture
def start():
    """Makes batchers, which end with the test."""
    made = []

    def start(function, *, max_batch=4, seconds=0.0, limit=9, clients=9):
        made.append(
            Batcher(
                function, max_batch=max_batch, wait=seconds, limit=limit, clients=lambda: clients
            )
        )
        return made[-1]

    yield start
    for batcher in made:
        batcher.close()


@pytest.mark.parametrize("clients", [0, 9])
def test_what_waits_is_one_batch(start, clients):
    """Also of clients that are gone."""
    function = Doubler()
    batcher = start(function, clients=clients)
    first = batcher.submit(0)
    while batcher.waiting:
        time.sleep(0)
    rest = [batcher.submit(number) for number in range(1, 7)]
    assert batcher.waiting == 6
    function.gate.set()
    assert [future.result().result for future in (first, *rest)] == [0, 2, 4, 6, 8, 10, 12]
    assert function.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [future.result().batch_size for future in rest] == [4, 4, 4, 4, 2, 2]
    assert rest[0].result().queue_ms > 0


def test_a_batch_waits_until_it_is_full(start):
    function = Doubler()
    function.gate.set()
    batcher = start(function, max_batch=3, seconds=LONG)
    futures = []
    for number in range(3):
        futures.append(batcher.submit(number))
        time.sleep(0.01)
    wait(futures)
    assert function.batches == [[0, 1, 2]]


@pytest.mark.parametrize("clients", [0, 1])
def test_a_client_alone_waits_for_nobody(start, clients):
    function = Doubler()
    function.gate.set()
    batcher = start(function, seconds=LONG, clients=clients)
    assert batcher.submit(1).result(timeout=LONG / 2).batch_size == 1


def test_a_batch_waits_no_longer_than_it_may(start):
    function = Doubler()
    function.gate.set()
    batcher = start(function, seconds=0.05)
    found = batcher.submit(1).result()
    assert found.queue_ms > 40
    assert found.batch_size == 1


def test_the_limit(start):
    batcher = start(Doubler(), limit=2)
    with batcher.admitted():
        with batcher.admitted():
            with pytest.raises(BusyError, match="busy: expected fewer than 2 requests at once"):
                batcher.admitted().__enter__()
            assert batcher.admitted_count == 2
        with batcher.admitted():
            pass
    assert batcher.admitted_count == 0
    batcher._function.gate.set()


def test_one_fault_is_its_own(start):
    function = Doubler()
    batcher = start(function, max_batch=3, seconds=LONG)
    futures = [batcher.submit(number) for number in (1, -1, 2)]
    function.gate.set()
    assert [futures[0].result().result, futures[2].result().result] == [2, 4]
    with pytest.raises(RuntimeError, match=r"\[-1\]: expected positive numbers"):
        futures[1].result()
    assert function.batches == [[1, -1, 2], [1], [-1], [2]]


def test_closing_finishes_what_waits():
    function = Doubler()
    batcher = Batcher(function, max_batch=2, wait=LONG, limit=9, clients=lambda: 9)
    futures = [batcher.submit(number) for number in range(3)]
    function.gate.set()
    batcher.close()
    assert [future.result().result for future in futures] == [0, 2, 4]
