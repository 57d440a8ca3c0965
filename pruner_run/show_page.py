"""An episode's attention as one page, which a browser opens without a network.

The page is the template `assets/show.html` with the data in the place of a mark: images as JPEG,
votes and scores in full precision, so that the page's selections are the spec's to the patch.
"""

import base64
import dataclasses
import io
import json
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pruner_run import demo_report, picture
from pruner_run.assets import SHOW_PAGE
from pruner_run.attention import Attention

MOST_FRAMES = 80
BUDGETS = (8, 16, 24, 32, 64)
JPEG_QUALITY = 80
_MARK = "__DATA__"


@dataclasses.dataclass(frozen=True)
class Source:
    """What was looked at, and by what.

    Attributes:
        policy: its config, backend and dtype.
        weights: where they are from.
        is_random: whether they are random.
        episode: of which dataset.
    """

    policy: str
    weights: str
    is_random: bool
    episode: str

    @property
    def line(self) -> str:
        """All of it, in a line."""
        warning = " Random weights: the mechanism, not what a trained model attends to."
        line = f"{self.policy}; weights: {self.weights}; {self.episode}."
        return line + warning * self.is_random


def page(seen: Attention, source: Source) -> bytes:
    """The page's file, of at most `MOST_FRAMES` frames, spread evenly."""
    seen = seen.at(picture.spread_evenly(len(seen.frames), MOST_FRAMES))
    text = json.dumps(data(seen, source), ensure_ascii=False, separators=(",", ":"))
    template = SHOW_PAGE.read_text(encoding="utf-8")
    return template.replace(_MARK, text.replace("<", "\\u003c")).encode()


def data(seen: Attention, source: Source) -> dict[str, Any]:
    """What the page knows. Arrays are base64 of their bytes, [T, C, N], little-endian."""
    model = seen.model
    patches, own = model.vision.num_patches, model.keep_budget
    budgets = {*(budget for budget in BUDGETS if budget < patches)}
    return {
        **dataclasses.asdict(source),
        "instruction": seen.instruction,
        "rule": demo_report.rule(model),
        "cameras": [*seen.images],
        "frames": seen.frames,
        "seconds": seen.seconds.round(3).tolist(),
        "patches": patches,
        "joint": seen.is_joint,
        "min_keep": model.token_prune_min_keep,
        "own_budget": own,
        "budgets": [None, *sorted(budgets if own is None else budgets | {own})],
        "votes": _base64(seen.votes.astype("<i2")),
        "best": _base64(seen.best.astype("<f8")),
        "kept": _base64(seen.kept.astype("u1")),
        "diagnostics": seen.diagnostics,
        "heat": _base64(picture.HEAT),
        "images": {camera: [*map(_jpeg, images)] for camera, images in seen.images.items()},
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _jpeg(image: UInt8[np.ndarray, "H W 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
