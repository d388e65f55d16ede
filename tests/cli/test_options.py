"""Options as one object, assignments by part, and settings named by their flags."""

from __future__ import annotations

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from erase_concept.cli import main as cli
from erase_concept.cli.flags import FLAGS, in_flags
from erase_concept.cli.options import RecipeOptions, assigned, grouped
from erase_concept.errors import RequestError


def test_every_flag_is_an_option_of_a_command() -> None:
    """What an error names can be typed."""
    commands = get_command(cli.app).commands.values()
    there = {name for one in commands for param in one.params for name in (*param.opts, param.metavar or "")}
    there |= {word for metavar in there for word in metavar.strip(".").split("|")}
    assert {*FLAGS.values()} <= there


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ("model", "MODEL"),
        ("mask.kind", "--mask"),
        ("mask.combine", "--set mask.combine"),
        ("settings.lr", "--set lr"),
        ("judge.threshold", "--set judge.threshold"),
        ("fail_if", "--fail-if"),
        ("processes", "processes"),
    ],
)
def test_a_setting_has_its_flag(setting: str, flag: str) -> None:
    value = "=2: at" if flag.startswith("--set") else " 2: at"
    assert in_flags(RequestError(setting, 2, "at most 1")) == f"{flag}{value} most 1"


def test_options_of_a_group_reach_the_command_as_one_object() -> None:
    """The command's own default, a group's default, and a repeated option."""
    got = []

    @grouped
    def command(given: RecipeOptions, twice: bool = False) -> None:
        got.append((given, twice))

    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["a-model", "-c", "dog", "-c", "cat", "--twice"]).exit_code == 0
    assert got == [(RecipeOptions(model="a-model", concept=["dog", "cat"]), True)]


def test_assignments_go_to_their_parts() -> None:
    found = assigned(["judge.level=1e-5", "metric.frechet.extractor=inception"], "judge", "metric")
    assert found == {"judge": {"level": 1e-5}, "metric": {"frechet.extractor": "inception"}}
    for text in ("level=1", "other.level=1", "judge=1", "judge.level"):
        with pytest.raises(RequestError, match="set"):
            assigned([text], "judge", "metric")
