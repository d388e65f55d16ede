"""Killed at any moment and run again, a command ends with the same weights, images and scores, to the bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erase_concept.training.checkpoint import steps_in

STAGES = (
    *("erase", "mask", "sample", "eval", "compare", "train", "unlearn", "eval-classifier"),
    *(f"export {name}" for name in ("diffusers", "unet", "single-file", "lora", "delta")),
)
LEAST = 50  # kills of all commands together; 78 where none ends before its kill
CHAIN = 4  # kills of one command in the first half of its work


def finished(stage: Any, ended: Any) -> bool:
    """Tell whether a command ended well, or has nothing left to do."""
    return ended.code == 0 or bool(ended.code == 2 and stage.once and "exists already" in ended.err)


def tear(folder: Path, chance: random.Random) -> None:
    """Cut the last line of a file that grows by lines short, where the kill could have been in the middle of it."""
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    last = max(written.values())
    for file in sorted(file for file, when in written.items() if file.suffix == ".jsonl" and when == last):
        copied = {"shared", ".baselines"} & {*file.parts} and not file.parent.name.endswith(".partial")
        if copied or file.name == "pairs.jsonl":
            continue  # these get their names when they are whole
        lines = file.read_bytes().splitlines(keepends=True)
        # A step that is in a checkpoint was in the log before.
        kept = steps_in(file.parent / "checkpoints") if file.name == "log.jsonl" else 0
        if len(lines) > kept and chance.random() < 0.5:
            lines[-1] = lines[-1][: chance.randint(1, len(lines[-1]))]
            file.write_bytes(b"".join(lines))


def test_every_stage_is_here(stages: Any) -> None:
    assert {*STAGES} == {*stages}


@pytest.mark.parametrize("name", STAGES)
def test_killed_it_goes_on_to_the_same_bits(
    name: str,
    world: Any,
    whole: Callable[[str], Any],
    contents: Callable[[Path], dict[str, str]],
    kills: dict[str, int],
    full: bool,
) -> None:
    """Kill at operations on files that a seed chooses, some at a time of the clock; all of them, when asked for."""
    expected, done = whole(name)
    operations, chance = done.operations["write"], random.Random(name)
    if full:
        plans = [[{"harm": "kill", "at": at}] for at in range(1, operations + 1)]
        plans += [[{"after": chance.uniform(0, done.seconds)} for _ in range(3)] for _ in range(5)]
    else:
        early = [{"harm": "kill", "at": chance.randint(1, max(1, operations // 2))} for _ in range(CHAIN)]
        anywhere = [{"harm": "kill", "at": chance.randint(1, operations)}, {"after": chance.uniform(0, done.seconds)}]
        plans = [early + anywhere]
    for plan in plans:
        stage = world.begin(name)
        for fault in plan:
            ended = world.run(*stage.command, **fault)
            if ended.code != -signal.SIGKILL:
                assert finished(stage, ended), (plan, ended.err)
                break  # it had less left to do
            kills[name] = kills.get(name, 0) + 1
            tear(world.folder, chance)
        ended = world.run(*stage.command)
        assert finished(stage, ended), (plan, ended.err)
        found = contents(world.folder)
        differing = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
        assert not differing, plan


def test_there_were_enough_kills(kills: dict[str, int], request: pytest.FixtureRequest) -> None:
    """Else the tests above would show little: a command may have ended before its kill. A part of them has fewer."""
    here = [item for item in request.session.items if item.path == request.path]
    ran = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")}
    if ran != {*STAGES} or "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs all of them, in one process")
    assert sum(kills.values()) >= LEAST, kills
