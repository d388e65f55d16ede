"""The directives of the generated pages, which are never older than the code.

- ``{command} erase``: what ``erase-concept erase --help`` says
- ``{records} methods``: a table of the methods; the option ``:fields:`` names the columns
- ``{settings} methods``: a section for each method with its settings
- ``{differences} salun esd-x``: how the named methods differ from their authors'
- ``{authors}``: a section for each method with its authors' settings by kind of concept, and where ours differ
- ``{defaults}``: a table of the default method of each kind of concept on Stable Diffusion
- ``{benchmarks}``: a table of the built-in benchmarks
- ``{public}``: the names of ``erase_concept.__all__``
- ``{modules} erase_concept.eval``: every module of a package
"""

from __future__ import annotations

from typing import Any, ClassVar

from api_text import modules_text, plain_lines, public_text, settings_lines
from authors_text import authors_text, defaults_text
from command_text import command_text
from docutils import nodes
from docutils.parsers.rst import directives
from record_text import benchmarks_text, differences_text, settings_text, table_text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Command(SphinxDirective):
    """``{command} NAME``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the command's help."""
        return self.parse_text_to_nodes(command_text(self.arguments[0]))


class Records(SphinxDirective):
    """``{records} KIND``."""

    required_arguments = 1
    option_spec: ClassVar = {"fields": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return a table with a row for each plug-in."""
        fields = self.options.get("fields", "summary").split()
        return self.parse_text_to_nodes(table_text(self.arguments[0], fields))


class Settings(SphinxDirective):
    """``{settings} KIND`` with the option ``:shared:``, the path of a class of settings that most of them have."""

    required_arguments = 1
    option_spec: ClassVar = {"shared": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return a section for each plug-in."""
        return self.parse_text_to_nodes(
            settings_text(self.arguments[0], self.options.get("shared", "")), allow_section_headings=True
        )


class Differences(SphinxDirective):
    """``{differences} METHOD...``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return a list of sentences for each method."""
        return self.parse_text_to_nodes(differences_text(self.arguments[0].split()))


class Authors(SphinxDirective):
    """``{authors}``."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each method."""
        return self.parse_text_to_nodes(authors_text(), allow_section_headings=True)


class Defaults(SphinxDirective):
    """``{defaults}``."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        return self.parse_text_to_nodes(defaults_text())


class Benchmarks(SphinxDirective):
    """``{benchmarks}``."""

    def run(self) -> list[nodes.Node]:
        """Return a table of the built-in benchmarks."""
        return self.parse_text_to_nodes(benchmarks_text())


class Public(SphinxDirective):
    """``{public}``."""

    def run(self) -> list[nodes.Node]:
        """Return the public names' documentation."""
        return self.parse_text_to_nodes(public_text())


class Modules(SphinxDirective):
    """``{modules} PACKAGE``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section for each module."""
        return self.parse_text_to_nodes(modules_text(self.arguments[0]), allow_section_headings=True)


def _docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring's lines reStructuredText, and list the fields of a class of settings."""
    lines[:] = plain_lines(lines) + settings_lines(obj)


def _signature(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, None] | None:
    """Leave out the signature of a class of settings: its fields are listed below it."""
    return ("", None) if settings_lines(obj) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and what reads docstrings."""
    app.add_directive("command", Command)
    app.add_directive("records", Records)
    app.add_directive("settings", Settings)
    app.add_directive("differences", Differences)
    app.add_directive("authors", Authors)
    app.add_directive("defaults", Defaults)
    app.add_directive("benchmarks", Benchmarks)
    app.add_directive("public", Public)
    app.add_directive("modules", Modules)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
