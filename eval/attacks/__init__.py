"""Attacks, one file each: what brings a concept back without asking for it by name. There is none yet."""

from __future__ import annotations

from erase_concept.eval.attacks.attack import Attack
from erase_concept.registry import Registry

ATTACKS = Registry[Attack]("attacks", "attack")
