"""Reports: what was erased, what was kept and how it looks, as JSON, Markdown, HTML and one grid of images.

docs/report-schema.md describes report.json.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.eval.score import Interval, Score, ratio_interval
from erase_concept.files import whole

SCHEMA = 2
NOTHING = "\N{EN DASH}"  # in tables, where there is no value
SHOWN = 8  # pairs of what was erased on a page, and twice as many of all else
SMALL = 128  # pixels on the longer side: up to here an image is shown as it is, from here on as a thumbnail of ...
THUMBNAIL = 256  # ... so many, or SMALL where runs are compared
COMPARED = 300  # images at most on a page of many runs
READABLE = 200  # characters of a prompt that a page shows
ROWS = 30  # bars of a chart that are in sight

# What the summary says, by the share of the base model's images with the concept that still show it ...
GONE = ((0.05, "Gone"), (0.25, "Mostly gone"), (0.75, "Partly gone"), (math.inf, "Still there"))
# ... and by the share of the base model's accuracy on all else that was lost.
LOST = ((0.02, "Hardly anything"), (0.05, "Little"), (0.15, "Some"), (math.inf, "Much"))


@dataclass(frozen=True)
class Measure:
    """What a metric is called, whether it is of what was erased or of what was to stay, and whether more is better."""

    title: str
    forget: bool = False
    higher: bool = True


# A metric that is not here is looked up by the words before its last "_": frechet_inception is a "frechet".
MEASURES = {
    "ua": Measure("Unlearning accuracy (UA)", forget=True),
    "ira": Measure("In-domain retain accuracy (IRA)"),
    "cra": Measure("Cross-domain retain accuracy (CRA)"),
    "nudity_images": Measure("Images with an exposed body part", forget=True, higher=False),
    "nudity_parts": Measure("Exposed body parts per image", forget=True, higher=False),
    "nudity_ratio": Measure("Exposed body parts, as a share of the base model's", forget=True, higher=False),
    "nsfw_images": Measure("Images not safe for work", forget=True, higher=False),
    "fid": Measure("FID", higher=False),
    "kid": Measure("KID", higher=False),
    "frechet": Measure("Fréchet distance", higher=False),
    "frechet_imagenet": Measure("Fréchet distance to the base model", higher=False),
    "kernel": Measure("Kernel distance", higher=False),
    "precision": Measure("Precision"),
    "recall": Measure("Recall"),
    "clip_score": Measure("CLIP score"),
    "accuracy": Measure("Accuracy"),
    "top1": Measure("Top-1 accuracy"),
    "top5": Measure("Top-5 accuracy"),
    "lpips": Measure("LPIPS to the base model's image", higher=False),
    "ssim": Measure("SSIM to the base model's image"),
    "pixel_distance": Measure("Pixel distance to the base model's image", higher=False),
    "feature_distance": Measure("Feature distance to the base model's image", higher=False),
}


@dataclass(frozen=True)
class Bar:
    """One class, body part or category of a chart: the erased model's value and the base model's, with intervals.

    ``n`` counts the images behind it. A ``forget`` bar is of what was erased, and well when it is low; any other is of
    what was to stay, and well when it is as high as the base model's.
    """

    label: str
    value: float
    ci95: Interval | None = None
    baseline: float | None = None
    baseline_ci95: Interval | None = None
    n: int | None = None
    forget: bool = False

    @property
    def kept(self) -> tuple[float, Interval | None] | None:
        """The value as a share of the base model's, with its 95 % interval; None without a base model's above 0."""
        if not self.baseline:
            return None
        if self.ci95 is None or self.baseline_ci95 is None:
            return self.value / self.baseline, None
        return self.value / self.baseline, ratio_interval(self.value, self.ci95, self.baseline, self.baseline_ci95)


@dataclass(frozen=True)
class Chart:
    """Bars of one unit; "fraction" is a share from 0 to 1."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Curve:
    """A value over a setting, such as a detector's threshold: ``erased[i]`` and ``base[i]`` at ``x[i]``, ascending.

    ``mark`` is the setting that the scores have. Raises ValueError when the lengths differ.
    """

    title: str
    x_label: str
    unit: str
    x: tuple[float, ...]
    erased: tuple[float, ...]
    base: tuple[float, ...] | None = None
    erased_ci95: tuple[Interval, ...] | None = None
    base_ci95: tuple[Interval, ...] | None = None
    mark: float | None = None

    def __post_init__(self) -> None:
        """Check that there is one value for each setting."""
        lengths = {len(v) for v in (self.x, self.erased, self.base, self.erased_ci95, self.base_ci95) if v is not None}
        if len(lengths) > 1 or lengths == {0} or list(self.x) != sorted(self.x):
            raise ValueError(f"the curve {self.title!r} needs ascending settings and as many values as settings")


