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
    """

    name: str
    title: str
    summary: str
    about: About
    direction: Direction
    unit: str = "fraction"
    blurs: bool = False
    settings: type = NoSettings
