"""Which patches were kept, drawn over what the cameras saw: kept ones lit, the others dimmed.

Or what they were kept by: a heat map, in colours that nobody takes for one another.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from pruner_spec.config import IMAGE_SIZE

CELL = 336  # pixels of a camera's image: 21 a patch of SigLIP's 16 x 16
GAP, MARGIN = 10, 28
COLUMN_HEAD, CAPTION, ROW_HEAD = 34, 34, 40  # height, height and width of the text at a cell
TITLE_SIZE, SUBTITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 30, 20, 22, 18

PAPER, INK, FAINT = (14, 16, 24), (236, 238, 244), (150, 156, 172)
SHADE, LIGHT = (16, 20, 38), (255, 196, 64)
HEAT = np.asarray(colormaps["viridis"](np.arange(256), bytes=True))[:, :3]
HEAT_SHARE = 0.62  # of the colour in a heat map; the rest is the image, without its own
BAR_WIDTH, BAR_HEIGHT = 260, 14
DIM, COLOUR = 0.42, 0.45  # how much of a dropped patch, and of its colour, is still to be seen


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What is drawn: T frames side by side, C cameras one below the other.

    Attributes:
        title: the first line.
        subtitle: what is below it.
        images: by camera.
        kept: which patches; of a heat map, those that are outlined.
        seconds: when the frames were.
        heat: what is drawn as a heat map, with one scale for all cells; None for none.
    """

    title: str
    subtitle: str
    images: Mapping[str, UInt8[np.ndarray, "T H W 3"]]
    kept: Bool[np.ndarray, "T C N"]
    seconds: Sequence[float]
    heat: Float[np.ndarray, "T C N"] | None = None


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def draw(sheet: Sheet) -> Image.Image:
    """The picture of a sheet."""
    grid = _grid(sheet)
    parts = [
        paragraph(sheet.title, INK, TITLE_SIZE, grid.width),
        paragraph(sheet.subtitle, FAINT, SUBTITLE_SIZE, grid.width),
        grid,
    ]
    if sheet.heat is not None:
        parts.append(_colour_bar(sheet.heat.min(), sheet.heat.max(), grid.width))
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


def heat_up(
    image: UInt8[np.ndarray, "H W 3"],
    heat: Float[np.ndarray, "N"],
    outlined: Bool[np.ndarray, "N"],
) -> Image.Image:
    """One camera's image, grey, under the colours of its patches.

    Args:
        image: as the model saw it.
        heat: from 0 to 1, row by row.
        outlined: patches with a frame inside their edge.
    """
    side = math.isqrt(heat.size)
    whole = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)
    colours = Image.fromarray(HEAT[(heat * 255).astype(np.uint8)].reshape(side, side, 3))
    colours = colours.resize(whole.size, Image.Resampling.NEAREST)
    cell = Image.blend(whole.convert("L").convert("RGB"), colours, HEAT_SHARE)
    pen = ImageDraw.Draw(cell)
    edges = np.linspace(0, CELL, side + 1).round().astype(int).tolist()
    for row, column in np.argwhere(outlined.reshape(side, side)).tolist():
        corner = (edges[column], edges[row], edges[column + 1] - 1, edges[row + 1] - 1)
        pen.rectangle(corner, outline=(255, 255, 255), width=2)
    return cell


def curve(
    values: Sequence[int], place: int, top: int, size: tuple[int, int], label: str
) -> Image.Image:
    """A line over time with a mark on it.

    Args:
        values: one a frame.
        place: of the mark.
        top: of the axis, which begins at 0.
        size: width and height.
        label: of the values.
    """
    width, height = size
    left, right, upper, lower = 64, width - 16, 34, height - 26
    chart = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(chart)
    pen.text((left, 4), label, INK, font(CAPTION_SIZE))

    def at(number: int, value: float) -> tuple[float, float]:
        across = number / max(len(values) - 1, 1)
        return left + across * (right - left), lower - value / top * (lower - upper)

    for value in (0, top):
        pen.line([(left, at(0, value)[1]), (right, at(0, value)[1])], FAINT, 1)
        pen.text((left - 8, at(0, value)[1]), str(value), FAINT, font(CAPTION_SIZE), anchor="rm")
    points = [at(number, value) for number, value in enumerate(values)]
    pen.line(points, LIGHT, 3, joint="curve")
    x, y = points[place]
    pen.line([(x, upper), (x, lower)], INK, 1)
    pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=LIGHT, outline=INK, width=2)
    return chart


def round_up(value: int) -> int:
    """To 1, 2 or 5 times a power of ten: the top of an axis."""
    power = 10 ** (len(str(value)) - 1)
    return next(step * power for step in (1, 2, 5, 10) if value <= step * power)


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
    heat = sheet.heat
    if heat is not None:
        heat = (heat - heat.min()) / (np.ptp(heat) or 1.0)
    for row, (camera, images) in enumerate(sheet.images.items()):
        top = COLUMN_HEAD + row * (CELL + CAPTION)
        grid.paste(_upwards(camera), (0, top))
        for column, seconds in enumerate(sheet.seconds):
            left = ROW_HEAD + column * (CELL + GAP)
            middle, kept = left + CELL // 2, sheet.kept[column, row]
            below = (middle, top + CELL + 6)
            if heat is None:
                grid.paste(light_up(images[column], kept), (left, top))
                caption = f"{kept.sum()}/{kept.size} kept"
            else:
                grid.paste(heat_up(images[column], heat[column, row], kept), (left, top))
                caption = f"{kept.sum()}/{kept.size} voted for"
            pen.text(below, caption, LIGHT, font(CAPTION_SIZE), anchor="mt")
            if row == 0:
                pen.text((middle, top - 8), f"{seconds:.1f} s", INK, font(LABEL_SIZE), anchor="ms")
    return grid


def _colour_bar(low: float, high: float, width: int) -> Image.Image:
    """What the colours mean."""
    bar = Image.new("RGB", (width, BAR_HEIGHT + 26), PAPER)
    colours = Image.fromarray(HEAT[None]).resize((BAR_WIDTH, BAR_HEIGHT))
    left, middle = ROW_HEAD + 90, 10 + BAR_HEIGHT // 2
    bar.paste(colours, (left, 10))
    pen, face = ImageDraw.Draw(bar), font(CAPTION_SIZE)
    pen.text((left - 10, middle), f"{low:.3f}", INK, face, anchor="rm")
    label = f"{high:.3f}   highest score, over the grey image"
    pen.text((left + BAR_WIDTH + 10, middle), label, INK, face, anchor="lm")
    return bar


def paragraph(text: str, ink: tuple[int, int, int], size: int, width: int) -> Image.Image:
    """A text, wrapped to a width, and some space below it."""
    face, lines = font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(size * 1.35)
    paragraph = Image.new("RGB", (width, step * len(lines) + size // 2), PAPER)
    for place, line in enumerate(lines):
        ImageDraw.Draw(paragraph).text((0, place * step), line, ink, face)
    return paragraph


def _upwards(text: str) -> Image.Image:
    """A camera's name, to stand along the left edge of its row."""
    line = Image.new("RGB", (CELL, ROW_HEAD), PAPER)
    middle = (CELL // 2, ROW_HEAD // 2 - 4)
    ImageDraw.Draw(line).text(middle, text, INK, font(LABEL_SIZE), anchor="mm")
    return line.transpose(Image.Transpose.ROTATE_90)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The one of all text."""
    return ImageFont.load_default(size)
