"""The record of a metric: what it is called, what it is about, which direction is better, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erase_concept.settings import NoSettings

About = Literal["forget", "retain", "cost"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """What a metric says of itself; reports, ``list`` and the docs read nothing else.

    ``about`` says whether it looks at the erased concept ("forget"), at what was to stay ("retain") or at what the
    erasing took ("cost"). ``direction`` says which values are better. ``blurs`` says whether reports blur the images
    in which its judge finds the concept.

    A metric with a ``finding`` is cited in a report's verdict. The finding ends the sentence "5 % ...", and says what
    such a share means; where a forget metric is better higher, the share is what is left, 1 - value. "{it}" stands for
    the erased concept and "{kind}" for its kind.
    """

    name: str
    title: str
    summary: str
    about: About
    direction: Direction
    unit: str = "fraction"
    blurs: bool = False
    settings: type = NoSettings
    finding: str = ""

    @property
    def in_verdict(self) -> bool:
        """Whether the verdict's word may come from it: a share of images that a verdict cites."""
        return bool(self.finding) and self.unit == "fraction"
