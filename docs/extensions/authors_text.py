"""The authors' settings of the methods, and the default method of each kind of concept, as Markdown."""

from __future__ import annotations

from typing import Any

from record_text import plain, table, with_options


def defaults_text() -> str:
    """Return a table of the method of each kind of concept on Stable Diffusion, with the reason for it."""
    from erase_concept.presets import default_methods

    rows = [["kind", "method", "reason"]]
    for kind, (method, reason) in default_methods().items():
        rows.append([_kind(kind), f"`{method}`", reason])
    return table(rows)


def authors_text() -> str:
    """Return a section for each method: its authors' settings by kind of concept, and where this package differs."""
    from erase_concept.presets import authors_settings

    sections = []
    for name, authors in sorted(authors_settings().items()):
        lines = [f"### {name}: the authors' settings", "", plain(f"Source: {authors.source}."), ""]
        lines += [_settings_table("paper", authors.paper), ""]
        if authors.latest_code:
            lines += [_settings_table("latest-code", authors.latest_code), ""]
        if authors.differs:
            lines += [
                "Where this package differs:",
                "",
                *(f"- {with_options(sentence)}" for sentence in authors.differs),
                "",
            ]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def _settings_table(preset: str, entries: dict[str, Any]) -> str:
    rows = [[f"`--preset {preset}`", "settings", "prompts", "source"]]
    for kind, entry in entries.items():
        if entry.like:
            rows.append([_kind(kind), f"those for {entry.like}", "ours", ""])
        else:
            rows.append(
                [
                    _kind(kind),
                    ", ".join(f"`{one}`" for one in entry.assignments()),
                    _prompts(entry.concept),
                    entry.source,
                ]
            )
    return table(rows)


def _kind(kind: str) -> str:
    return "every other kind" if kind == "any" else kind


def _prompts(concept: dict[str, Any]) -> str:
    """Return the first of the prompts that erase, and what it becomes."""
    if not (templates := concept.get("templates")):
        return "ours"
    found = f"“{templates[0]}”" + (f" and {len(templates) - 1} more" if len(templates) > 1 else "")
    if names := [*filter(None, [concept.get("name")]), *concept.get("synonyms", ())]:
        found += f" of {', '.join(names)}"
    if anchors := concept.get("anchor_templates"):
        return f"{found}; becomes “{anchors[0]}”" + (" and so on" if len(anchors) > 1 else "")
    if "anchor" in concept:
        return f"{found}; the name becomes " + (f"“{concept['anchor']}”" if concept["anchor"] else "the empty prompt")
    return found
