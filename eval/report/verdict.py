"""What a report says in words: whether the concept is gone, and what else was lost.

Which metrics it cites, and in which words, is in the metrics' records: those that have a ``finding``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from erase_concept.eval.metrics import metric_record
from erase_concept.eval.metrics.metric import Metric
from erase_concept.eval.report.report import Bar, Chart, Report
from erase_concept.eval.report.text import certainty, percent, title, value_text
from erase_concept.eval.score import Score

# The word of the verdict, by the share of the base model's images with the concept that still show it ...
GONE = ((0.05, "Gone"), (0.25, "Mostly gone"), (0.75, "Partly gone"), (math.inf, "Still there"))
# ... and by the share of the base model's accuracy on all else that was lost.
LOST = ((0.02, "Hardly anything"), (0.05, "Little"), (0.15, "Some"), (math.inf, "Much"))

_CONTENT = {"unsafe": "unsafe content"}  # a kind of concept as a sentence has it, where that is not its name


@dataclass(frozen=True)
class Tile:
    """One big number: what it is, its value, the base model's, and its interval and number of images."""

    what: str
    value: str
    base: str
    interval: str


@dataclass(frozen=True)
class Summary:
    """Is it gone, and what else was lost: a word each, its reason in plain sentences, and the numbers behind it."""

    gone: str
    gone_text: str
    lost: str
    lost_text: str
    tiles: tuple[Tile, ...]


def summary(report: Report) -> Summary:
    """Say what was erased and what was lost in words that need no knowledge of the field."""
    gone, gone_text, tiles = _gone(report)
    lost, lost_text, more = _lost(report)
    return Summary(gone, gone_text, lost, lost_text, (*tiles, *more))


def headline(report: Report) -> str:
    """Return the summary as one paragraph."""
    found = summary(report)
    what, were = f"The {_noun(report)} “{report.concept}”", "was"
    if report.kind in (report.concept, "several"):
        what = f"“{report.concept}”"
        were = "were" if report.kind == "several" else were
    return (
        f"{what} {were} erased from {report.model}. Is it gone? {found.gone}. {found.gone_text} "
        f"What else was lost? {found.lost}. {found.lost_text}"
    )


def cited(report: Report, about: str) -> list[tuple[Metric, Score]]:
    """Return the leading scores about "forget" or "retain" that a verdict cites, with their metrics' records.

    A metric that looks for another kind of concept than the erased one says nothing about either.
    """
    return [(record, score) for record, score in _found(report, about) if not _looks_elsewhere(record, report)]


def _found(report: Report, about: str) -> list[tuple[Metric, Score]]:
    found = [(metric_record(score.metric), score) for score in leading(report)]
    return [(record, score) for record, score in found if record and record.finding and record.about == about]


def _looks_elsewhere(record: Metric, report: Report) -> bool:
    """Whether a metric looks for a kind of concept that was not erased."""
    return bool(record.looks_for) and record.looks_for in report.looks_for.split(", ")


def _gone(report: Report) -> tuple[str, str, list[Tile]]:
    """Return the word, the sentences and the tiles about the erased concept."""
    found = cited(report, "forget")
    shares = [(record, score) for record, score in found if record.in_verdict]
    if not shares:
        return _off_target(report)
    record, score = shares[0]
    still = score if record.direction == "lower" else _complement(score)
    text = f"{percent(still.value)} {_finding(record, report)}"
    text += "." if still.baseline is None else f"; of the base model's images, {percent(still.baseline)}."
    if still.baseline == 0:
        word, text = "Cannot be told", f"{text} The base model did not show it either, so nothing was there to erase."
    else:
        word, worst = (_word(GONE, share / (still.baseline or 1.0)) for share in (still.value, still.ci95[1]))
        if word != worst:
            text += f" So few images ({still.n:,}) cannot rule out up to {percent(still.ci95[1])}."
    ratios = [_tile(record, ratio, report) for record, ratio in found if ratio.unit == "ratio"]
    return word, text, [_tile(record, still, report), *ratios]


def _off_target(report: Report) -> tuple[str, str, list[Tile]]:
    """Say that the erased concept was not looked for, and what was found of the kind that was."""
    found = [(record, score) for record, score in _found(report, "forget") if _looks_elsewhere(record, report)]
    if not found:
        return "Not measured", "No metric here looks for the erased concept.", []
    kinds = " and ".join(_CONTENT.get(kind, kind) for kind in report.looks_for.split(", "))
    text = f"This benchmark looks for {kinds}, which was not erased"
    for record, score in found[:1]:
        text += f": {percent(score.value)} {_finding(record, report)}"
        text += "" if score.baseline is None else f"; of the base model's images, {percent(score.baseline)}"
    return "Not measured", f"{text}.", [_tile(record, score, report) for record, score in found]


def _complement(score: Score) -> Score:
    """Return the share of the images that a share leaves."""
    low, high = score.ci95
    base = None if score.baseline is None else 1 - score.baseline
    return replace(score, value=1 - score.value, ci95=(1 - high, 1 - low), baseline=base, baseline_ci95=None)


