"""What the plug-ins of a kind (methods, guards, judges, metrics, attacks, families) say of themselves, as Markdown."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from erase_concept.settings import Setting, settings_of


def records(kind: str) -> dict[str, Any]:
    """Return the records of a kind of plug-in, such as "methods", by name."""
    from erase_concept.registry import KINDS

    return getattr(importlib.import_module(KINDS[kind]), kind.upper()).all()


def table_text(kind: str, fields: list[str]) -> str:
    """Return a Markdown table with a row for each record: its name and the given fields."""
    rows = [["name", *fields]]
    rows += [[f"`{name}`", *(_cell(record, field) for field in fields)] for name, record in records(kind).items()]
    return table(rows)


def settings_text(kind: str, shared: str = "") -> str:
    """Return a Markdown section for each record with its settings.

    ``shared`` is the path of a class of settings that most of them have: these get one section, and the records' own
    only what differs from it.
    """
    common: dict[str, Setting] = {}
    sections = []
    if shared:
        module, _, name = shared.rpartition(".")
        common = settings_of(getattr(importlib.import_module(module), name))
        sections.append("\n".join(("### Every training", "", _settings_table(common.values()))))
    sections += [_section(name, record, common) for name, record in records(kind).items()]
    return "\n\n".join(sections)


def differences_text(methods: list[str]) -> str:
    """Return a Markdown list for each of the methods: where it differs from its authors', and why."""
    from erase_concept.presets import authors_settings

    authors = authors_settings()
    lists = []
    for name in methods:
        sentences = "\n".join(f"- {with_options(sentence)}" for sentence in authors[name].differs)
        lists.append(f"**{name}** ({plain(authors[name].source)})\n\n{sentences}")
    return "\n\n".join(lists)


def benchmarks_text() -> str:
    """Return a Markdown table of the built-in benchmarks."""
    from erase_concept.eval.benchmarks import benchmarks

    rows = [["name", "about", "judges", "metrics"]]
    for name, found in benchmarks().items():
        rows.append([f"`{name}`", found.about, ", ".join(found.judges), ", ".join(found.metrics)])
    return table(rows)


def _section(name: str, record: Any, common: Mapping[str, Setting]) -> str:
    found = settings_of(record.settings)
    own = [setting for setting in found.values() if common.get(setting.name) != setting]
    lines = [f"### {name}", "", plain(record.summary), ""]
    lines.append(_settings_table(own) if own else "It has no settings of its own.")
    if common.keys() <= found.keys() and common:
        lines += ["", "It also has the settings of every training."]
    return "\n".join(lines)


def _settings_table(found: Iterable[Setting]) -> str:
    rows = [["setting", "default", "allowed", "what it does", "source of the default"]]
    for setting in found:
        default = "none" if setting.default is None else str(setting.default)
        rows.append([f"`{setting.name}`", default, setting.allowed, setting.sentence, setting.source])
    return table(rows)


def _copies(method: Any) -> int:
    """Return how many copies of all of the UNet a method holds at its peak, with its own settings."""
    return round(max((phase.copies for phase in method.memory(method.settings())), default=0))


# Columns that are no field of a record.
_COMPUTED = {"copies": _copies}


def _cell(record: Any, field: str) -> str:
    value = _COMPUTED[field](record) if field in _COMPUTED else getattr(record, field)
    if isinstance(value, (tuple, list, set, frozenset)):
        value = ", ".join(map(str, value))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return "" if value is None else str(value)


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table of rows, the first of which is its head; what begins with ` is Markdown already."""
    head, *body = [[cell if cell.startswith("`") else plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def plain(text: str) -> str:
    """Return text in which Markdown finds nothing to format, in one line."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in " ".join(text.split()))


def with_options(text: str) -> str:
    """Return plain text with options as code, for two hyphens of an option would become a dash."""
    return re.sub(r"--[\w-]+", r"`\g<0>`", plain(text))
