"""Intervals against the tables of the papers."""

import math

import pytest

from parity_tests.tolerances import tolerance
from pruner_run.intervals import Share, difference_interval


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [  # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0000)),
    ],
)
def test_wilsons_interval(successes, trials, expected):
    low, high = Share(successes, trials).interval
    assert (round(low, 4), round(high, 4)) == expected


@pytest.mark.parametrize("trials", [1, 7, 50, 1000])
def test_wilsons_limits_are_where_the_score_test_turns(trials):
    """By its definition: so far from a limit is the share that was observed, in its deviations."""
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        share = Share(successes, trials)
        low, high = share.interval
        assert (low == 0) == (successes == 0)
        assert (high == 1) == (successes == trials)
        for limit in {low, high} - {0.0, 1.0}:
            deviation = math.sqrt(limit * (1 - limit) / trials)
            away = abs(share.value - limit) / deviation
            assert away == pytest.approx(1.959963985, rel=tolerance("statistics", "float64"))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [  # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0000)),
        ((10, 10), (0, 10), (0.6075, 1.0000)),
    ],
)
def test_newcombes_interval_of_a_difference(one, other, expected):
    low, high = difference_interval(Share(*other), Share(*one))
    assert (round(low, 4), round(high, 4)) == expected


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 4)])
def test_shares_that_are_none(successes, trials):
    with pytest.raises(ValueError, match="successes: expected 0"):
        Share(successes, trials)
