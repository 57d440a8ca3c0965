"""The order of samples: a function of the seed and the epoch, so that a run can go on anywhere.

An epoch is a permutation of the dataset, cut into batches; the rest that fills no batch is left out
(another one in each epoch). A dataset smaller than a batch has no such cut: its epochs follow one
another without a gap, and a batch holds samples twice.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from pruner_spec.randomness import random_bits, stream_key

SAMPLE_ORDER = "sample_order"
"""The stream of the permutations; their step is the epoch."""


def positions(step: int, batch_size: int, length: int, seed: int) -> Int64[np.ndarray, "B"]:
    """The samples of a step's global batch.

    Args:
        step: of the run, from 0.
        batch_size: B, samples a step on all devices together.
        length: of the dataset.
        seed: of the run.

    Raises:
        ValueError: a number is not positive, or the step negative.
    """
    for name, value in (("batch_size", batch_size), ("dataset's length", length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}")
    if length >= batch_size:
        epoch, batch = divmod(step, length // batch_size)
        return epoch_order(epoch, length, seed)[batch * batch_size : (batch + 1) * batch_size]
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = [epoch_order(int(epoch), length, seed) for epoch in np.unique(places // length)]
    return np.concatenate(orders)[places - places[0] // length * length]


@lru_cache(maxsize=2)
def epoch_order(epoch: int, length: int, seed: int) -> Int64[np.ndarray, "length"]:
    """The dataset in an epoch's order: sorted by random bits, of equal ones the first is first."""
    (bits,) = random_bits(stream_key(seed, epoch, SAMPLE_ORDER, [0]), (length,))
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False  # it is shared
    return order


def share(batch_size: int, process_index: int, process_count: int) -> slice:
    """The places in the global batch that are a process's.

    Raises:
        ValueError: the batch cannot be divided evenly, or there is no such process.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: expected 0..{process_count - 1}, got {process_index}")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: expected a multiple of the {process_count} processes, got {batch_size}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
