"""Which patches were kept, drawn over what the cameras saw: kept ones lit, the others dimmed."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from pruner_spec.config import IMAGE_SIZE

CELL = 336  # pixels of a camera's image: 21 a patch of SigLIP's 16 x 16
GAP, MARGIN = 10, 28
COLUMN_HEAD, CAPTION, ROW_HEAD = 34, 34, 40  # height, height and width of the text at a cell
TITLE_SIZE, SUBTITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 30, 20, 22, 18

PAPER, INK, FAINT = (14, 16, 24), (236, 238, 244), (150, 156, 172)
SHADE, LIGHT = (16, 20, 38), (255, 196, 64)
DIM, COLOUR = 0.42, 0.45  # how much of a dropped patch, and of its colour, is still to be seen


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What is drawn: T frames side by side, C cameras one below the other.

    Attributes:
        title: the first line.
        subtitle: what is below it.
        images: by camera.
        kept: which patches.
        seconds: when the frames were.
    """

    title: str
    subtitle: str
    images: Mapping[str, UInt8[np.ndarray, "T H W 3"]]
    kept: Bool[np.ndarray, "T C N"]
    seconds: Sequence[float]


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def draw(sheet: Sheet) -> Image.Image:
    """The picture of a sheet."""
    grid = _grid(sheet)
    parts = [
        _paragraph(sheet.title, INK, TITLE_SIZE, grid.width),
        _paragraph(sheet.subtitle, FAINT, SUBTITLE_SIZE, grid.width),
        grid,
    ]
    height = sum(part.height for part in parts)
    picture = Image.new("RGB", (grid.width + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    top = MARGIN
    for part in parts:
        picture.paste(part, (MARGIN, top))
        top += part.height
    return picture


def light_up(image: UInt8[np.ndarray, "H W 3"], kept: Bool[np.ndarray, "N"]) -> Image.Image:
    """One camera's image: dropped patches dim and pale, kept ones as they are, with an outline.

    Args:
        image: as the model saw it.
        kept: row by row, of a square of patches.
    """
    side = math.isqrt(kept.size)
    assert side**2 == kept.size, kept.shape
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3), image.shape
    whole = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)
    faded = ImageEnhance.Color(whole).enhance(COLOUR)
    dimmed = Image.blend(Image.new("RGB", whole.size, SHADE), faded, DIM)
    mask = Image.fromarray(np.uint8(255) * kept.reshape(side, side))
    mask = mask.resize(whole.size, Image.Resampling.NEAREST)
    outline = mask.filter(ImageFilter.MaxFilter(5))
    framed = Image.composite(Image.new("RGB", whole.size, LIGHT), dimmed, outline)
    return Image.composite(whole, framed, mask)


def to_png(picture: Image.Image) -> bytes:
    """The picture's file."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _grid(sheet: Sheet) -> Image.Image:
    """The cells, with the times above them, the cameras beside and how many are kept below."""
    width = ROW_HEAD + len(sheet.seconds) * (CELL + GAP) - GAP
    grid = Image.new("RGB", (width, COLUMN_HEAD + len(sheet.images) * (CELL + CAPTION)), PAPER)
    pen = ImageDraw.Draw(grid)
    for row, (camera, images) in enumerate(sheet.images.items()):
        top = COLUMN_HEAD + row * (CELL + CAPTION)
        grid.paste(_upwards(camera), (0, top))
        for column, seconds in enumerate(sheet.seconds):
            left = ROW_HEAD + column * (CELL + GAP)
            middle, kept = left + CELL // 2, sheet.kept[column, row]
            grid.paste(light_up(images[column], kept), (left, top))
            caption, below = f"{kept.sum()}/{kept.size} kept", (middle, top + CELL + 6)
            pen.text(below, caption, LIGHT, _font(CAPTION_SIZE), anchor="mt")
            if row == 0:
                pen.text((middle, top - 8), f"{seconds:.1f} s", INK, _font(LABEL_SIZE), anchor="ms")
    return grid


def _paragraph(text: str, ink: tuple[int, int, int], size: int, width: int) -> Image.Image:
    """A text, wrapped to a width, and some space below it."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(size * 1.35)
    paragraph = Image.new("RGB", (width, step * len(lines) + size // 2), PAPER)
    for place, line in enumerate(lines):
        ImageDraw.Draw(paragraph).text((0, place * step), line, ink, font)
    return paragraph


def _upwards(text: str) -> Image.Image:
    """A camera's name, to stand along the left edge of its row."""
    line = Image.new("RGB", (CELL, ROW_HEAD), PAPER)
    middle = (CELL // 2, ROW_HEAD // 2 - 4)
    ImageDraw.Draw(line).text(middle, text, INK, _font(LABEL_SIZE), anchor="mm")
    return line.transpose(Image.Transpose.ROTATE_90)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
