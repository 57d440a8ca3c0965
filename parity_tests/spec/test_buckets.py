"""Buckets of static lengths."""

import pytest

from pruner_spec.buckets import PATCH_BUCKETS, PROMPT_BUCKETS, bucket


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (0, None, 4),
        (1, None, 4),
        (4, None, 4),
        (5, None, 8),
        (9, None, 20),
        (20, None, 20),
        (0, 3, 3),
        (5, 6, 6),
        (6, 6, 6),
        (5, 20, 8),
        (21, 30, 30),
        (0, 0, 0),
    ],
)
def test_smallest_that_fits(length, limit, expected):
    assert bucket(length, (4, 8, 20), limit) == expected


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [(21, None, r"0\.\.20, got 21"), (7, 6, r"0\.\.6, got 7"), (-1, None, r"0\.\.20, got -1")],
)
def test_what_does_not_fit_raises(length, limit, expected):
    with pytest.raises(ValueError, match=f"^length: expected {expected}$"):
        bucket(length, (4, 8, 20), limit)


@pytest.mark.parametrize("buckets", [PROMPT_BUCKETS, PATCH_BUCKETS])
def test_buckets_ascend(buckets):
    assert list(buckets) == sorted(set(buckets))


def test_what_models_have_is_a_bucket():
    """π0's and π0.5's prompts, and the patches of one, two and three cameras."""
    assert {48, 200} <= set(PROMPT_BUCKETS)
    assert {256, 512, 768} <= set(PATCH_BUCKETS)
    assert PATCH_BUCKETS[-1] == 768
