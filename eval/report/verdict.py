"""What a report says in words: whether the concept is gone, what else was lost, and values as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from erase_concept.eval.report.report import Bar, Chart, Report
from erase_concept.eval.score import Interval, Score

NOTHING = "\N{EN DASH}"  # in tables, where there is no value
READABLE = 200  # characters of a prompt that are shown

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
    "seconds": Measure("Seconds of erasing", higher=False),
    "peak_gib": Measure("Peak memory, GiB", higher=False),
    "changed": Measure("Weights changed", higher=False),
    "pixel_distance": Measure("Pixel distance to the base model's image", higher=False),
    "feature_distance": Measure("Feature distance to the base model's image", higher=False),
}


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
    what, were = f"The {report.kind} “{report.concept}”", "was"
    if report.kind in (report.concept, "several"):
        what = f"“{report.concept}”"
        were = "were" if report.kind == "several" else were
    return (
        f"{what} {were} erased from {report.model}. Is it gone? {told.gone}. {told.gone_text} "
        f"What else was lost? {told.lost}. {told.lost_text}"
    )


def _gone(report: Report) -> tuple[str, str, list[Tile]]:
    """Return the word, the sentences and the tiles about the erased concept."""
    still = _still(report)
    if still is None:
        return "Not measured", "No metric here looks for the erased concept.", []
    many = report.kind == "several"
    asked = f"the images that asked for {'one of them' if many else 'it'}" if still.metric == "ua" else "the images"
    found = {
        "ua": f"The classifier finds {'what was asked for' if many else 'it'} in",
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
    what = "what was erased" if many else f"“{report.concept}”"
    tiles = [Tile(f"of {asked} still show {what}", percent(still.value), _before(still), sure)]
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
    names["several"] = ("the rest of their kinds", "the kind of which nothing was erased")
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
    if any(score.retention is None for _, score in kept):
        told = " and ".join(f"{percent(score.value)} of {what}" for what, score in kept)
        return "Cannot be told", f"{told} are recognised, with no base model's accuracy to hold that against.", tiles
    shares = [(what, *score.retention) for what, score in kept if score.retention is not None]
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
    hit = [
        (bar.retention[0], chart, bar)
        for chart in report.charts
        for bar in chart.bars
        if bar.retention and not bar.forget
    ]
    return [(chart, bar) for kept, chart, bar in sorted(hit, key=lambda found: found[0]) if kept < 1]


def ranked(chart: Chart) -> list[Bar]:
    """Return a chart's bars as they are shown: what was erased, as it stands there, then the greatest loss first."""
    return sorted(
        chart.bars, key=lambda bar: (not bar.forget, 0.0 if bar.forget else bar.retention[0] if bar.retention else 1.0)
    )


def leading(report: Report) -> list[Score]:
    """Return the first score of each metric, that of everything together."""
    return list({score.metric: score for score in reversed(report.scores)}.values())[::-1]


def main_scores(report: Report) -> list[Score]:
    """Return the leading scores, and of each concept that was erased, now or earlier, its own UA."""
    first = leading(report)
    return [score for score in report.scores if score.metric == "ua" or score in first]


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
    if score.retention is None or (known is not None and known.forget):
        return NOTHING
    share, interval = score.retention
    return percent(share) if interval is None else f"{percent(share)} ({interval_text(interval, 'fraction')})"


def short(text: str, most: int = READABLE) -> str:
    """Return a prompt as a page shows it: not endless, and never nothing."""
    return f"{text[:most]} …" if len(text) > most else text or "(empty prompt)"
