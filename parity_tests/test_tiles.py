"""Tiles that were timed: which are kept, who is given them, and what happens to those that fail."""

import logging

import pytest

from pruner_kernels import tiles
from pruner_kernels.tiles import (
    ATTENTION_CANDIDATES,
    CANDIDATES,
    HOPPER,
    TILES,
    AttentionTiles,
    Tiles,
    attention_tiles,
    product_tiles,
)

SIZES = (50, 1024, 2560, 2)  # rows, inputs, outputs, bytes
A100, RTX_4090 = 163 << 10, 99 << 10


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    for table in ("_products", "_attention"):
        monkeypatch.setattr(tiles, table, {})


class Timer:
    """Seconds of what runs by the tiles of now; none for tiles that do not run."""

    def __init__(self, now, seconds):
        self.now, self.seconds, self.tried = now, seconds, []

    def __call__(self):
        self.tried.append(self.now())
        if (taken := self.seconds(self.tried[-1])) is None:
            raise RuntimeError("out of resource: shared memory")
        return taken


def of_project():
    return product_tiles("project", *SIZES)


def test_the_fastest_is_kept_and_launched_next():
    timer = Timer(of_project, lambda each: each.columns)
    tiles.tune_product("project", *SIZES, HOPPER, timer)
    assert timer.tried[0] == TILES["project"]
    assert len(timer.tried) == len(set(timer.tried)) == 1 + len(CANDIDATES["project"])
    assert of_project() == Tiles(columns=16, stages=3)
    # Other rows of the same block are cut alike; another block, size or kernel is not.
    assert product_tiles("project", 51, *SIZES[1:]) == of_project()
    for name, sizes in (
        ("project", (16, 1024, 2560, 2)),
        ("project", (50, 1024, 2048, 2)),
        ("project", (50, 1024, 2560, 4)),
        ("gated", SIZES),
    ):
        assert product_tiles(name, *sizes).columns == TILES[name].columns
    tiles.tune_product("project", *SIZES, HOPPER, timer)  # once a process
    assert len(timer.tried) == 1 + len(CANDIDATES["project"])


def test_attention_is_tuned_by_the_keys():
    sizes = (1, 400, 178, 2)
    default = attention_tiles(*sizes)
    timer = Timer(lambda: attention_tiles(*sizes), lambda each: each.keys + each.parts)
    tiles.tune_attention(*sizes, HOPPER, timer)
    assert timer.tried == [default, *ATTENTION_CANDIDATES]
    assert attention_tiles(*sizes) == AttentionTiles(16, keys=32, parts=4, warps=4)
    assert attention_tiles(1, 400, 306, 2) == AttentionTiles(16, parts=5)
    tiles.tune_attention(1, 400, 178, 4, HOPPER, timer)  # float32 has one cut
    assert len(timer.tried) == 1 + len(ATTENTION_CANDIDATES)


def test_candidates_that_fail_are_left_out(caplog):
    timer = Timer(of_project, lambda each: None if each.columns == 16 else each.inner + each.warps)
    tiles.tune_product("project", *SIZES, HOPPER, timer)
    assert of_project() == Tiles(columns=32, inner=64, stages=6)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_where_none_runs_nothing_changes(caplog):
    tiles.tune_product("project", *SIZES, HOPPER, Timer(of_project, lambda _: None))
    assert of_project() == TILES["project"]
    assert "none of the tiles that were tried runs" in caplog.text


def test_what_is_broken_off_changes_nothing():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiles.tune_product("project", *SIZES, HOPPER, interrupted)
    assert of_project() == TILES["project"]


@pytest.mark.parametrize("shared", [HOPPER, A100, RTX_4090])
@pytest.mark.parametrize(
    "sizes",
    [
        ("project", 50, 1024, 2560, 2),
        ("gated", 51, 1024, 8192, 2),
        ("merge", 100, 4096, 1024, 2),
        ("merge", 50, 2048, 1024, 4),
        ("merge", 3, 37, 1024, 2),
    ],
)
def test_candidates_fit(sizes, shared):
    """Their stages shared memory, and their parts the inputs."""
    _, rows, inputs, _, itemsize = sizes
    timer = Timer(lambda: product_tiles(*sizes), lambda _: 1.0)
    tiles.tune_product(*sizes, shared, timer)
    for each in timer.tried:
        stage = each.inner * (tiles.row_block(rows) + each.columns) * itemsize
        assert each.stages == 2 or each.stages * stage <= shared - (8 << 10)
        assert inputs % each.parts == 0
        assert each.parts == 1 or inputs // each.parts >= each.inner
