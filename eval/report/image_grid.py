"""Images for a report: blurred where flagged, as bytes of a file, and as one grid or sheet of many."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Pair
from erase_concept.eval.report.text import READABLE
from erase_concept.pipelines.pictures import read_picture


def read_image(file: Path) -> Image.Image | None:
    """Return an image in RGB, or None where the file is gone or none that can be read."""
    try:
        return read_picture(file)
    except RequestError:
        return None


def blur(image: Image.Image) -> Image.Image:
    """Return an image blurred to eight patches across. No tool can undo that."""
    longest = max(image.size)
    patches, shown = ([max(round(side * count / longest), 1) for side in image.size] for count in (8, 64))
    return image.resize(patches, Image.Resampling.BOX).resize(shown, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, *, optimize: bool = True) -> bytes:
    """Return an image as the bytes of a file, "PNG" or "JPEG"; unoptimized is quicker and a little larger."""
    stream = io.BytesIO()
    image.save(stream, format=kind, optimize=optimize, **({"quality": 82} if kind == "JPEG" else {}))
    return stream.getvalue()


def grid(pairs: Sequence[Pair], *, side: int = 128, columns: int = 8) -> Image.Image:
    """Draw the pairs, base above erased, with the prompt under each; without base images, the erased ones alone.

    Flagged pairs are blurred. An image that is gone leaves a grey square.
    """
    font, margin, caption = ImageFont.load_default(12), 58, 34
    levels = 2 if any(pair.base for pair in pairs) else 1
    rows = -(-max(len(pairs), 1) // columns)
    height = levels * (side + 2) + caption
    sheet = Image.new("RGB", (margin + columns * (side + 6), rows * height + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, pair in enumerate(pairs):
        left, top = margin + place % columns * (side + 6), place // columns * height + 6
        for level, file in enumerate((pair.base, pair.erased) if levels == 2 else (pair.erased,)):
            if file is not None:
                sheet.paste(_fitted(file, side, flagged=pair.flagged), (left, top + level * (side + 2)))
        place_below = (left, top + levels * (side + 2))
        draw.multiline_text(place_below, _caption(pair.prompt, 21), fill="#333", font=font, spacing=1)
        if place % columns == 0:
            for level, text in enumerate(("base", "erased") if levels == 2 else ("erased",)):
                draw.text((margin - 8, top + level * (side + 2) + side // 2), text, fill="#333", font=font, anchor="rm")
    return sheet


def sample_sheet(rows: Mapping[str, Sequence[Pair]], *, side: int = 96) -> Image.Image:
    """Draw several models' images of the same prompts and seeds below each other, the base model's on top.

    ``rows`` are each model's pairs, of equal prompts in equal order. Flagged pairs are blurred. Raises ValueError when
    the prompts or seeds differ, or there is no row.
    """
    asked = [(pair.prompt, pair.seed) for pair in next(iter(rows.values()), ())]
    if not asked or any([(pair.prompt, pair.seed) for pair in row] != asked for row in rows.values()):
        raise ValueError("the rows of a sheet need the same prompts and seeds, and at least one")
    shown = {"base": [pair.base for pair in next(iter(rows.values()))]}
    shown |= {name: [pair.erased for pair in row] for name, row in rows.items()}
    font, step = ImageFont.load_default(12), side + 4
    margin = 16 + round(max(font.getlength(name) for name in shown))
    sheet = Image.new("RGB", (margin + len(asked) * step, len(shown) * step + 54), "white")
    draw = ImageDraw.Draw(sheet)
    flagged = [any(row[column].flagged for row in rows.values()) for column in range(len(asked))]
    for level, (name, files) in enumerate(shown.items()):
        draw.text((margin - 8, level * step + step // 2), name, fill="#333", font=font, anchor="rm")
        for column, file in enumerate(files):
            if file is not None:
                sheet.paste(_fitted(file, side, flagged=flagged[column]), (margin + column * step, level * step + 4))
    for column, (prompt, _) in enumerate(asked):
        place = (margin + column * step, len(shown) * step + 4)
        draw.multiline_text(place, _caption(prompt, 15, lines=3), fill="#333", font=font, spacing=1)
    return sheet


def _fitted(file: Path, side: int, *, flagged: bool) -> Image.Image:
    """Read an image so that its longer side is ``side`` pixels, a small one in squares; a grey one where it is gone."""
    image = read_image(file) or Image.new("RGB", (1, 1), "#ccc")
    image = blur(image) if flagged else image
    crisp = max(image.size) <= side
    image.thumbnail((side, side))
    if not crisp:
        return image
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)


def _caption(prompt: str, width: int, lines: int = 2) -> str:
    wrapped = textwrap.wrap(prompt[:READABLE], width, max_lines=lines, placeholder=" …")
    return "\n".join(wrapped) or "(empty prompt)"
