"""The pages are all there, say what the code says, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from api_text import FLOORS, module_names, plain_lines
from authors_text import authors_text, defaults_text
from command_text import command_text, commands
from record_text import plain

from erase_concept.eval.benchmarks import benchmarks
from erase_concept.methods import METHODS
from erase_concept.presets import authors_settings, default_methods, preset

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_command_has_its_page() -> None:
    pages = {file.stem: file.read_text(encoding="utf-8") for file in (DOCS / "commands").glob("*.md")}
    pages.pop("index")
    assert set(pages) == set(commands())
    for name, text in pages.items():
        assert f"```{{command}} {name}\n" in text


@pytest.mark.parametrize("name", sorted(commands()))
def test_a_command_page_names_every_option(name: str) -> None:
    text = command_text(name)
    for parameter in commands()[name].params:
        if not getattr(parameter, "hidden", False):
            assert all(option in text for option in parameter.opts if option.startswith("-")), parameter.opts


def test_docstrings_are_shown_as_they_are() -> None:
    lines = ["Fit *a* |b|_1 to ``c*d``:", "- first, in", "  two lines", "- second", "", "    as | it * is", "", "End."]
    assert plain_lines(lines) == [
        r"Fit \*a\* \|b\|\_1 to ``c*d``:",
        "",
        "- first, in two lines",
        "- second",
        "",
        "::",
        "",
        "    as | it * is",
        "",
        "End.",
        "",
    ]


def test_the_api_reference_has_every_module() -> None:
    found = {name for floor in ("", *(f".{name}" for name in FLOORS)) for name in module_names(f"erase_concept{floor}")}
    for top, package in {"erase": (), "pipelines": ("pipelines",), "eval": ("eval",), "prompts": ("prompts",)}.items():
        for file in (ROOT / top).rglob("*.py"):
            if not file.stem.startswith("__"):
                parts = file.relative_to(ROOT / top).with_suffix("").parts
                assert ".".join(("erase_concept", *package, *parts)) in found
    for floor in FLOORS:
        assert f"{{modules}} erase_concept.{floor}\n" in (DOCS / "api" / f"{floor}.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    prose = re.sub(
        r"^```.*?^```$|^\|.*?$|^#.*?$|<!--.*?-->|!?\[([^]]*)\]\([^)]*\)|`[^`]*`", r"\1", text, flags=re.M | re.S
    )
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", prose, flags=re.M):
        for sentence in re.split(r"(?<=[.!?:])\s", paragraph):
            assert len(sentence.split()) <= 30, sentence


def test_the_readme_names_every_method_and_benchmark() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {word for row in re.findall(r"^\| (.*?) \|", text, re.M) for word in re.findall(r"[\w-]+", row)}
    assert {*METHODS.all(), *benchmarks()} <= named


def test_the_methods_page_has_every_setting_of_the_authors_and_every_difference() -> None:
    text = authors_text()
    assert "```{authors}" in (DOCS / "methods.md").read_text(encoding="utf-8")
    for name, authors in authors_settings().items():
        section = re.split(r"^### ", text.split(f"### {name}: ")[1], flags=re.M)[0]
        assert section.count("\n- ") == len(authors.differs)
        for entry in (*authors.paper.values(), *authors.latest_code.values()):
            assert all(f"`{one}`" in section for one in entry.assignments())


def test_every_kind_of_concept_has_its_default_method_and_the_reason() -> None:
    rows = [line for line in defaults_text().splitlines() if line.startswith("| ")][2:]
    for kind, (method, reason) in default_methods().items():
        title = "every other kind" if kind == "any" else kind
        assert f"| {title} | `{method}` | {plain(reason)} |" in rows
        assert preset("default", "model", kind).method == method
