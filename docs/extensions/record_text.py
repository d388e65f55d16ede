"""What the plug-ins of a kind (methods, guards, judges, metrics, attacks, families) say of themselves, as Markdown."""

from __future__ import annotations

import importlib
from typing import Any


def records(kind: str) -> dict[str, Any]:
    """Return the records of a kind of plug-in, such as "methods", by name."""
    from erase_concept.registry import KINDS

    return getattr(importlib.import_module(KINDS[kind]), kind.upper()).all()


def table_text(kind: str, fields: list[str]) -> str:
    """Return a Markdown table with a row for each record: its name and the given fields."""
    rows = [["name", *fields]]
    rows += [[f"`{name}`", *(_cell(record, field) for field in fields)] for name, record in records(kind).items()]
    return _table(rows)


def settings_text(kind: str) -> str:
    """Return a Markdown section for each record: its summary, and a table of its settings."""
    return "\n\n".join(_section(name, record) for name, record in records(kind).items())


def _section(name: str, record: Any) -> str:
    from erase_concept.settings import settings_of

    lines = [f"### {name}", "", _plain(record.summary), ""]
    rows = [["setting", "default", "allowed", "what it does", "source of the default"]]
    for setting in settings_of(record.settings).values() if record.settings else ():
        default = "none" if setting.default is None else str(setting.default)
        rows.append([f"`{setting.name}`", default, setting.allowed, setting.sentence, setting.source])
    lines.append(_table(rows) if len(rows) > 1 else "It has no settings.")
    return "\n".join(lines)


def _cell(record: Any, field: str) -> str:
    value = getattr(record, field)
    if isinstance(value, (tuple, list, set, frozenset)):
        value = ", ".join(map(str, value))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return "" if value is None else str(value)


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell if cell.startswith("`") else _plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _plain(text: str) -> str:
    """Return text in which Markdown finds nothing to format, in one line."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in " ".join(text.split()))
