"""An episode as a video: all cameras with the kept patches lit, and how many are kept over time."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pruner_run import picture
from pruner_run.attention import Attention
from pruner_run.data.video import BROWSER_ENCODING, VideoWriter

_CAPTION, _CHART = 44, 130  # heights
_BELOW = _CAPTION + _CHART + 16  # the cameras


def write(path: Path, seen: Attention, line: str, rate: int) -> None:
    """Writes the video, in full or not at all.

    Args:
        path: an mp4 file, in a folder that is there.
        seen: a frame of the video each.
        line: what it is of, below the instruction.
        rate: frames a second.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    head = _head(seen, line)
    size = {"height": head.height + picture.CELL + _BELOW, "width": head.width}
    try:
        writer = VideoWriter(beside, fps=rate, **size, encoding=BROWSER_ENCODING)
        for place in range(len(seen.frames)):
            writer.add(np.asarray(_frame(seen, place, head, size)))
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _head(seen: Attention, line: str) -> Image.Image:
    """What all frames have in common: the instruction, and what the video is of."""
    width = len(seen.images) * (picture.CELL + picture.GAP) - picture.GAP
    texts = [
        picture.paragraph(f"“{seen.instruction}”", picture.INK, picture.LABEL_SIZE, width),
        picture.paragraph(line, picture.FAINT, picture.CAPTION_SIZE, width),
    ]
    height = picture.MARGIN + sum(text.height for text in texts)
    head = Image.new("RGB", (width + 2 * picture.MARGIN, height + height % 2), picture.PAPER)
    top = picture.MARGIN
    for text in texts:
        head.paste(text, (picture.MARGIN, top))
        top += text.height
    return head


def _frame(seen: Attention, place: int, head: Image.Image, size: Mapping[str, int]) -> Image.Image:
    """One frame."""
    whole = Image.new("RGB", (size["width"], size["height"]), picture.PAPER)
    whole.paste(head, (0, 0))
    pen, face = ImageDraw.Draw(whole), picture.font(picture.CAPTION_SIZE)
    below = head.height + picture.CELL
    for number, (camera, images) in enumerate(seen.images.items()):
        left, kept = (
            picture.MARGIN + number * (picture.CELL + picture.GAP),
            seen.kept[place, number],
        )
        whole.paste(picture.light_up(images[place], kept), (left, head.height))
        caption = f"{camera}: {kept.sum()}/{kept.size} kept"
        pen.text((left + picture.CELL // 2, below + 8), caption, picture.INK, face, anchor="mt")
    totals = seen.kept.sum(axis=(1, 2))
    label = (
        f"patches kept at {seen.seconds[place]:.1f} s: {totals[place]} of {seen.kept[place].size}"
    )
    chart_size = (size["width"] - 2 * picture.MARGIN, _CHART)
    chart = picture.curve(totals.tolist(), place, picture.round_up(totals.max()), chart_size, label)
    whole.paste(chart, (picture.MARGIN, below + _CAPTION))
    return whole
