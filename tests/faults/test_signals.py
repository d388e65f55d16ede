"""Ctrl-C and SIGTERM end a command with what it has; two commands never work in one folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = ("erase", "sample", "eval", "compare", "unlearn", "export lora")


@pytest.mark.parametrize(("harm", "code"), [("interrupt", 130), ("terminate", 143)])
@pytest.mark.parametrize("name", STAGES)
def test_a_signal_ends_a_command_that_goes_on(
    name: str,
    harm: str,
    code: int,
    world: Any,
    whole: Callable[[str], Any],
    contents: Callable[[Path], dict[str, str]],
    full: bool,
) -> None:
    expected, done = whole(name)
    operations, chance = done.operations["write"], random.Random(name + harm)
    for at in range(1, operations) if full else (chance.randint(1, operations - 1),):
        stage = world.begin(name)
        ended = world.run(*stage.command, harm=harm, at=at)
        assert "Traceback" not in ended.err, (at, ended.err)
        if ended.code:
            assert ended.code == code, (at, ended.err)
            assert "the same command goes on from here" in ended.lines[-1]
            ended = world.run(*stage.command)
        assert ended.code == 0 or "exists already" in ended.err, (at, ended.err)
        found = contents(world.folder)
        # A signal makes a checkpoint at another step than an undisturbed run does.
        other = {file for file in {*found, *expected} if file.endswith(".previous")}
        assert {file: found.get(file) for file in {*found, *expected} - other} == {
            file: expected.get(file) for file in {*found, *expected} - other
        }


@pytest.mark.parametrize("name", ["erase", "sample", "compare", "unlearn"])
def test_a_second_command_is_refused_while_the_first_works(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]]
) -> None:
    expected, done = whole(name)
    stage = world.begin(name)
    first = world.run(*stage.command, harm="stop", at=done.operations["write"] // 2)
    assert first.stopped
    before = contents(world.folder)
    second = world.run(*stage.command)
    assert (second.code, len(second.lines)) == (2, 1), second.err
    assert "another process is at work in it" in second.err
    assert contents(world.folder) == before
    assert world.go_on(first.stopped).code == 0
    assert contents(world.folder) == expected


@pytest.mark.parametrize("name", ["eval", "export unet", "mask"])
def test_commands_that_write_one_file_do_not_mix(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]]
) -> None:
    """A killed one in the middle of its writing leaves nothing that the next one takes for its own."""
    expected, _ = whole(name)
    stage = world.begin(name)
    first = world.run(*stage.command, harm="stop", at=1)
    assert first.stopped
    second = world.run(*stage.command)
    assert second.code == 0 or len(second.lines) == 1
    ended = world.go_on(first.stopped)
    assert ended.code == 0 or len(ended.lines) == 1
    assert 0 in (second.code, ended.code)
    assert contents(world.folder) == expected
