"""The registry of plug-ins: methods, guards, judges, metrics, attacks and model families.

A plug-in is one file that registers a record under a name. Files of this project lie in the folder of their kind, where
they are found by themselves. Another package names its module as an entry point, in the group of the kind:

    [project.entry-points."erase_concept.methods"]
    towards-nothing = "my_package.towards_nothing"
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar

from erase_concept.errors import EraseError, RequestError, did_you_mean

# Where the records of each kind are kept: the module that holds its registry.
KINDS = {
    "methods": "erase_concept.methods",
    "unlearners": "erase_concept.classification.methods",
    "guards": "erase_concept.pipelines.guards",
    "judges": "erase_concept.eval.judges",
    "metrics": "erase_concept.eval.metrics",
    "attacks": "erase_concept.eval.attacks",
    "families": "erase_concept.pipelines.families",
}


class Record(Protocol):
    """What a plug-in says of itself: at least its name, and what it does in one line."""

    @property
    def name(self) -> str:
        """The name by which people ask for it."""

    @property
    def summary(self) -> str:
        """What it does, in one line of plain words."""


R = TypeVar("R", bound=Record)


class Registry(Generic[R]):
    """The plug-ins of one kind by name. ``kind`` is one of ``KINDS``; ``setting`` is the setting that names one."""

    def __init__(self, kind: str, setting: str) -> None:
        """Begin empty; the files of the kind's folder and other packages' are imported when first asked for."""
        self.kind, self.setting = kind, setting
        self._records: dict[str, R] = {}
        self._imported = False

    def add(self, record: R) -> R:
        """Add a record; raises ValueError when its name is taken."""
        if record.name in self._records:
            raise ValueError(f"there are already {self.kind} named {record.name!r}")
        self._records[record.name] = record
        return record

    def all(self) -> dict[str, R]:
        """Return every record by name, in the order of the names.

        Raises EraseError, naming the package, when another package's plug-in cannot be imported.
        """
        if not self._imported:
            package = importlib.import_module(KINDS[self.kind])
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
            for point in entry_points(group=f"erase_concept.{self.kind}"):
                try:
                    point.load()
                except Exception as problem:
                    whose = f" of {point.dist.name}" if point.dist else ""
                    raise EraseError(f"the plug-in {point.name}{whose} could not be imported: {problem}") from problem
            self._imported = True
        return dict(sorted(self._records.items()))

    def find(self, name: str) -> R:
        """Return the record of that name; raises RequestError when there is none."""
        known = self.all()
        if name not in known:
            hint = did_you_mean(name, known)
            raise RequestError(self.setting, name, f"{hint}allowed: {', '.join(known) or 'none'}")
        return known[name]
