"""``list``: one line each, and all settings of one."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from erase_concept.cli.list import COLUMNS, OTHERS

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("what", [*COLUMNS, *OTHERS])
def test_everything_is_listed(what: str, command: Command) -> None:
    code, out, _ = command("list", what, "--json")
    rows = json.loads(out)
    assert code == 0
    code, out, _ = command("list", what)
    assert code == 0
    assert all(name in out for name in rows)
    assert rows or out == "There are no attacks yet.\n"


def test_one_with_its_settings(command: Command) -> None:
    """Default, range, sentence and source stand in both forms."""
    code, out, _ = command("list", "guards", "sld-max", "--json")
    about = json.loads(out)
    scale = {
        "name": "guard.scale",
        "default": "5000.0",
        "allowed": "number, at least 0",
        "sentence": "How strongly to guide away from the concept; 0 is no guard.",
        "source": "arXiv 2211.05105",
    }
    assert (code, about["name"], about["paper"], about["settings"][0]) == (0, "sld-max", "arXiv 2211.05105", scale)
    code, out, _ = command("list", "guards", "sld-max")
    assert code == 0
    assert all(setting["name"] in out and setting["default"] in out for setting in about["settings"])


@pytest.mark.parametrize("width", ["80", "120"])
def test_no_line_is_wider_than_the_terminal(width: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for asked in (["list", "methods"], ["list", "methods", "salun"], ["list", "metrics"], ["erase", "--help"]):
        code, out, _ = command(*asked)
        assert code == 0
        assert max(map(len, out.splitlines())) <= int(width), asked


def test_what_is_not_there_is_refused(command: Command) -> None:
    assert "NAME sld: did you mean sld-max? allowed: " in command("list", "guards", "sld")[2]
    code, _, err = command("list", "prompts", "everyday")
    assert (code, "NAME everyday: prompts have no settings" in err) == (2, True)
