"""A command's usage, arguments and options as Markdown, as ``--help`` gives them."""

from __future__ import annotations

import re
from typing import Any

import click
import typer


def commands() -> dict[str, Any]:
    """Return the click commands of ``erase-concept`` by name."""
    from erase_concept.cli.main import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def command_text(name: str) -> str:
    """Return a command's help as Markdown; raises KeyError when there is no such command."""
    command = commands()[name]
    context = command.make_context(f"erase-concept {name}", [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [_plain(command.help or ""), "", "```text", f"erase-concept {name} {usage}", "```", ""]
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
    for panel, records in panels.items():
        lines += [f"**{panel}**", ""]
        for names, text in records:
            lines += [f"`{names}`", f": {_plain(text)}", ""]
    examples = re.findall(r"\[cyan\](.*?)\[/cyan\]", command.epilog or "")
    if examples:
        lines += ["**Examples**", "", "```text", *(example.replace("\\[", "[") for example in examples), "```"]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return text in which Markdown finds nothing to format; line ends become spaces."""
    text = " ".join(click.unstyle(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in text)
