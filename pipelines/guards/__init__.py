"""Guards, one file each: ways to sample that keep a concept out of the images while no weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from erase_concept.pipelines.guards.guard import AppliedGuard, Guard
from erase_concept.prompts.concept import Concept
from erase_concept.registry import Registry
from erase_concept.settings import check_settings

GUARDS: Registry[Guard] = Registry("guards", "guard")


def find_guard(name: str, concept: Concept, settings: Mapping[str, Any] = MappingProxyType({})) -> AppliedGuard:
    """Return a guard against a concept: under the terms of the settings, the authors' for its kind, or all its names.

    Raises RequestError when there is no such guard, or a setting that it does not have or allow ("guard.KEY").
    """
    guard = GUARDS.find(name)
    checked: Any = check_settings(guard.settings, settings, "guard.")
    given = tuple(term.strip() for term in getattr(checked, "terms", "").split(",") if term.strip())
    return AppliedGuard(guard, given or guard.terms.get(concept.common_kind, concept.names), checked)
