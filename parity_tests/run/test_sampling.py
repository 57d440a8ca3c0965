"""The order of samples: pinned, complete, and the same wherever a run goes on."""

import numpy as np
import pytest

from pruner_run.data.sampling import epoch_order, positions, share


def test_the_order_is_pinned():
    """Another order would be another run: checkpoints of earlier ones could not be gone on with."""
    assert epoch_order(0, 10, 42).tolist() == [0, 2, 4, 3, 5, 7, 6, 1, 8, 9]
    assert epoch_order(1, 10, 42).tolist() == [0, 3, 4, 7, 5, 1, 8, 2, 9, 6]
    assert epoch_order(0, 10, 43).tolist() == [3, 9, 8, 0, 1, 4, 2, 5, 7, 6]
    assert epoch_order(0, 100_000, 0)[:5].tolist() == [45225, 66582, 35585, 59910, 92341]


@pytest.mark.parametrize("length", [1, 2, 1000])
def test_an_epoch_is_a_permutation(length):
    for epoch in range(3):
        assert sorted(epoch_order(epoch, length, 7)) == list(range(length))


def test_orders_are_fair():
    """Every sample is as likely first as any other."""
    first = [int(epoch_order(epoch, 8, 0)[0]) for epoch in range(800)]
    assert (np.abs(np.bincount(first, minlength=8) - 100) < 40).all()


def test_epochs_are_cut_into_batches():
    """Ten samples, four a batch: the last two of each epoch's order are left out."""
    orders = [epoch_order(epoch, 10, 42) for epoch in range(2)]
    found = [positions(step, 4, 10, 42).tolist() for step in range(4)]
    expected = [order[start : start + 4].tolist() for order in orders for start in (0, 4)]
    assert found == expected
    assert positions(3, 4, 10, 42).tolist() == [5, 1, 8, 2]


def test_a_dataset_smaller_than_a_batch_follows_itself():
    """Three samples, five a batch: epochs follow one another without a gap."""
    stream = np.concatenate([epoch_order(epoch, 3, 1) for epoch in range(7)])
    for step in range(4):
        assert positions(step, 5, 3, 1).tolist() == stream[5 * step : 5 * step + 5].tolist()


def test_shares_make_up_the_batch():
    whole = positions(5, 12, 100, 0)
    parts = [whole[share(12, process, 3)] for process in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: positions(0, 0, 10, 0), "batch_size: expected at least 1, got 0"),
        (lambda: positions(0, 1, 0, 0), "dataset's length: expected at least 1, got 0"),
        (lambda: positions(-1, 1, 10, 0), "step: expected 0 or more, got -1"),
        (lambda: positions(0, 1, 10, -1), "seed: expected 0 <= seed"),
        (lambda: share(10, 0, 3), "batch_size: expected a multiple of the 3 processes, got 10"),
        (lambda: share(9, 3, 3), r"process_index: expected 0\.\.2, got 3"),
    ],
)
def test_numbers_that_are_not_valid(call, message):
    with pytest.raises(ValueError, match=message):
        call()
