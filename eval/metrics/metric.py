"""What a metric is: a record, what it is given, and what it finds.

Beneath the records are pure functions of arrays. ``prepare`` gets a ``MetricContext`` before anything is sampled and
returns a ``PreparedMetric``, whose ``compute`` turns a ``MetricInput`` into a ``MetricResult``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Chart, Curve
from erase_concept.eval.score import Score
from erase_concept.settings import NoSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.judges.judge import Judgement, LoadedJudge
    from erase_concept.pipelines.image_set import ImageSet

About = Literal["forget", "retain", "cost"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True, eq=False)
class JudgedImages:
    """The images of one model and, by the names of the judges, what they say of them."""

    images: ImageSet
    judgements: Mapping[str, Judgement]


@dataclass(frozen=True, eq=False)
class Target:
    """One erased concept as its judge calls it, and which images [n] ask for it."""

    name: str
    kind: str
    label: str
    asks: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MetricInput:
    """The images of the erased model and of the base model, by the same prompts and seeds, and what judges say.

    ``concept`` is the erased concept's name, ``targets`` are its parts. ``earlier`` are concepts that the base model
    had lost already: they count neither as forgotten nor as retained. ``forget`` [n] marks the images that ask for the
    concept. ``cache`` is the folder that keeps features.
    """

    concept: str
    targets: tuple[Target, ...]
    forget: NDArray[np.bool_]
    judges: Mapping[str, LoadedJudge]
    erased: JudgedImages
    base: JudgedImages | None
    cache: Path | None = None
    earlier: tuple[Target, ...] = ()

    @property
    def sides(self) -> list[JudgedImages]:
        """The erased model's images, and the base model's where there are any."""
        return [side for side in (self.erased, self.base) if side is not None]

    @property
    def asked_earlier(self) -> NDArray[np.bool_]:
        """Which images [n] ask for what was erased earlier."""
        return np.any([np.zeros(len(self.forget), bool), *(target.asks for target in self.earlier)], axis=0)

    @property
    def retain(self) -> NDArray[np.bool_]:
        """Which images [n] ask for nothing that was erased."""
        return ~self.forget & ~self.asked_earlier

    def judge_of(self, kind: str) -> str:
        """Return the name of the first judge that has labels of a kind; raises RequestError when none does."""
        return judge_of(self.judges, kind)

    def asked(self, kind: str) -> tuple[str, ...]:
        """Return the label of a kind that each image asks for, as the judge calls it, and "" for none.

        Raises RequestError for a label that the judge does not know.
        """
        judge = self.judges[self.judge_of(kind)]
        texts = [row.style if kind == "style" else row.object for row in self.erased.images.rows]
        known = {text: judge.label(text, kind, setting="prompts") if text else "" for text in dict.fromkeys(texts)}
        return tuple(known[text] for text in texts)

    def files(self, side: JudgedImages, chosen: NDArray[np.bool_]) -> list[Path]:
        """Return the files of a model's chosen [n] images."""
        return [side.images.files[place] for place in np.flatnonzero(chosen)]

    def with_baseline(self, score: Callable[[JudgedImages], Score]) -> Score:
        """Return the erased model's score with the base model's, if there is one, as its baseline."""
        found = score(self.erased)
        if self.base is None:
            return found
        before = score(self.base)
        return replace(found, baseline=before.value, baseline_ci95=before.ci95)


@dataclass(frozen=True, eq=False)
class MetricResult:
    """What a metric found. ``missing`` says of metrics that could not be measured why."""

    scores: tuple[Score, ...] = ()
    charts: tuple[Chart, ...] = ()
    curves: tuple[Curve, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class MetricContext:
    """What a metric knows before anything is sampled: its settings, the judges, and whether there is a base model.

    ``kinds`` are those of the erased concepts.
    """

    settings: Any
    judges: Mapping[str, LoadedJudge]
    kinds: tuple[str, ...]
    baseline: bool

    def judge_of(self, kind: str) -> LoadedJudge:
        """Return the first judge that has labels of a kind; raises RequestError when none does."""
        return self.judges[judge_of(self.judges, kind)]

    def need_base(self, what: str) -> None:
        """Raise RequestError when there is no base model."""
        if not self.baseline:
            raise RequestError("baseline", "(not given)", f"{what} needs the base model's images")


@dataclass(frozen=True, eq=False)
class PreparedMetric:
    """A metric that has all it needs: the names of the scores that it gives, and the function that measures them."""

    names: tuple[str, ...]
    compute: Callable[[MetricInput], MetricResult]


@dataclass(frozen=True)
class Metric:
    """What a metric says of itself, and how it is prepared; reports, ``list`` and the docs read nothing else.

    ``about`` says whether it looks at the erased concept ("forget"), at what was to stay ("retain") or at what the
    erasing took ("cost"). ``direction`` says which values are better. ``judge`` names the judge that it counts; without
    a name it takes any judge that has the labels that it needs. ``blurs`` says whether reports blur the images that
    this judge flags.

    ``looks_for`` is the kind of concept that its judge looks for in every image, whatever was erased.

    A metric with a ``finding`` is cited in a report's verdict. The finding ends the sentence "5 % ...", and says what
    such a share means; where a forget metric is better higher, the share is what is left, 1 - value. "{it}" stands for
    the erased concept and "{kind}" for its kind.

    ``prepare`` raises RequestError where a package, weights, a judge or the base model are missing, so that this is
    known before anything is sampled. Without it the metric is not measured by evaluations.
    """

    name: str
    title: str
    summary: str
    about: About
    direction: Direction
    unit: str = "fraction"
    judge: str = ""
    looks_for: str = ""
    blurs: bool = False
    settings: type = NoSettings
    finding: str = ""
    prepare: Callable[[MetricContext], PreparedMetric] | None = None

    @property
    def in_verdict(self) -> bool:
        """Whether the verdict's word may come from it: a share of images that a verdict cites."""
        return bool(self.finding) and self.unit == "fraction"


def judge_of(judges: Mapping[str, LoadedJudge], kind: str) -> str:
    """Return the name of the first judge that has labels of a kind; raises RequestError when none does."""
    for name, judge in judges.items():
        if judge.knows(kind):
            return name
    there = f"none of these does: {', '.join(judges)}" if judges else "there is none"
    raise RequestError("judge", "(not given)", f"needs a judge that tells which {kind} an image shows; {there}")


def single(name: str, compute: Callable[[MetricInput], Score | Sequence[Score] | MetricResult]) -> PreparedMetric:
    """Return a prepared metric of one name; its function may give a score, several, or a whole result."""

    def result(data: MetricInput) -> MetricResult:
        found = compute(data)
        if isinstance(found, MetricResult):
            return found
        return MetricResult((found,) if isinstance(found, Score) else tuple(found))

    return PreparedMetric((name,), result)


def missing(name: str, why: str) -> MetricResult:
    """Return the result of a metric that these images do not allow to be measured."""
    return MetricResult(missing={name: why})
