"""A command's usage, arguments and options as Markdown, as ``--help`` gives them."""

from __future__ import annotations

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
    arguments, options = [], []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            (arguments if parameter.param_type_name == "argument" else options).append(record)
    for title, records in (("Arguments", arguments), ("Options", options)):
        if records:
            lines += [f"**{title}**", ""]
            for names, text in records:
                lines += [f"`{names}`", f": {_plain(text)}", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return text in which Markdown finds nothing to format; line ends become spaces."""
    text = " ".join(click.unstyle(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in text)
