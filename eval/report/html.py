"""The page of a report, which needs no other file, and the grid of its images; flagged images are veiled."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from erase_concept.eval.report.plots import HEIGHT, WIDTH, plotted, scattered, top
from erase_concept.eval.report.report import Pair
from erase_concept.eval.report.verdict import (
    GONE,
    LOST,
    READABLE,
    bounds,
    collateral,
    interval_text,
    kept_text,
    leading,
    percent,
    ranked,
    short,
    title,
    value_text,
)

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 128  # pixels on the longer side: up to here an image is shown as it is, from here on as a thumbnail of ...
THUMBNAIL = 256  # ... so many, or SMALL where runs are compared
ROWS = 30  # bars of a chart that are in sight


def render(template: str, **content: Any) -> bytes:
    """Return a page or a drawing. A page's policy lets a browser run its own script and load nothing from anywhere."""
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {"percent": percent, "value": value_text, "interval": interval_text, "kept": kept_text}
    pages.filters |= {"title": title, "short": short, "breaking": _breaking, "pretty": _pretty, "image": _embedded}
    pages.filters |= {"collateral": collateral, "ranked": ranked, "leading": leading, "top": top, "bounds": bounds}
    pages.filters |= {"plotted": plotted, "scattered": scattered}
    script = (TEMPLATES / "script.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    constants = {"GONE": GONE, "LOST": LOST, "ROWS": ROWS, "SMALL": SMALL, "THUMBNAIL": THUMBNAIL}
    constants |= {"WIDTH": WIDTH, "HEIGHT": HEIGHT}
    page = pages.get_template(template).render(**content, **constants, script=script, digest=digest)
    return page.encode(errors="backslashreplace")


def _breaking(name: str) -> Any:
    """Return a name for HTML that may break where its words do."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(name))))  # noqa: S704  # what is not ours is escaped


def _pretty(value: Any) -> str:
    """Return a value as text that a person reads: lists and small mappings stay on one line."""
    import yaml

    if not isinstance(value, dict | list | tuple):
        return str(value)
    plain = json.loads(json.dumps(value))  # no tuples, of which YAML makes a tag
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100).rstrip()


def _embedded(file: Path, side: int = THUMBNAIL, veiled: bool = False) -> str | None:
    """Return an image, reduced where it is large, as a data URL, so that the page needs no other file."""
    image = _image(file)
    if image is None:
        return None
    kind = "PNG" if max(image.size) <= SMALL and not veiled else "JPEG"
    image.thumbnail((max(side, SMALL), max(side, SMALL)))
    content = encoded(veil(image) if veiled else image, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def _image(file: Path) -> Image.Image | None:
    """Return an image in RGB, or None where the file is gone or none that can be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def veil(image: Image.Image) -> Image.Image:
    """Return what is left of an image of eight patches across: a blur that no tool takes back."""
    longest = max(image.size)
    patches, shown = ([max(round(side * count / longest), 1) for side in image.size] for count in (8, 64))
    return image.resize(patches, Image.Resampling.BOX).resize(shown, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, *, optimize: bool = True) -> bytes:
    """Return an image as the bytes of a file, "PNG" or "JPEG"; what is not optimized is quicker and a little larger."""
    stream = io.BytesIO()
    image.save(stream, format=kind, optimize=optimize, **({"quality": 82} if kind == "JPEG" else {}))
    return stream.getvalue()


def grid(pairs: Sequence[Pair], *, side: int = 128, columns: int = 8) -> Image.Image:
    """Draw the pairs, base above erased, with the prompt under each; without base images, the erased ones alone.

    Flagged pairs are veiled. An image that is gone leaves a grey square.
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

    ``rows`` are each model's pairs, of equal prompts in equal order. Flagged pairs are veiled. Raises ValueError when
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
    image = _image(file) or Image.new("RGB", (1, 1), "#ccc")
    image = veil(image) if flagged else image
    crisp = max(image.size) <= side
    image.thumbnail((side, side))
    if not crisp:
        return image
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)


def _caption(prompt: str, width: int, lines: int = 2) -> str:
    told = textwrap.wrap(prompt[:READABLE], width, max_lines=lines, placeholder=" …")
    return "\n".join(told) or "(empty prompt)"