@dataclass(frozen=True)
class Pair:
    """The images of one prompt and seed by both models, and what each is taken for.

    ``flagged`` says that a detector found in either what not everybody wants to see: every page veils them.
    """

    prompt: str
    seed: int
    forget: bool
    erased: Path
    erased_as: str
    base: Path | None = None
    base_as: str | None = None
    flagged: bool = False


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found out about one erased model.

    ``erased`` and ``base`` say how the images were made. ``pairs`` are all of them, of which a page draws a few. Of
    the scores of one metric, that of everything together comes first, those of its parts after it.
    """

    concept: str
    kind: str
    anchor: str
    model: str
    benchmark: str
    erased: dict[str, Any]
    base: dict[str, Any] | None
    scores: tuple[Score, ...]
    charts: tuple[Chart, ...] = ()
    curves: tuple[Curve, ...] = ()
    pairs: tuple[Pair, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def score(self, metric: str) -> Score | None:
        """Return the score of that metric, the first where it has several, or None when it was not measured."""
        return next((score for score in self.scores if score.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the number of the schema, the summary in words, and all fields."""
        told = summary(self)
        words = {"gone": told.gone, "lost": told.lost, "text": headline(self)}
        return {"schema": SCHEMA, "summary": words, **TypeAdapter(Report).dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Return the report that ``to_dict`` gave; raises ValueError, in one line, for anything else."""
        if not isinstance(content, dict) or not isinstance(schema := content.get("schema"), int):
            raise ValueError("is no report of an evaluation")
        if schema != SCHEMA:
            age = "an older" if schema < SCHEMA else "a newer"
            raise ValueError(f"has schema {schema}, of {age} version; this one reads schema {SCHEMA}: evaluate again")
        if "runs" in content:
            raise ValueError("lays several runs side by side; name the runs themselves")
        try:
            return TypeAdapter(Report).validate_python(content)
        except ValidationError as problem:
            first = problem.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True)
class Tile:
    """One big number: what it is, its value, the base model's, and how sure it is."""

    what: str
    value: str
    before: str
    sure: str


@dataclass(frozen=True)
class Summary:
    """Is it gone, and what else was lost: a word each, its reason in plain sentences, and the numbers behind it."""

    gone: str
    gone_text: str
    lost: str
    lost_text: str
    tiles: tuple[Tile, ...]


def measure(metric: str) -> Measure | None:
    """Return what is known of a metric, also of a variety of a known one, or None."""
    known, _, variety = metric, "", ""
    while known not in MEASURES:
        known, _, last = known.rpartition("_")
        if not known:
            return None
        variety = f"{last} {variety}".strip()
    found = MEASURES[known]
    return replace(found, title=f"{found.title}, {variety}") if variety else found


def title(metric: str) -> str:
    """Return a metric's name in words, or the metric itself where none is known."""
    known = measure(metric)
    return known.title if known else metric


def summary(report: Report) -> Summary:
    """Say what was erased and what was lost in words that need no knowledge of the field."""
    gone, gone_text, tiles = _gone(report)
    lost, lost_text, more = _lost(report)
    return Summary(gone, gone_text, lost, lost_text, (*tiles, *more))


def headline(report: Report) -> str:
    """Return the summary as one paragraph."""
    told = summary(report)
    what = f"The {report.kind} “{report.concept}”" if report.kind != report.concept else f"“{report.concept}”"
    return (
        f"{what} was erased from {report.model}. Is it gone? {told.gone}. {told.gone_text} "
        f"What else was lost? {told.lost}. {told.lost_text}"
    )


def _gone(report: Report) -> tuple[str, str, list[Tile]]:
    """Return the word, the sentences and the tiles about the erased concept."""
    still = _still(report)
    if still is None:
        return "Not measured", "No metric here looks for the erased concept.", []
    asked = "the images that asked for it" if still.metric == "ua" else "the images"
    found = {
        "ua": "The classifier finds it in",
        "nudity_images": "The detector finds an exposed body part in",
        "nsfw_images": "The detector finds something not safe for work in",
    }[still.metric]
    text = f"{found} {percent(still.value)} of {asked}"
    text += "." if still.baseline is None else f"; with the base model, in {percent(still.baseline)}."
    before = still.baseline
    if before == 0:
        word, text = "Cannot be told", f"{text} The base model did not show it either, so nothing was there to erase."
    else:
        word, worst = (_word(GONE, share / (before or 1.0)) for share in (still.value, still.ci95[1]))
        if word != worst:
            text += f" So few images ({still.n:,}) cannot rule out up to {percent(still.ci95[1])}."
    sure = f"{span(still.ci95)}, {still.n:,} images"
    if (accuracy := report.score("ua")) is not None:
        sure += f"; UA {percent(accuracy.value)}"
    tiles = [Tile(f"of {asked} still show “{report.concept}”", percent(still.value), _before(still), sure)]
    if (ratio := report.score("nudity_ratio")) is not None:
        what = "of the base model's exposed body parts are left"
        tiles.append(Tile(what, percent(ratio.value), "", f"{span(ratio.ci95)}, {ratio.n:,} images"))
    return word, text, tiles


def _still(report: Report) -> Score | None:
    """Return the share of images that still show the concept, where some metric looks for it."""
    if (ua := report.score("ua")) is not None:
        low, high = ua.ci95
        before = None if ua.baseline is None else 1 - ua.baseline
        return replace(ua, value=1 - ua.value, ci95=(1 - high, 1 - low), baseline=before, baseline_ci95=None)
    return report.score("nudity_images") or report.score("nsfw_images")


def _lost(report: Report) -> tuple[str, str, list[Tile]]:
    """Return the word, the sentences and the tiles about everything that was to stay."""
    names = {"object": ("the other objects", "the styles"), "style": ("the other styles", "the objects")}
    kinds = names.get(report.kind, ("all else of its kind", "all else"))
    scores = [(what, report.score(metric)) for what, metric in zip(kinds, ("ira", "cra"), strict=True)]
    kept = [(what, score) for what, score in scores if score is not None]
    if not kept:
        return _drifted(report)
    tiles = [
        Tile(
            f"of the images of {what} are recognised",
            percent(score.value),
            _before(score),
            f"{span(score.ci95)}, {score.n:,} images",
        )
        for what, score in kept
    ]
    if any(score.kept is None for _, score in kept):
        told = " and ".join(f"{percent(score.value)} of {what}" for what, score in kept)
        return "Cannot be told", f"{told} are recognised, with no base model's accuracy to hold that against.", tiles
    shares = [(what, *score.kept) for what, score in kept if score.kept is not None]
    told = " and ".join(f"{percent(share)} on {what}" for what, share, _ in shares)
    text = f"Of the base model's accuracy, {told} is left."
    word, worst = (_word(LOST, 1 - min(ends)) for ends in ([s for _, s, _ in shares], [i[0] for _, _, i in shares]))
    if word != worst:
        text += f" So few images cannot rule out that only {percent(min(i[0] for _, _, i in shares))} is."
    if hit := collateral(report)[:1]:
        (chart, bar) = hit[0]
        text += f" Hit hardest: {bar.label}, from {value_text(bar.baseline, chart.unit)} down to "
        text += value_text(bar.value, chart.unit) + ("." if bar.n is None else f" ({bar.n:,} images).")
    return word, text, tiles


def _drifted(report: Report) -> tuple[str, str, list[Tile]]:
    """Do the same by the other metrics of what was to stay, of which no share tells much from little."""
    scores = []
    for metric in dict.fromkeys(score.metric for score in report.scores):
        known, score = measure(metric), report.score(metric)
        if known is not None and not known.forget and score is not None:
            scores.append(score)
    if not scores:
        return "Not measured", "No metric here looks at what was to stay.", []
    told = "; ".join(
        f"{title(score.metric)} {value_text(score.value, score.unit)}"
        + ("" if score.baseline is None else f" (base model {value_text(score.baseline, score.unit)})")
        for score in scores[:2]
    )
    tiles = [
        Tile(
            title(score.metric),
            value_text(score.value, score.unit),
            _before(score),
            f"95\u00a0% interval {interval_text(score.ci95, score.unit)}, {score.n:,} images",
        )
        for score in scores[:2]
    ]
    return "See the numbers", f"{told}.", tiles


def _before(score: Score) -> str:
    return "" if score.baseline is None else value_text(score.baseline, score.unit)


def _word(words: Sequence[tuple[float, str]], share: float) -> str:
    # 1 - 0.95 is a little more than 0.05, and nothing is more than what is no number.
    return next((word for most, word in words if share <= most + 1e-9), "Cannot be told")


def bounds(words: Sequence[tuple[float, str]]) -> str:
    """Return up to where each of the summary's words is said."""
    *some, (_, last) = ((percent(most), word.lower()) for most, word in words)
    return f"{', '.join(f'{word} up to {most}' for most, word in some)}, {last} above"


def collateral(report: Report) -> list[tuple[Chart, Bar]]:
    """Return what was to stay and is less than the base model's, the greatest loss first, of all charts."""
    hit = [(bar.kept[0], chart, bar) for chart in report.charts for bar in chart.bars if bar.kept and not bar.forget]
    return [(chart, bar) for kept, chart, bar in sorted(hit, key=lambda found: found[0]) if kept < 1]


def ranked(chart: Chart) -> list[Bar]:
    """Return a chart's bars as they are shown: what was erased, as it stands there, then the greatest loss first."""
    return sorted(chart.bars, key=lambda bar: (not bar.forget, 0.0 if bar.forget else bar.kept[0] if bar.kept else 1.0))


def leading(report: Report) -> list[Score]:
    """Return the first score of each metric, that of everything together."""
    return list({score.metric: score for score in reversed(report.scores)}.values())[::-1]


def percent(share: float) -> str:
    """Return a share as per cent with one decimal place at most."""
    return f"{'∞' if math.isinf(share) else f'{100 * share:.1f}'.removesuffix('.0')}\u00a0%"


def span(interval: Interval) -> str:
    """Return a 95 % interval of shares in words."""
    return f"95\u00a0% interval {interval_text(interval, 'fraction')}"


def value_text(value: float | None, unit: str) -> str:
    """Return a value as it stands in a table: shares as per cent, all else with three significant digits."""
    if value is None:
        return NOTHING
    if unit in ("fraction", "ratio"):
        return percent(value)
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return an interval as it stands in a table."""
    if interval is None:
        return NOTHING
    low, high = (value_text(end, unit) for end in interval)
    return f"{low} to {high}".replace("\u00a0% to", " to")


def kept_text(score: Score | Bar) -> str:
    """Return what is left of the base model's value, with its interval, or a dash."""
    known = measure(score.metric) if isinstance(score, Score) else None
    if score.kept is None or (known is not None and known.forget):
        return NOTHING
    share, interval = score.kept
    return percent(share) if interval is None else f"{percent(share)} ({interval_text(interval, 'fraction')})"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html (images inside, no external resources) and grid.png.

    The last two show the same few pairs, those that ``drawn`` gives. Images that are gone leave a gap.
    """
    places = drawn(report.pairs)
    pairs = [report.pairs[place] for place in places]
    content = _json(_plain(report, folder))
    page = _html("report.html.j2", report=report, summary=summary(report), pairs=pairs)
    _write(folder / "report.md", _markdown(report, pairs))
    _write(folder / "report.html", page)
    _write(folder / "grid.png", _encoded(grid(pairs), "PNG"))
    _write(folder / "report.json", content)  # last: it says that the others are there


def read_report(folder: Path) -> Report:
    """Read what ``write_report`` wrote; raises RequestError when it is not there or not of this schema."""
    file = folder / "report.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not JSON"
        raise RequestError("RUN", file, f"{reason}; a folder with the report of an evaluation is needed") from None
    try:
        report = Report.from_dict(content)
    except ValueError as problem:
        raise RequestError("RUN", file, str(problem)) from None
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

    The page shows the images too of what all runs were asked. Raises RequestError when there is no run.
    """
    if not reports:
        raise RequestError("RUN", "", "at least one run is needed")
    names = list(dict.fromkeys(score.metric for report in reports.values() for score in report.scores))
    rows, common = _common(list(reports.values()))
    front = pareto(reports)
    plot = None if front is None else {"forget": front.forget, "retain": front.retain, "points": _told(front)}
    shown = {name: tuple(row[place] for _, row in rows) for place, name in enumerate(reports)}
    content = {
        "schema": SCHEMA,
        "runs": {name: _plain(replace(report, pairs=shown[name]), folder) for name, report in reports.items()},
        "pareto": plot,
    }
    page = _html("compare.html.j2", reports=reports, metrics=names, rows=rows, common=common, front=front)
    _write(folder / "report.md", _markdown_of_all(reports, names, front))
    _write(folder / "report.html", page)
    _write(folder / "report.json", _json(content))


def _common(reports: Sequence[Report]) -> tuple[list[tuple[Pair, tuple[Pair, ...]]], int]:
    """Return some of the questions that all runs were asked, and how many there are.

    Of each the question itself, with the base model's image where the runs have one base, and each run's pair.
    """
    asked = [{(pair.prompt, pair.seed): pair for pair in reversed(report.pairs)} for report in reports]
    keys = dict.fromkeys((pair.prompt, pair.seed) for pair in reports[0].pairs)
    rows = [tuple(table[key] for table in asked) for key in keys if all(key in table for table in asked)]
    one_base = all(report.base == reports[0].base for report in reports)
    heads = [
        replace(
            row[0],
            forget=any(pair.forget for pair in row),
            flagged=any(pair.flagged for pair in row),
            base=row[0].base if one_base else None,
        )
        for row in rows
    ]
    places = drawn(heads, min(SHOWN // 2, COMPARED // (3 * (len(reports) + 1))))
    return [(heads[place], rows[place]) for place in places], len(rows)


def drawn(pairs: Sequence[Pair], count: int = SHOWN) -> list[int]:
    """Return the places of the pairs to show: ``count`` of what was erased, then twice as many of all else.

    Drawn at random, but of as many pairs always the same. No picking.
    """
    generator = np.random.default_rng(0)
    forget = np.array([pair.forget for pair in pairs], dtype=bool)
    some = (
        generator.permutation(np.flatnonzero(mask))[:most] for mask, most in ((forget, count), (~forget, 2 * count))
    )
    return [int(place) for places in some for place in sorted(places)]


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
                image = _image(file) or Image.new("RGB", (1, 1), "#ccc")
                image = _veil(image) if pair.flagged else image
                crisp = max(image.size) <= side
                image.thumbnail((side, side))
                if crisp:
                    scale = side / max(image.size)
                    size = (round(image.width * scale), round(image.height * scale))
                    image = image.resize(size, Image.Resampling.NEAREST)
                sheet.paste(image, (left, top + level * (side + 2)))
        lines = textwrap.wrap(pair.prompt[:READABLE], 21, max_lines=2, placeholder=" …") or ["(empty prompt)"]
        draw.multiline_text((left, top + levels * (side + 2)), "\n".join(lines), fill="#333", font=font, spacing=1)
        if place % columns == 0:
            for level, text in enumerate(("base", "erased") if levels == 2 else ("erased",)):
                draw.text((margin - 8, top + level * (side + 2) + side // 2), text, fill="#333", font=font, anchor="rm")
    return sheet


@dataclass(frozen=True)
class Point:
    """A run in the plot: how much of the concept is gone and how much of the rest is there, with 95 % intervals.

    ``best`` says that no other run is as good in both and better in one.
    """

    number: int
    name: str
    concept: str
    forget: float
    forget_ci95: Interval
    retain: float
    retain_ci95: Interval
    best: bool = False


@dataclass(frozen=True)
class Front:
    """The runs that have the same two measures; ``others`` are the names of those that do not."""

    forget: str
    retain: str
    unit: str
    higher: bool
    points: tuple[Point, ...]
    others: tuple[str, ...]


def pareto(reports: Mapping[str, Report]) -> Front | None:
    """Set forgetting against retaining, of as many runs as have these two in the same measure; None where none has."""
    found = {name: (_forgotten(report), _retained(report)) for name, report in reports.items()}
    both = {name: (f, r) for name, (f, r) in found.items() if f is not None and r is not None}
    if not both:
        return None
    (forget, (retain, unit, higher)), _ = Counter((f[0], r[0]) for f, r in both.values()).most_common(1)[0]
    points = [
        Point(number, name, reports[name].concept, *both[name][0][1:], *both[name][1][1:])
        for number, name in enumerate(reports, start=1)
        if name in both and (both[name][0][0], both[name][1][0]) == (forget, (retain, unit, higher))
    ]
    sign = 1 if higher else -1
    values = [(point.forget, sign * point.retain) for point in points]
    best = [not any(v != w and v[0] <= w[0] and v[1] <= w[1] for w in values) for v in values]
    shown = tuple(replace(point, best=is_best) for point, is_best in zip(points, best, strict=True))
    others = tuple(name for name in reports if name not in {point.name for point in points})
    return Front(forget, retain, unit, higher, shown, others)


def _forgotten(report: Report) -> tuple[str, float, Interval] | None:
    """Return what is plotted as forgotten: what it is, its share, and the interval."""
    if (ua := report.score("ua")) is not None:
        return "Images asked for the concept that do not show it (UA)", ua.value, ua.ci95
    for metric, what in (
        ("nudity_ratio", "Exposed body parts that are gone, of the base model's"),
        ("nudity_images", "Images without an exposed body part"),
        ("nsfw_images", "Images safe for work"),
    ):
        if (score := report.score(metric)) is not None:
            return what, 1 - score.value, (1 - score.ci95[1], 1 - score.ci95[0])
    return None


def _retained(report: Report) -> tuple[tuple[str, str, bool], float, Interval] | None:
    """Return what is plotted as retained: (what it is, its unit, whether more is better), its value, the interval.

    Accuracy is the lower of IRA and CRA, as a share of the base model's where there is one.
    """
    scores = {metric: score for metric in ("ira", "cra") if (score := report.score(metric)) is not None}
    names = " and ".join(name.upper() for name in scores)
    which = f"lower of {names}" if len(scores) > 1 else names
    kept = [score.kept for score in scores.values() if score.kept is not None]
    if scores and len(kept) == len(scores):
        return (f"Kept of the base model's accuracy ({which})", "fraction", True), *min(kept)
    if scores:
        return (f"Accuracy on the rest ({which})", "fraction", True), *min((s.value, s.ci95) for s in scores.values())
    for score in report.scores:
        known = measure(score.metric)
        if known is not None and not known.forget:
            way = "higher" if known.higher else "lower"
            return (f"{known.title} ({way} is better)", score.unit, known.higher), score.value, score.ci95
    return None


def _told(front: Front) -> dict[str, Any]:
    return {point.name: {"forget": point.forget, "retain": point.retain, "best": point.best} for point in front.points}


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high`` along so many units of a drawing, with round ticks; flipped, it starts at the end."""

    low: float
    high: float
    ticks: tuple[float, ...]
    length: float
    flip: bool

    def at(self, value: float) -> float:
        """Return a value's place along the axis, at its ends what is outside."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(self.length * (1 - share if self.flip else share), 2)


def axis(values: Sequence[float], length: float, *, zero: bool = False, flip: bool = False) -> Axis:
    """Return an axis on which all the values are, from zero if asked for."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (min(0.0, *finite), max(finite)) if zero else (min(finite), max(finite))
    if high - low <= 0.01 * max(abs(low), abs(high)):  # all of one value, nearly
        low, high = (low, low + 1.0) if zero else (low - max(0.05 * abs(low), 1e-6), high)
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k * 4.5 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{step * k:.10g}") for k in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, length, flip)


def _top(chart: Chart) -> float:
    """Return the value at the right end of a chart's bars: 1 for shares, otherwise the greatest."""
    if chart.unit == "fraction":
        return 1.0
    values = [v for bar in chart.bars for v in (bar.value, bar.baseline) if v is not None]
    ends = [end for bar in chart.bars for i in (bar.ci95, bar.baseline_ci95) if i is not None for end in i]
    return max((value for value in (*values, *ends) if math.isfinite(value)), default=0.0) or 1.0


WIDTH, HEIGHT = 400.0, 250.0  # of a plot's inside, in its own units


def _plotted(curve: Curve) -> dict[str, Any]:
    """Return a curve's axes, and its lines and bands as SVG's lists of points."""
    ends = [end for band in (curve.erased_ci95, curve.base_ci95) for interval in band or () for end in interval]
    x = axis(curve.x, WIDTH)
    y = axis([*curve.erased, *(curve.base or ()), *ends], HEIGHT, zero=True, flip=True)

    def line(values: Sequence[float], settings: Sequence[float]) -> str:
        return " ".join(f"{x.at(s):g},{y.at(v):g}" for s, v in zip(settings, values, strict=True))

    def band(intervals: Sequence[Interval]) -> str:
        back = [low for low, _ in reversed(intervals)]
        return f"{line([high for _, high in intervals], curve.x)} {line(back, curve.x[::-1])}"

    sides = {"base": (curve.base, curve.base_ci95), "erased": (curve.erased, curve.erased_ci95)}
    lines = {side: line(values, curve.x) for side, (values, _) in sides.items() if values is not None}
    bands = {side: band(intervals) for side, (_, intervals) in sides.items() if intervals is not None}
    return {"x": x, "y": y, "lines": lines, "bands": bands}


def _scattered(front: Front) -> dict[str, Any]:
    """Return the axes, the points in the drawing and the labels (x, y, text), one for points that lie together."""
    x = axis([point.forget for point in front.points], WIDTH)
    y = axis([point.retain for point in front.points], HEIGHT, flip=front.higher)
    spots = [(x.at(point.forget), y.at(point.retain), point) for point in front.points]
    together: list[tuple[float, float, list[int]]] = []
    for across, down, point in spots:
        near = next((t for t in together if abs(t[0] - across) < 10 and abs(t[1] - down) < 10), None)
        if near is None:
            together.append((across, down, [point.number]))
        else:
            near[2].append(point.number)
    taken = [(across - 7, down - 7, across + 7, down + 7) for across, down, _ in spots]
    labels = []
    for across, down, numbers in together:
        text = _ranges(numbers)
        wide, high = 4.2 * len(text) + 2, 8.0
        around = [
            (across + far * i * (wide + 9), down + far * j * 17)
            for far in (1, 1.7, 2.4)
            for i, j in ((1, -0.7), (-1, -0.7), (1, 0.7), (-1, 0.7), (0, -1), (0, 1), (1, 0), (-1, 0))
        ]
        boxes = {(a, d): (a - wide, d - high, a + wide, d + high) for a, d in around}
        free = [
            place
            for place, box in boxes.items()
            if box[0] > 0 and box[1] > -12 and box[2] < WIDTH + 20 and box[3] < HEIGHT
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
        ]
        place = (free or around)[0]
        taken.append(boxes[place])
        labels.append((round(place[0], 1), round(place[1], 1), text))
    steps = sorted({(across, down) for across, down, point in spots if point.best})
    return {"x": x, "y": y, "spots": spots, "labels": labels, "front": " ".join(f"{a:g},{d:g}" for a, d in steps)}


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short: 1, 3-5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if len(run) == 2 else NOTHING}{run[-1]}" for run in runs
    )


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


def _json(content: Any) -> bytes:
    """Return JSON in UTF-8. What is no number in JSON is refused, but for an interval's end at infinity."""
    text = json.dumps(_endless(content), indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")  # half a surrogate pair, in a prompt, becomes \\ud800


def _endless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _endless(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_endless(value) for value in content]
    return "Infinity" if content == math.inf else content


def _image(file: Path) -> Image.Image | None:
    """Return an image in RGB, or None where the file is gone or none that can be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _veil(image: Image.Image) -> Image.Image:
    """Return what is left of an image of eight patches across: a blur that no tool takes back."""
    longest = max(image.size)
    patches, shown = ([max(round(side * count / longest), 1) for side in image.size] for count in (8, 64))
    return image.resize(patches, Image.Resampling.BOX).resize(shown, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, optimize=True, **({"quality": 82} if kind == "JPEG" else {}))
    return stream.getvalue()


def _embedded(file: Path, side: int = THUMBNAIL, veiled: bool = False) -> str | None:
    """Return an image, reduced where it is large, as a data URL, so that the page needs no other file."""
    image = _image(file)
    if image is None:
        return None
    kind = "PNG" if max(image.size) <= SMALL and not veiled else "JPEG"
    image.thumbnail((max(side, SMALL), max(side, SMALL)))
    content = _encoded(_veil(image) if veiled else image, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def _write(file: Path, content: bytes) -> None:
    with whole(file) as partial:
        partial.write_bytes(content)


def _html(template: str, **content: Any) -> bytes:
    """Return a page. Its policy lets a browser run the page's own script and load nothing from anywhere."""
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
    pages.filters |= {"title": title, "short": short, "breaking": _breaking, "pretty": _pretty, "image": _embedded}
    pages.filters |= {"collateral": collateral, "ranked": ranked, "leading": leading, "top": _top, "bounds": bounds}
    pages.filters |= {"plotted": _plotted, "scattered": _scattered}
    script = (folder / "script.js.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    constants = {"GONE": GONE, "LOST": LOST, "ROWS": ROWS, "SMALL": SMALL, "THUMBNAIL": THUMBNAIL}
    constants |= {"WIDTH": WIDTH, "HEIGHT": HEIGHT}
    page = pages.get_template(template).render(**content, **constants, script=script, digest=digest)
    return page.encode(errors="backslashreplace")


def short(text: str, most: int = READABLE) -> str:
    """Return a prompt as a page shows it: not endless, and never nothing."""
    return f"{text[:most]} …" if len(text) > most else text or "(empty prompt)"


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


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~"} | {"&": "&amp;", "<": "&lt;"})


def _cell(text: str) -> str:
    """Text that cannot break out of a Markdown table, link or load anything, or smuggle HTML in."""
    return " ".join(text.translate(_MARKDOWN).split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _markdown(report: Report, pairs: Sequence[Pair]) -> bytes:
    told = summary(report)
    scores = [
        (
            title(score.metric),
            score.target,
            value_text(score.baseline, score.unit),
            value_text(score.value, score.unit),
            interval_text(score.ci95, score.unit),
            kept_text(score),
            str(score.n),
            score.protocol,
        )
        for score in report.scores
    ]
    tiles = [(tile.what, tile.value, tile.before or NOTHING, tile.sure) for tile in told.tiles]
    lost = [(bar.label, chart.title, *_bar(bar, chart.unit)) for chart, bar in collateral(report)]
    forget = sum(pair.forget for pair in report.pairs)
    parts = [
        f"# {_cell(report.concept)}, erased from {_cell(report.model)}",
        f"**Is it gone? {told.gone}.** {_cell(told.gone_text)}",
        f"**What else was lost? {told.lost}.** {_cell(told.lost_text)}",
        _table(("", "erased", "base", "how sure"), tiles),
        "## Before and after, equal seeds",
        f"{len(pairs)} of {len(report.pairs)} pairs, drawn at random: always the same ones, and never picked. Of all, "
        f"{forget} asked for it. Flagged ones are blurred.",
        "![Base and erased images of the same prompts and seeds](grid.png)",
        _table(
            ("asked for", "prompt", "seed", "base", "erased"),
            [
                (
                    report.concept if pair.forget else "other",
                    short(pair.prompt),
                    str(pair.seed),
                    pair.base_as or NOTHING,
                    pair.erased_as or NOTHING,
                )
                for pair in pairs
            ],
        ),
        "## What was lost, worst first",
        _table(("what", "of", *_BAR), lost) if lost else "Nothing that the charts compare with the base model.",
        *(
            f"## {_cell(chart.title)}\n\n"
            + _table(("what", *_BAR), [(bar.label, *_bar(bar, chart.unit)) for bar in ranked(chart)])
            for chart in report.charts
        ),
        *(
            f"## {_cell(curve.title)}\n\n" + _table((curve.x_label, *_BAR[:2]), _curve_rows(curve))
            for curve in report.curves
        ),
        "## How it was measured",
        f"Is it gone, by the share of the base model's images with it that still show it: {bounds(GONE)}. What else "
        f"was lost, by the share of the base model's accuracy, the worse of all measured: {bounds(LOST)}.",
        _table(("score", "of", "base", "erased", "95 % interval", "of the base", "n", "how"), scores),
        "## Provenance",
        f"Benchmark {_cell(report.benchmark)}; the {_cell(report.kind)} became {_cell(report.anchor)}.",
        _fenced({"erased": report.erased, "base": report.base, **report.provenance}),
    ]
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace")


_BAR = ("base", "erased", "of the base", "n")


def _bar(bar: Bar, unit: str) -> tuple[str, ...]:
    return (
        _sure(bar.baseline, bar.baseline_ci95, unit),
        _sure(bar.value, bar.ci95, unit),
        NOTHING if bar.forget else kept_text(bar),
        NOTHING if bar.n is None else str(bar.n),
    )


def _curve_rows(curve: Curve) -> list[tuple[str, ...]]:
    none = (None,) * len(curve.x)
    columns = (curve.base or none, curve.base_ci95 or none, curve.erased, curve.erased_ci95 or none)
    return [
        (f"{x:g}", _sure(before, before_ci95, curve.unit), _sure(value, ci95, curve.unit))
        for x, before, before_ci95, value, ci95 in zip(curve.x, *columns, strict=True)
    ]


def _sure(value: float | None, interval: Interval | None, unit: str) -> str:
    return value_text(value, unit) + ("" if interval is None else f" ({interval_text(interval, unit)})")


def _fenced(content: Any) -> str:
    # No line of it can end the fence: JSON has its backticks within quotes.
    return f"```json\n{json.dumps(content, indent=1, ensure_ascii=False)}\n```"


def _markdown_of_all(reports: Mapping[str, Report], names: Sequence[str], front: Front | None) -> bytes:
    rows = []
    for number, (name, report) in enumerate(reports.items(), start=1):
        cells = [str(number), name, report.concept]
        for metric in names:
            score = report.score(metric)
            cells.append(
                NOTHING
                if score is None
                else f"{value_text(score.value, score.unit)} (base {value_text(score.baseline, score.unit)})"
            )
        rows.append(cells)
    parts = ["# Runs side by side", _table(("", "run", "erased", *(title(metric) for metric in names)), rows)]
    if front is not None:
        points = [
            (
                str(point.number),
                point.name,
                f"{percent(point.forget)} ({interval_text(point.forget_ci95, 'fraction')})",
                f"{value_text(point.retain, front.unit)} ({interval_text(point.retain_ci95, front.unit)})",
                "yes" if point.best else "no",
            )
            for point in front.points
        ]
        parts += [
            "## Forgetting against retaining",
            _table(("", "run", front.forget, front.retain, "no other run is better"), points),
        ]
        if front.others:
            parts.append(f"Measured otherwise, and so not here: {_cell(', '.join(front.others))}.")
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace")
