"""`pruner show`: its files, that it shows the model's own selections, and its page in a browser."""

import contextlib
import dataclasses
import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from parity_tests.harness import BACKENDS
from parity_tests.run import browser
from pruner_run import cli, run_checkpoint, show_page
from pruner_run.attention import Attention
from pruner_run.configs import CONFIGS
from pruner_run.data.norm_stats import dataset_norm_stats
from pruner_run.show_page import Source
from pruner_spec.config import CAMERAS
from pruner_spec.parameters import random_parameters
from pruner_spec.pruner import Diagnostics, select_hard, vote
from pruner_spec.training import TrainState

CONFIG = "pi05_transfer_cube_tiny"
SOURCE = Source(policy="tiny", weights="none", is_random=False, episode="synthetic, episode 0")
INSTRUCTION = "</script><script>alert(1)</script> & <!-- “all”"
FRAMES, PATCHES = 4, 256
READABLE = 4.5  # contrast of text, by WCAG's level AA
BUDGETS = (None, *show_page.BUDGETS)


def scored(scope: str, **pruning: Any) -> tuple[Attention, np.ndarray]:
    """Attention as of scores with many ties, and the scores, a pool a row."""
    generator = np.random.default_rng(3)
    pools, size = (FRAMES * 3, PATCHES) if scope == "camera" else (FRAMES, 3 * PATCHES)
    scores = generator.normal(size=(pools, size, size)) + 2 * generator.normal(
        size=(pools, 1, size)
    )
    scores = scores.round(1)
    ballot = vote(scores, np.ones((pools, size), dtype=bool))
    model = dataclasses.replace(CONFIGS[CONFIG].model, token_prune_scope=scope, **pruning)
    shape = (FRAMES, 3, PATCHES)
    image = np.linspace(0, 255, 224 * 224 * 3).astype(np.uint8).reshape(1, 224, 224, 3)
    seen = Attention(
        model=model,
        instruction=INSTRUCTION,
        frames=[0, 10, 20, 30],
        seconds=np.arange(FRAMES) / 5,
        images={camera: image.repeat(FRAMES, axis=0) for camera in CAMERAS},
        votes=ballot.votes.reshape(shape),
        best=ballot.best.reshape(shape),
        kept=np.zeros(shape, dtype=bool),
        diagnostics={
            name: [[0.5] * (pools // FRAMES)] * FRAMES
            for name in (field.name for field in dataclasses.fields(Diagnostics))
        },
    )
    own = model.keep_budget
    return dataclasses.replace(seen, kept=selected(seen, scores, own)), scores


def selected(seen: Attention, scores: np.ndarray, budget: int | None) -> np.ndarray:
    """The spec's selection."""
    seats = budget if budget is None or not seen.is_joint else budget * len(seen.images)
    kept = select_hard(scores, keep_tokens=seats, min_keep=seen.model.token_prune_min_keep)
    return kept.reshape(seen.votes.shape)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The browser's page, with nothing open."""
    program = browser.find()
    if program is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is installed")
    with browser.running(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(page: browser.Page, folder: Path, seen: Attention) -> browser.Page:
    path = folder / "show.html"
    path.write_bytes(show_page.page(seen, SOURCE))
    page.open(path)
    return page


def choose(page: browser.Page, name: str, value: object) -> None:
    """Clicks a radio button."""
    page.evaluate(f"document.querySelector('[name={name}][data-value=\"{value}\"]').click()")


def text(page: browser.Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


@pytest.fixture(scope="module", params=BACKENDS)
def written(request, tmp_path_factory):
    """A run's folder, budget and words: JAX's of random weights, PyTorch's of a checkpoint."""
    folder = tmp_path_factory.mktemp("show")
    if request.param == "jax":
        budget, given = 24, ("--policy.config", CONFIG, "--keep_tokens", "24")
    else:
        budget, given = None, ("--policy.dir", str(checkpoint(folder)))
    options = ("--backend", request.param, "--every", "80", "--output", str(folder / "new"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.main(["show", *options, *given])
    return folder / "new", budget, said.getvalue()


def checkpoint(folder: Path) -> Path:
    """A run's, of random weights."""
    config = dataclasses.replace(
        CONFIGS[CONFIG], backend="torch", checkpoint_base_dir=folder, ema_decay=None
    )
    state = TrainState(1, dict(random_parameters(config.model, 3)), None, {}, {})
    stats = dataset_norm_stats(config.data, config.model.action_horizon)
    assets = {f"{config.data.stats_id}/norm_stats.json": stats.to_file()}
    return run_checkpoint.save(config, 1, state, assets)


def test_the_files(written):
    folder, budget, said = written
    assert "in 3 frames" in said
    assert "closer than" not in said  # else the model's choice is not the reference's
    assert ("72.0 of 768 patches, 72 to 72" in said) == (budget == 24)
    for picture in ("attention_heatmap.png", "kept_patches.png"):
        with Image.open(folder / picture) as image:
            assert image.height > len(CAMERAS) * 300
    with av.open(str(folder / "episode.mp4")) as video:
        assert video.streams.video[0].codec_context.name == "h264"
        assert len([*video.decode(video=0)]) == 3
    assert len([*folder.iterdir()]) == 4


def test_the_model_chooses_what_the_pages_rule_would(page, written):
    folder, budget, _ = written
    page.open(folder / "show.html")
    assert page.evaluate("DATA.frames") == [0, 80, 160]
    assert page.evaluate("DATA.own_budget") == budget
    for frame in range(3):
        rule = page.evaluate(f"Array.from(ruleAt({frame}, DATA.own_budget))")
        assert rule == page.evaluate(f"Array.from(keptAt({frame}, DATA.own_budget))")
        assert sum(rule) == 72 if budget else 3 <= sum(rule) < 768
    assert page.evaluate("find('random').hidden") == (budget is None)


@pytest.mark.parametrize(
    ("scope", "pruning"),
    [
        ("camera", {}),
        ("camera", {"token_prune_min_keep": 200, "token_prune_keep_tokens": 201}),
        ("joint", {"token_prune_min_keep": 5}),
    ],
)
def test_every_budget_is_the_specs(page, tmp_path, scope, pruning):
    seen, scores = scored(scope, **pruning)
    opened(page, tmp_path, seen)
    assert page.evaluate("DATA.budgets").count(seen.model.keep_budget) == 1
    for budget, frame in itertools.product((*BUDGETS, seen.model.keep_budget), range(FRAMES)):
        kept = selected(seen, scores, budget)[frame]
        found = page.evaluate(f"Array.from(ruleAt({frame}, {json.dumps(budget)}))")
        assert found == kept.ravel().astype(int).tolist()
        assert (seen.elect(budget)[frame] == kept).all()
        if frame in (0, FRAMES - 1):
            choose(page, "budget", json.dumps(budget))
            page.evaluate(f"go({frame})")
            assert text(page, "#total") == str(kept.sum())


def test_a_user_finds_their_way(page, tmp_path):
    page.resize(1280)
    seen, scores = scored("camera")
    opened(page, tmp_path, seen)
    assert text(page, "h1") == f"“{INSTRUCTION}”"
    assert text(page, "#now") == "frame 0, 0.00 s"
    page.evaluate("slider.value = 2; slider.dispatchEvent(new Event('input'))")
    assert text(page, "#now") == "frame 20, 0.40 s"
    for key, frame in (("ArrowRight", 30), ("ArrowRight", 30), ("Home", 0), ("ArrowLeft", 0)):
        page.press(key)
        assert text(page, "#now").startswith(f"frame {frame},")
    choose(page, "camera", 1)
    choose(page, "budget", 16)
    assert text(page, "#total") == "16"
    assert page.evaluate("[...document.querySelectorAll('figure')].map(f => f.hidden)") == [
        True,
        False,
        True,
    ]
    assert text(page, f"figure[data-camera={CAMERAS[1]}] .count") == "16 of 256 kept"
    best = selected(seen, scores, 1)[0, 1].argmax()
    row = f"{best // 16 + 1}, {best % 16 + 1}\t{seen.votes[0, 1, best]}"
    assert text(page, "#top tr").startswith(row)
    assert text(page, "#diagnostics tr").split("\t") == ["Votes for one patch", "50.0 %"]
    page.evaluate("play(true)")
    while page.evaluate("state.frame") == 0:
        time.sleep(0.05)
    page.evaluate("play(false)")


def test_overlays_differ_and_nothing_else_is_loaded(page, tmp_path):
    opened(page, tmp_path, scored("camera")[0])
    page.evaluate("Promise.all(images.map(each => each[0].decode()))")
    drawn = set()
    for overlay in ("kept", "score", "votes", "none"):
        choose(page, "overlay", overlay)
        drawn.add(page.evaluate("canvases[0].toDataURL()"))
    assert len(drawn) == 4
    assert page.complaints == []
    assert page.requests == []


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits(page, tmp_path, width):
    page.resize(width)
    opened(page, tmp_path, scored("camera")[0])
    for camera in ("all", 2):
        choose(page, "camera", camera)
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(page, tmp_path, scheme):
    page.darken(scheme)
    opened(page, tmp_path, scored("camera")[0])

    def luminance(name: str) -> float:
        style = "getComputedStyle(document.documentElement)"
        code = page.evaluate(f"{style}.getPropertyValue('--{name}').trim()")
        share = np.array([int(code[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for pair in ("ink paper", "ink card", "faint paper", "faint card", "kept card",
                 "on-accent accent", "warn-ink warn"):  # fmt: skip
        darker, lighter = sorted(luminance(name) for name in pair.split())
        assert (lighter + 0.05) / (darker + 0.05) >= READABLE, pair


def test_the_pages_frames_are_bounded():
    seen, _ = scored("camera")
    data = show_page.page(seen.at([0, 1, 2, 3] * 30), SOURCE)
    images = data.count(b"data:image/jpeg")
    assert images == show_page.MOST_FRAMES * len(CAMERAS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "policy: expected --policy.dir DIR, or --policy.config NAME for random weights"),
        (["--policy.config", "pi05_liberoo"], "did you mean pi05_libero"),
        (["--policy.config", CONFIG, "--episode", "1"], "episode: expected 0..0, got 1"),
        (["--policy.config", CONFIG, "--every", "0"], "every: expected at least 1, got 0"),
        (["--policy.config", CONFIG, "--keep_tokens", "256"], "keep_tokens: expected fewer than"),
        (["--policy.config", CONFIG, "--dataset", "nowhere"], "found no nowhere"),
        (["--policy.dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_values_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["show", "--output", str(tmp_path / "new"), *arguments])
    assert exit_info.value.code == cli.BAD_INPUT
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