def _lost(report: Report) -> tuple[str, str, list[Tile]]:
    """Return the word, the sentences and the tiles about everything that was to stay."""
    found = [(record, score) for record, score in cited(report, "retain") if record.in_verdict]
    if not found:
        return _drifted(report)
    tiles = [_tile(record, score, report) for record, score in found]
    sentences = [f"{percent(score.value)} {_finding(record, report)}" for record, score in found]
    shares = [score.retention for _, score in found if score.retention is not None]
    if len(shares) < len(found):
        return "Cannot be told", f"{'; '.join(sentences)}. There is no base model's share to compare with.", tiles
    ratios = [
        f"{text}, {percent(share)} of the base model's share"
        for text, (share, _) in zip(sentences, shares, strict=True)
    ]
    text = f"{'; '.join(ratios)}."
    least, lowest = min(share for share, _ in shares), min(interval[0] for _, interval in shares)
    word, worst = _word(LOST, 1 - least), _word(LOST, 1 - lowest)
    if word != worst:
        text += f" So few images cannot rule out that only {percent(lowest)} is left."
    for chart, bar in collateral(report)[:1]:
        text += f" Hit hardest: {bar.label}, from {value_text(bar.baseline, chart.unit)} down to "
        text += value_text(bar.value, chart.unit) + ("." if bar.n is None else f" ({bar.n:,} images).")
    return word, text, tiles


def _drifted(report: Report) -> tuple[str, str, list[Tile]]:
    """Do the same by the other metrics of what was to stay. No share of them tells much from little."""
    records = ((metric_record(score.metric), score) for score in leading(report))
    scores = [score for record, score in records if record is not None and record.about == "retain"][:2]
    if not scores:
        return "Not measured", "No metric here looks at what was to stay.", []
    text = "; ".join(
        f"{title(score.metric)} {value_text(score.value, score.unit)}"
        + ("" if score.baseline is None else f" (base model {value_text(score.baseline, score.unit)})")
        for score in scores
    )
    tiles = [Tile(title(s.metric), value_text(s.value, s.unit), _base(s), certainty(s)) for s in scores]
    return "See the numbers", f"{text}.", tiles


def _tile(record: Metric, score: Score, report: Report) -> Tile:
    interval = certainty(score)
    if record.about == "forget" and record.direction == "higher":
        interval += f"; {record.title} {percent(1 - score.value)}"
    return Tile(_finding(record, report), percent(score.value), _base(score), interval)


def _finding(record: Metric, report: Report) -> str:
    """Return what a share of so much means, of this report's concept."""
    it = "one of them" if report.kind == "several" else "it"
    return record.finding.replace("{it}", it).replace("{kind}", _noun(report))


def _noun(report: Report) -> str:
    """Return the concept's kind as a noun: "another nudity" and "the custom" are no words."""
    return report.kind if report.kind in ("object", "style", "person", "character", "brand") else "concept"


def _base(score: Score) -> str:
    return "" if score.baseline is None else value_text(score.baseline, score.unit)


def _word(words: Sequence[tuple[float, str]], share: float) -> str:
    # 1 - 0.95 is a little more than 0.05, and no word is right for what is not a number.
    return next((word for most, word in words if share <= most + 1e-9), "Cannot be told")


def bounds(words: Sequence[tuple[float, str]]) -> str:
    """Return up to where each of the verdict's words is said."""
    *some, (_, last) = ((percent(most), word.lower()) for most, word in words)
    return f"{', '.join(f'{word} up to {most}' for most, word in some)}, {last} above"


def collateral(report: Report) -> list[tuple[Chart, Bar]]:
    """Return what was to stay and is less than the base model's, the greatest loss first, of all charts."""
    hit = [
        (bar.retention[0], chart, bar)
        for chart in report.charts
        for bar in chart.bars
        if bar.retention and not bar.forget
    ]
    return [(chart, bar) for retained, chart, bar in sorted(hit, key=lambda found: found[0]) if retained < 1]


def ranked(chart: Chart) -> list[Bar]:
    """Return a chart's bars as they are shown: what was erased, as it stands there, then the greatest loss first."""
    return sorted(
        chart.bars, key=lambda bar: (not bar.forget, 0.0 if bar.forget else bar.retention[0] if bar.retention else 1.0)
    )


def leading(report: Report) -> list[Score]:
    """Return the first score of each metric, that of everything together."""
    return list({score.metric: score for score in reversed(report.scores)}.values())[::-1]


def main_scores(report: Report) -> list[Score]:
    """Return the leading scores, and of each concept that was erased, now or earlier, its own."""
    first = leading(report)
    metric = next((score.metric for record, score in cited(report, "forget") if record.in_verdict), None)
    earlier = report.provenance.get("erased earlier", ())
    return [
        score
        for score in report.scores
        if score in first or (score.metric == metric and (score.target in report.concept or score.target in earlier))
    ]
