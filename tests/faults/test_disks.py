"""A full disk, a folder that may not be written, files that vanish: one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = ("erase", "sample", "eval", "compare", "unlearn", "export single-file", "export diffusers")


def check_refused(ended: Any, folder: Path) -> None:
    """One line of ours, no traceback, and no file that is not whole."""
    assert "Traceback" not in ended.err, ended.err
    assert ended.code == 2, ended.err
    assert len(ended.lines) == 1, ended.err
    # A folder of that name is one that the next command goes on to fill.
    assert not [file for file in folder.rglob("*.partial") if file.is_file()], ended.err
    assert not [*folder.rglob("*.partial.folder")], ended.err


def check_goes_on(name: str, world: Any, whole: Any, contents: Any) -> None:
    """The same command, on a disk in order, ends as if nothing had happened; the cache may lack what did not fit."""
    expected, _ = whole(name)
    ended = world.run(*world.stages[name].command)
    assert ended.code == 0, ended.err
    found = contents(world.folder)
    lacking = {file for file in expected if file.startswith(("cache/", ".baselines/")) and file not in found}
    assert {file: expected[file] for file in expected.keys() - lacking} == found


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_gets_full(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]], full: bool
) -> None:
    """From one operation on no file can be made any more."""
    _, done = whole(name)
    creations, chance = done.operations["create"], random.Random(name)
    for at in range(1, creations + 1) if full else sorted(chance.sample(range(1, creations + 1), 2)):
        stage = world.begin(name)
        earlier = contents(world.folder)
        ended = world.run(*stage.command, harm="full", at=at)
        if ended.code:  # what is kept for later runs alone may be lacking
            check_refused(ended, world.folder)
            assert "No space left on device" in ended.lines[0]
        assert earlier.items() <= contents(world.folder).items()
        check_goes_on(name, world, whole, contents)


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_takes_a_part_of_a_file(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]], full: bool
) -> None:
    """The system refuses every byte of a file beyond a size: what is written is cut off in its middle."""
    whole(name)
    for size in (50, 500, 5_000, 20_000, 60_000) if full else (5_000,):
        stage = world.begin(name)
        ended = world.run(*stage.command, largest=size)
        if ended.code:
            check_refused(ended, world.folder)
            assert "File too large" in ended.lines[0]
        check_goes_on(name, world, whole, contents)


@pytest.mark.parametrize("name", ["erase", "export diffusers"])
def test_a_real_disk_that_is_full(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]]
) -> None:
    """A disk in memory that the earlier files fill, but for 80 kB."""
    whole(name)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "faults", str(world.folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        stage = world.begin(name)
        used = shutil.disk_usage(world.folder).used
        remount = ["mount", str(world.folder), "-o"]
        subprocess.run([*remount, f"remount,size={used // 1024 + 80}k"], check=True)
        check_refused(world.run(*stage.command), world.folder)
        subprocess.run([*remount, "remount,size=1g"], check=True)
        check_goes_on(name, world, whole, contents)
    finally:
        subprocess.run(["umount", str(world.folder)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rights")
@pytest.mark.parametrize("name", ["erase", "sample", "compare", "unlearn"])
def test_a_folder_that_may_not_be_written(name: str, world: Any) -> None:
    stage = world.begin(name)
    out = world.folder / stage.command[-1]
    out.mkdir(mode=0o555)
    root = os.geteuid() == 0
    ended = world.run(*stage.command, nobody=root)
    check_refused(ended, world.folder)
    assert "Permission denied" in ended.lines[0]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", STAGES)
def test_a_file_that_vanishes(
    name: str, world: Any, whole: Callable[[str], Any], contents: Callable[[Path], dict[str, str]], full: bool
) -> None:
    """A file that was there is gone when it is read."""
    _, done = whole(name)
    reads, chance = done.operations["read"], random.Random(name)
    for at in range(1, reads + 1) if full else chance.sample(range(1, reads + 1), 2):
        stage = world.begin(name)
        earlier = contents(world.folder)
        ended = world.run(*stage.command, harm="vanish", at=at)
        assert "Traceback" not in ended.err, (at, ended.err)
        assert ended.code in (0, 1, 2), (at, ended.err)
        found = contents(world.folder)
        gone = {file for file in earlier if file not in found}
        assert len(gone) <= 1
        assert {file: earlier[file] for file in earlier.keys() - gone}.items() <= found.items()
