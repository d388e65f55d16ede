"""Reports: what was erased, what was kept and how it looks, as JSON, Markdown, HTML and one grid of images."""

from __future__ import annotations

import base64
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.eval.score import Interval, Score
from erase_concept.files import whole

SCHEMA = 1
NOTHING = "\N{EN DASH}"  # in tables, where there is no value
TITLES = {
    "ua": "Unlearning accuracy (UA)",
    "ira": "In-domain retain accuracy (IRA)",
    "cra": "Cross-domain retain accuracy (CRA)",
    "frechet": "Fréchet distance",
    "frechet_imagenet": "Fréchet distance to the base model",
}


@dataclass(frozen=True)
class Found:
    """How often the classifier found one label: (correct, asked for) with the erased model, and with the base."""

    erased: tuple[int, int]
    base: tuple[int, int] | None = None


@dataclass(frozen=True)
class Pair:
    """The images of one prompt and seed by both models, and what the classifier takes each for."""

    prompt: str
    seed: int
    forget: bool
    erased: Path
    erased_as: str
    base: Path | None = None
    base_as: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found out about one erased model.

    ``concepts`` maps "object" and "style" to each label's counts. ``erased`` and ``base`` say how the images were
    made; ``pairs`` are some of them, the forget rows first.
    """

    concept: str
    kind: str
    anchor: str
    model: str
    benchmark: str
    erased: dict[str, Any]
    base: dict[str, Any] | None
    scores: tuple[Score, ...]
    concepts: dict[str, dict[str, Found]]
    pairs: tuple[Pair, ...]
    provenance: dict[str, Any]

    def score(self, metric: str) -> Score | None:
        """Return the score of that metric, or None when it was not measured."""
        return next((score for score in self.scores if score.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, with the number of the schema first."""
        return {"schema": SCHEMA, **TypeAdapter(Report).dump_python(self, mode="json")}


def headline(report: Report) -> str:
    """Return what was erased, how surely, and what was kept, in sentences that need no knowledge of the field."""
    sentences = [f"The {report.kind} “{report.concept}” was erased from {report.model}."]
    if ua := report.score("ua"):
        before = "" if ua.baseline is None else f"; before it was {percent(ua.baseline)}"
        sentences.append(
            f"In {percent(ua.value)} of {ua.n} images asked for it, the classifier no longer finds it "
            f"({span(ua.ci95)}{before})."
        )
    other = {"object": ("the other objects", "the styles"), "style": ("the other styles", "the objects")}
    kept = []
    for metric, what in zip(("ira", "cra"), other.get(report.kind, ("the same kind", "the other kind")), strict=True):
        if (score := report.score(metric)) is not None:
            share, interval = score.kept or (score.value, score.ci95)
            of_base = " of the base model's accuracy" if score.kept else " accuracy"
            kept.append(f"{percent(share)}{of_base} on {what} ({span(interval)}, {score.n} images)")
    if kept:
        sentences.append(f"What was kept: {' and '.join(kept)}.")
    return " ".join(sentences)


def percent(share: float) -> str:
    """Return a share as per cent with one decimal place at most."""
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"


def span(interval: Interval) -> str:
    """Return a 95 % interval of shares in words."""
    low, high = (f"{100 * end:.1f}".removesuffix(".0") for end in interval)
    return f"95\u00a0% interval {low} to {high}"


