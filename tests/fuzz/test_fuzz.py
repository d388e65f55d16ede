"""A short run over every reader of files from outside; ``make fuzz`` is the long one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":  # its signals and its accounts of memory
    pytest.skip("needs Linux", allow_module_level=True)

from fuzz.feed import CORPUS, Feeder
from fuzz.readers import BY_NAME, READERS, Reader
from fuzz.watch import broken_by

_STRUCTURED = 12  # files of the right structure for each reader, and some more of changed bytes


def fail(reader: Reader, content: bytes, problem: str) -> None:
    pytest.fail(f"{reader.name} {problem}, given {content[:500]!r}")


@pytest.mark.parametrize("name", BY_NAME)
def test_no_file_breaks_a_reader(name: str, tmp_path: Path) -> None:
    feeder = Feeder(BY_NAME[name], tmp_path, fail)
    for file in feeder.corpus():
        feeder.feed(file.read_bytes())
    slow = feeder.reader.weight < 0.5
    feeder.run(1 if slow else _STRUCTURED, 0, more=2 if slow else 4)


def test_every_file_that_once_broke_a_reader_is_fed_to_one() -> None:
    assert {file.name.partition("--")[0] for file in CORPUS.iterdir()} <= {reader.name for reader in READERS}


@pytest.mark.parametrize(
    ("hostile", "problem"),
    [
        ("raise KeyError('x')", "raises KeyError"),
        ("while True: pass", "hangs"),
        ("import os; os.system('true')", "touches what it must not: os.system"),
        ("import subprocess; subprocess.run(['true'])", "touches what it must not: subprocess.Popen"),
        ("open('../outside', 'w')", "touches what it must not: open"),
        ("import os; os.mkdir('/tmp/fuzz-outside')", "touches what it must not: os.mkdir"),
        ("import fuzz_canary", "touches what it must not: import"),
        ("from erase_concept.errors import RequestError; raise RequestError('a', 'b', 'c')", ""),
        ("open('inside', 'w').close()", ""),
    ],
)
def test_the_watch_sees_what_a_reader_does(
    hostile: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.watch.SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(b"")
    told = broken_by(lambda file: exec(hostile), tmp_path / "x")
    assert told.startswith(problem) if problem else not told


def test_the_watch_sees_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.watch.MEMORY", 1 << 22)
    (tmp_path / "x").write_bytes(b"")
    size = 64 << 20
    while not (told := broken_by(lambda file, size=size: b"x" * size, tmp_path / "x")) and size < 1 << 31:
        size *= 2  # below the process's highest peak so far it shows nowhere
    assert "MiB for a file of 0 bytes" in told
