"""The HTML page of a report. It needs no other file, and flagged images are blurred."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from erase_concept.eval.report.image_grid import blur, encoded, read_image
from erase_concept.eval.report.plots import HEIGHT, WIDTH, plotted, scattered, top
from erase_concept.eval.report.text import interval_text, percent, retention_text, short, title, value_text
from erase_concept.eval.report.verdict import GONE, LOST, bounds, collateral, leading, ranked

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
    pages.filters |= {"percent": percent, "value": value_text, "interval": interval_text, "retention": retention_text}
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


def _embedded(file: Path, side: int = THUMBNAIL, blurred: bool = False) -> str | None:
    """Return an image, reduced where it is large, as a data URL, so that the page needs no other file."""
    image = read_image(file)
    if image is None:
        return None
    kind = "PNG" if max(image.size) <= SMALL and not blurred else "JPEG"
    image.thumbnail((max(side, SMALL), max(side, SMALL)))
    content = encoded(blur(image) if blurred else image, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"