def value_text(value: float | None, unit: str) -> str:
    """Return a value as it stands in a table: shares as per cent, all else with three significant digits."""
    if value is None:
        return NOTHING
    return percent(value) if unit == "fraction" else f"{value:.3g}"


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return an interval as it stands in a table."""
    return NOTHING if interval is None else " to ".join(value_text(end, unit) for end in interval)


def kept_text(score: Score) -> str:
    """Return what is left of the base model's share, with its interval, or a dash."""
    if score.kept is None or score.metric == "ua":
        return NOTHING
    share, interval = score.kept
    return f"{percent(share)} ({interval_text(interval, 'fraction')})"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html (images inside, no external resources) and grid.png."""
    content = _json(_plain(report, folder))
    _write(folder / "report.md", _markdown(report).encode())
    _write(folder / "report.html", _html("report.html.j2", report=report, headline=headline(report)))
    _write(folder / "grid.png", _png(grid(report.pairs)))
    _write(folder / "report.json", content)  # last: it says that the others are there


def read_report(folder: Path) -> Report:
    """Read what ``write_report`` wrote; raises RequestError when it is not there or not of this schema."""
    file = folder / "report.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not JSON"
        raise RequestError("RUN", file, f"{reason}; a folder with the report of an evaluation is needed") from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise RequestError("RUN", file, f"is no report of one run with schema {SCHEMA}")
    try:
        report = TypeAdapter(Report).validate_python(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise RequestError("RUN", file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return replace(
        report,
        pairs=tuple(
            replace(
                pair, erased=_back(folder, pair.erased), base=None if pair.base is None else _back(folder, pair.base)
            )
            for pair in report.pairs
        ),
    )


def compare(reports: Mapping[str, Report], folder: Path) -> None:
    """Write report.json, report.md and report.html of several named runs side by side.

    The page shows the images too when all runs were asked the same. Raises RequestError when there is no run.
    """
    if not reports:
        raise RequestError("RUN", "", "at least one run is needed")
    runs = {name: _plain(report, folder) for name, report in reports.items()}
    names = list(dict.fromkeys(score.metric for report in reports.values() for score in report.scores))
    questions = {tuple((pair.prompt, pair.seed) for pair in report.pairs) for report in reports.values()}
    rows = list(zip(*(report.pairs for report in reports.values()), strict=True)) if len(questions) == 1 else []
    _write(folder / "report.json", _json({"schema": SCHEMA, "runs": runs}))
    _write(folder / "report.md", _markdown_of_all(reports, names).encode())
    _write(folder / "report.html", _html("compare.html.j2", reports=reports, metrics=names, rows=rows))


def grid(pairs: Sequence[Pair], *, side: int = 128, columns: int = 8) -> Image.Image:
    """Draw the pairs, base above erased, with the prompt under each; without base images, the erased ones alone."""
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
                with Image.open(file) as image:
                    crisp = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(crisp, (left, top + level * (side + 2)))
        lines = textwrap.wrap(pair.prompt, 21, max_lines=2, placeholder=" …") or ["(empty prompt)"]
        draw.multiline_text((left, top + levels * (side + 2)), "\n".join(lines), fill="#333", font=font, spacing=1)
        if place % columns == 0:
            for level, text in enumerate(("base", "erased") if levels == 2 else ("erased",)):
                draw.text((margin - 8, top + level * (side + 2) + side // 2), text, fill="#333", font=font, anchor="rm")
    return sheet


def _plain(report: Report, folder: Path) -> dict[str, Any]:
    """Return the report as JSON holds it, its images' paths relative to the folder it is written to."""
    plain = report.to_dict()
    for pair in plain["pairs"]:
        for side in ("erased", "base"):
            if pair[side] is not None:
                pair[side] = _away(folder, Path(pair[side]))
    return plain


def _away(folder: Path, file: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on Windows there is no way from one drive to another
        return file.resolve().as_posix()


def _back(folder: Path, file: Path) -> Path:
    return Path(os.path.normpath(folder / file))


def _title(metric: str) -> str:
    return TITLES.get(metric, metric)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _write(file: Path, content: bytes) -> None:
    with whole(file) as partial:
        partial.write_bytes(content)


def _html(template: str, **content: Any) -> bytes:
    import jinja2

    folder = Path(__file__).parent
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {"percent": percent, "value": value_text, "interval": interval_text, "kept": kept_text}
    pages.filters |= {"title": _title, "image": _embedded, "pretty": _pretty}
    return pages.get_template(template).render(**content).encode()


def _embedded(file: Path) -> str:
    """Return the image as a data URL, so that the page needs no other file."""
    with Image.open(file) as image:
        content = _png(image.convert("RGB"))
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text that cannot break out of a Markdown table or smuggle HTML in."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _markdown(report: Report) -> str:
    scores = [
        (
            _title(score.metric),
            value_text(score.baseline, score.unit),
            value_text(score.value, score.unit),
            interval_text(score.ci95, score.unit),
            kept_text(score),
            str(score.n),
            score.protocol,
        )
        for score in report.scores
    ]
    found = [
        (
            f"{kind} {label}",
            NOTHING if counts.base is None else "{} of {}".format(*counts.base),
            "{} of {}".format(*counts.erased),
        )
        for kind, labels in report.concepts.items()
        for label, counts in labels.items()
    ]
    parts = [
        f"# {_cell(report.concept)}, erased from {_cell(report.model)}",
        _cell(headline(report)),
        "## Scores",
        _table(("score", "base", "erased", "95 % interval", "of the base", "n", "how"), scores),
        "## Before and after, equal seeds",
        "![Base and erased images of the same prompts and seeds](grid.png)",
        "## Each concept: how often it is recognised",
        _table(("concept", "base", "erased"), found),
        "## Provenance",
        _table(("what", "value"), [(name, _pretty(value)) for name, value in report.provenance.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_of_all(reports: Mapping[str, Report], names: Sequence[str]) -> str:
    rows = []
    for name, report in reports.items():
        cells = [name, report.concept]
        for metric in names:
            score = report.score(metric)
            cells.append(
                NOTHING
                if score is None
                else f"{value_text(score.value, score.unit)} (base {value_text(score.baseline, score.unit)})"
            )
        rows.append(cells)
    header = ("run", "erased", *(_title(metric) for metric in names))
    return "\n\n".join(["# Runs side by side", _table(header, rows)]) + "\n"
