"""Model families, one file each: components, encoding, prediction, layers and single-file layout."""

from __future__ import annotations

from collections.abc import Iterable

from erase_concept.pipelines.families.family import Configs, Family
from erase_concept.registry import Registry

FAMILIES: Registry[Family] = Registry("families", "family")


def families_of_pipeline(class_name: str) -> list[Family]:
    """Return the families whose models are saved as a pipeline of diffusers' class of that name."""
    return [family for family in FAMILIES.all().values() if family.pipeline.__name__ == class_name]


def find_family(class_name: str, configs: Configs) -> Family | None:
    """Return the family of a pipeline class with components of these configurations."""
    return next((family for family in families_of_pipeline(class_name) if family.matches(configs)), None)


def family_of_file(keys: Iterable[str]) -> Family | None:
    """Return the family of a checkpoint in one file, found by the names of its tensors."""
    keys = list(keys)
    for family in FAMILIES.all().values():
        mark = family.single_file and family.single_file.mark
        if mark and any(key.startswith(mark) for key in keys):
            return family
    return None
