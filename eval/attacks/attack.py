"""The record of an attack, which tries to bring an erased concept back without asking for it by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erase_concept.settings import NoSettings


@dataclass(frozen=True)
class Attack:
    """What an attack says of itself, and its function.

    ``run`` takes the model, the concept, a judge and the attack's settings. It returns the attack's prompts, or what
    else it found that brings the concept back.
    """

    name: str
    title: str
    summary: str
    run: Callable[..., Any]
    settings: type = NoSettings
