"""The parts of the demo by themselves: margins, pictures, files, normalisation."""

import os

import numpy as np
import pytest

from pruner_run import picture
from pruner_run.backend import Pruned
from pruner_run.comparison import compare, decision_margins, pruning_error
from pruner_run.files import write_atomically
from pruner_run.measurement import Calls, Measurement
from pruner_spec import pruner
from pruner_spec.config import Pi0Config

KEPT = np.arange(256) % 7 == 0


def draw_selection(frames: int = 2, cameras: int = 3, patches: int = 9) -> Pruned:
    generator = np.random.default_rng(0)
    return Pruned(
        patches=generator.standard_normal((frames, cameras, patches, 8)),
        prompt=generator.standard_normal((frames, 5, 8)),
        prompt_mask=np.arange(5) < [[3]] * frames,
        kept=np.zeros((frames, cameras, patches), dtype=bool),
    )


def config(**pruning) -> Pi0Config:
    return Pi0Config(
        paligemma_variant="tiny",
        action_expert_variant="tiny_expert",
        vision_variant="tiny/14",
        token_pruning_enabled=True,
        **pruning,
    )


def measurement(selection: Pruned, actions: float) -> Measurement:
    calls = [Calls(np.full((2, 4, 3), value), first=1.0, warm=0.5) for value in (2.0, actions)]
    return Measurement("x", "X", "cpu", *calls, selection, top_votes_share=0.5, queries_spread=0.5)


@pytest.mark.parametrize("scope", ["camera", "joint"])
def test_margin_of_the_votes(scope):
    selection = draw_selection()
    margins = decision_margins(selection, config(token_prune_scope=scope))
    expected = []
    for frame in range(2):
        groups = [[0], [1], [2]] if scope == "camera" else [[0, 1, 2]]
        for group in groups:
            patches = selection.patches[frame, group].reshape(1, -1, 8)
            task = selection.prompt[frame : frame + 1, :3]
            [scores] = np.sort(pruner.importance_score(patches, task), axis=-1)
            expected.append((scores[:, -1] - scores[:, -2]).min())
    assert margins.tolist() == expected


@pytest.mark.parametrize(("scope", "pools", "budget"), [("camera", 6, 6), ("joint", 2, 5)])
def test_margin_of_the_last_seat(scope, pools, budget):
    """Moving the scores by less than half the margin changes no selection."""
    selection = draw_selection()
    settings = config(token_prune_scope=scope, token_prune_keep_tokens=budget)
    margins = decision_margins(selection, settings)
    patches = selection.patches.reshape(pools, -1, 8)
    task = selection.prompt.repeat(pools // 2, axis=0)[:, :3]
    scores = pruner.importance_score(patches, task)
    seats = budget * patches.shape[1] // 9
    chosen = pruner.select_hard(scores, keep_tokens=seats)
    noise = np.random.default_rng(1).uniform(-0.49, 0.49, scores.shape)
    moved = pruner.select_hard(scores + noise * margins[:, None, None], keep_tokens=seats)
    np.testing.assert_array_equal(moved, chosen)
    unlimited = decision_margins(selection, config(token_prune_scope=scope))
    assert (margins <= unlimited).all()
    assert (margins < unlimited).any()


def test_agreement_counts_what_differs():
    selection = draw_selection()
    other = selection.kept.copy()
    other[1, 2, 4] = True
    flipped = Pruned(selection.patches, selection.prompt, selection.prompt_mask, other)
    agreement = compare(measurement(selection, 2.0), measurement(flipped, 2.5), config())
    assert agreement.patches == 2 * 3 * 9
    assert (agreement.differing_patches, agreement.differing_frames) == (1, 1)
    assert agreement.closest_margin == decision_margins(selection, config())[1 * 3 + 2]
    assert (agreement.actions_difference, agreement.unpruned_actions_difference) == (0.5, 0.0)
    assert agreement.largest_action == 2.0
    assert pruning_error(measurement(selection, 2.5)) == 0.25


def test_kept_patches_are_lit_and_the_others_dimmed():
    image = np.full((224, 224, 3), 200, dtype=np.uint8)
    size = picture.CELL // 16
    drawn = np.asarray(picture.light_up(image, KEPT)).reshape(16, size, 16, size, 3)
    centres = drawn[:, size // 2, :, size // 2].reshape(256, 3)
    assert (centres[KEPT] == 200).all()
    assert (centres[~KEPT] < 120).all()


def test_long_text_is_wrapped():
    images = {"a": np.zeros((1, 224, 224, 3), dtype=np.uint8)}
    short, long = (
        picture.draw(picture.Sheet("title", text, images, KEPT[None, None], [0.0]))
        for text in ("short", "a text that is far too long for one line " * 3)
    )
    assert short.width == long.width
    assert short.height < long.height


def test_spreading_evenly():
    assert picture.spread_evenly(3, 6) == [0, 1, 2]
    assert picture.spread_evenly(11, 6) == [0, 2, 4, 6, 8, 10]
    assert picture.spread_evenly(1, 6) == [0]


def test_a_file_is_replaced_in_full_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    with pytest.raises(OSError, match="disk is gone"):
        write_atomically(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
