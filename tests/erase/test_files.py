"""Files appear whole or not at all, and as the user's umask says."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erase_concept.errors import RequestError
from erase_concept.files import append_lines, atomic_write, only_process


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    with pytest.raises(TypeError), atomic_write(file) as partial:
        partial.write_text("half") + partial  # 4 characters, and then an error
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_write(file) as partial:
        partial.write_text("whole")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["a.txt"]
    with pytest.raises(TypeError), atomic_write(file) as partial:
        partial.write_text("half") + partial
    assert file.read_text() == "whole"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "w.safetensors") as partial:
            save_file({"x": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode


def test_an_error_names_the_file_and_not_the_partial_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists") as problem, atomic_write(tmp_path / "file" / "a"):
        pass
    assert str(problem.value.filename).startswith(str(tmp_path / "file"))
    with pytest.raises(OSError, match="too large") as problem, atomic_write(tmp_path / "a"):
        raise OSError(27, "File too large")
    assert problem.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace files that are open")
def test_two_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    file, order, began = tmp_path / "a", [], threading.Event()

    def second() -> None:
        began.set()
        with atomic_write(file) as partial:
            order.append("second")
            partial.write_text("second")

    other = threading.Thread(target=second)
    with atomic_write(file) as partial:
        other.start()
        began.wait()
        other.join(timeout=0.1)  # it waits
        partial.write_text("first")
        order.append("first")
    other.join()
    assert (order, file.read_text(), [one.name for one in tmp_path.iterdir()]) == (["first", "second"], "second", ["a"])


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("a long beginning of something")
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a", "whole")]


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lines"
    append_lines(file, ["one\n", "two\n"])
    with file.open("a") as stream:
        stream.write("thr")
    append_lines(file, ["four\n"])
    append_lines(file, ["fünf\n"])
    assert file.read_text(encoding="utf-8") == "one\ntwo\nthr\nfour\nfünf\n"


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    told = r"out .* another process is at work in it"
    with only_process(tmp_path), pytest.raises(RequestError, match=told), only_process(tmp_path):
        pass
    with only_process(tmp_path):
        pass
