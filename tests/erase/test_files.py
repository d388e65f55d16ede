"""Files appear whole or not at all, and as the user's umask says."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import erase_concept
from erase_concept.errors import RequestError
from erase_concept.files import (
    append_lines,
    atomic_write,
    only_process,
    parse_json,
    parse_yaml,
    read_text,
)
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.tensors import open_tensors, read_shapes, save_tensors
from erase_concept.pipelines.model import Diffusion


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


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the disk, in order: which file or folder is written out, and which gets a name."""
    found: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def written(descriptor: int) -> None:
        found.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def named(self: Path, target: Path) -> Path:
        found.append(("name", target.name))
        replace(self, target)
        return target

    monkeypatch.setattr(os, "fsync", written)
    monkeypatch.setattr(Path, "replace", named)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the names of open files")
def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, operations: list[tuple[str, str]]) -> None:
    """Else a machine that loses its power could leave a name without a content, and the name says that all is done."""
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert operations == [("sync", "a.partial"), ("name", "a"), ("sync", tmp_path.name)]
    operations.clear()
    with atomic_write(tmp_path / "b", sync=False) as partial:
        partial.write_text("whole")
    assert operations == [("name", "b")]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the names of open files")
def test_a_pipeline_is_on_the_disk_before_it_gets_its_name(
    tiny: Diffusion, tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    save_pipeline(tiny, tmp_path / "model")
    named = operations.index(("name", "model"))
    before = {name for what, name in operations[:named] if what == "sync"}
    files = {file.name for file in (tmp_path / "model").rglob("*")}
    assert {"diffusion_pytorch_model.safetensors", "model_index.json", "unet"} <= files <= before
    assert ("sync", tmp_path.name) in operations[named:]


@pytest.mark.skipif(os.name == "nt", reason="Windows is not asked whether a file is on the disk")
def test_a_disk_that_is_found_full_late_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network folders say so when the content goes to the server."""
    file = tmp_path / "a"
    file.write_text("before")

    def failing(number: int) -> None:
        def sync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", sync)
        with atomic_write(file) as partial:
            partial.write_text("after")

    with pytest.raises(OSError, match=r"No space left") as problem:
        failing(errno.ENOSPC)
    assert problem.value.filename == str(file)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"a": "before"}
    failing(errno.EINVAL)  # some file systems have no such thing
    assert file.read_text() == "after"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_a_folder_without_locks_is_worked_in_with_a_warning(
    number: int, wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with only_process(tmp_path, wait=wait), atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    said = f"erase-concept: {tmp_path} lies on a file system without locks: start no other command in it"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_a_lock_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had it removes it at the end, while another one has opened it and does not hold it yet."""
    import fcntl

    lock, real, removed = tmp_path / ".lock", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(lock.unlink())
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_process(tmp_path):
        assert removed
        with pytest.raises(RequestError, match="another process is at work"), only_process(tmp_path):
            pass
    assert not lock.exists()


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


def test_a_kill_in_the_middle_of_a_file_of_tensors_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """safetensors writes into a file of its own beside the one that it was asked for."""
    file = tmp_path / "a.safetensors"
    write = "import sys, torch; from pathlib import Path; from erase_concept.files import atomic_write; "
    write += "from erase_concept.pipelines.formats.tensors import save_tensors; "
    write += "tensors = {'a': torch.ones(1 << 25)}; print(flush=True)\n"
    write += "with atomic_write(Path(sys.argv[1])) as partial: save_tensors(tensors, partial)"
    child = subprocess.Popen([sys.executable, "-c", write, str(file)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    while child.poll() is None and not any(tmp_path.glob("*.folder/*")):
        pass
    child.kill()
    child.communicate()
    assert any(tmp_path.rglob("*"))
    with atomic_write(file) as partial:
        save_tensors({"a": torch.ones(3)}, partial)
    assert [one.name for one in tmp_path.rglob("*")] == ["a.safetensors"]
    assert file.stat().st_size < 200


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    with pytest.raises(OSError, match="directory") as told, atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert told.value.filename == str(tmp_path / "a")


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


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside.txt", tmp_path / "in"
    outside.write_text("mine")
    inside.mkdir()
    for name in ("a.txt", "a.txt.partial"):
        (inside / name).symlink_to(outside)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (inside / "b.safetensors.partial.folder").symlink_to(tmp_path / "elsewhere")
    with atomic_write(inside / "a.txt") as partial:
        partial.write_text("new")
    assert outside.read_text() == "mine"
    assert (inside / "a.txt").read_text() == "new"
    assert not (inside / "a.txt").is_symlink()
    with atomic_write(inside / "b.safetensors") as partial:
        save_tensors({"a": torch.ones(1)}, partial)
    assert [one.name for one in (tmp_path / "elsewhere").iterdir()] == ["kept"]


PLAIN = {"a": [1, -2.5, True, None, "é 🪦", {"b": []}], "c": ""}
_NESTED = ("[" * 100 + "1" + "]" * 100, "nested deeper than 64 levels")
BAD_JSON = {
    "deep": _NESTED,
    "very deep": ("[" * 100_000, "nest"),
    "twice": ('{"a": 1, "b": {"x": 2, "x": 3}}', "the key 'x' is there twice"),
    "nan": ('{"a": NaN}', "NaN or infinite"),
    "infinite": ("[1e999]", "NaN or infinite"),
    "digits": ("9" * 5000, "not JSON"),
    "half": ('"\\ud800"', "half a character"),
    "many": ("[" + "0," * 2_500_001, "at most 2,500,000 values"),
    "none": ("", "not JSON"),
    "mark": ("\x00", "not JSON"),
}
BAD_YAML = {
    "deep": _NESTED,
    "very deep": ("[" * 100_000, "nest"),
    "twice": ("a: 1\nb: {x: 2, x: 3}", "the key 'x' is there twice"),
    "alias": ("a: &x [1]\nb: *x", r"has the alias \*x"),
    "merge": ("a: &x {b: 1}\nc: {<<: *x}", r"has the alias \*x"),
    "itself": ("&x [*x]", r"has the alias \*x"),
    "many": ("- 1\n" * 100_001, "more than 100,000 values"),
    "object": ("!!python/object/apply:os.system ['x']", "not YAML: could not determine a constructor"),
    "bool": ("!!bool x", "not YAML: KeyError"),
    "date": ("a: 2020-01-01", "a date in the place of a text"),
    "no date": ("a: 2020-13-45", "month"),
    "set": ("!!set {a}", "a set in the place of a text"),
    "bytes": ("!!binary aaaa", "a bytes in the place of a text"),
    "key": ("{1: 2}", "a key that is no text"),
    "nan": ("a: .nan", "NaN or infinite"),
    "half": ('"\\ud800"', "half a character|not YAML"),
    "control": ("a: \x00", "not YAML"),
}


def test_plain_data_come_back() -> None:
    assert parse_json(json.dumps(PLAIN)) == PLAIN
    assert parse_yaml(yaml.safe_dump(PLAIN)) == PLAIN
    assert parse_json("[" * 63 + "]" * 63)  # as deep as may be
    assert parse_yaml("") is None
    assert parse_json('"\\ud800"', half_characters=True) == "\ud800"


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_more_than_plain_data_is_refused(name: str) -> None:
    text, problem = BAD_JSON[name]
    with pytest.raises(ValueError, match=problem):
        parse_json(text)


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_is_more_than_plain_data_is_refused(name: str) -> None:
    text, problem = BAD_YAML[name]
    with pytest.raises(ValueError, match=problem):
        parse_yaml(text)


def test_texts_are_regular_files_in_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(file) == "a\nb"
    for content, problem in (
        (b"\xff\xfea", "no text in UTF-8: invalid start byte at byte 0"),
        (b"a" * 99, "larger than"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            read_text(file, 50)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for name, problem in (("pipe", "regular|No such"), (".", "directory"), ("gone", "No such"), ("\0", "null")):
        with pytest.raises(ValueError, match=problem):
            read_text(tmp_path / name)


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_ONE = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
BAD_TENSORS = {
    "short": (b"\0" * 7, "too short"),
    "large header": (struct.pack("<Q", 1 << 40), "header is too large"),
    "twice": (_safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(_ONE).encode(),) * 2), b"ab"), "'a' is there twice"),
    "overlapping": (_safetensors({"a": _ONE, "b": {**_ONE, "data_offsets": [1, 3]}}, b"abc"), "[Oo]ffset"),
    "beyond": (_safetensors({"a": {**_ONE, "data_offsets": [0, 2**40], "shape": [2**40]}}, b"ab"), "."),
    "huge": (_safetensors({"a": {**_ONE, "shape": [2**62, 2**62]}}, b"ab"), "."),
    "no text": (_safetensors(b"\xff\xff"), "no text in UTF-8"),
    "many": (_safetensors({str(n): {**_ONE, "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)}), "at most"),
    "no mapping": (_safetensors([1]), "."),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_damaged_safetensors_are_refused(name: str, tmp_path: Path) -> None:
    content, problem = BAD_TENSORS[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=problem), open_tensors(tmp_path / "x"):
        pass


def test_sound_safetensors_are_opened(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "x", {"k": "v"})
    with open_tensors(tmp_path / "x") as stored:
        assert stored.metadata() == {"k": "v"}
        assert stored.get_tensor("a").tolist() == [0, 1, 2]


def test_shapes_are_lists_of_sides() -> None:
    assert read_shapes('{"a": [2, 3], "b": []}') == {"a": (2, 3), "b": ()}
    for text in ("[]", '{"a": 1}', '{"a": [-1]}', '{"a": [true]}', '{"a": [2.0]}', '{"a": [16777216, 16777216]}', "x"):
        with pytest.raises(ValueError, match=r"shape|JSON"):
            read_shapes(text)


def test_all_tensors_are_written_so_that_a_kill_leaves_nothing() -> None:
    """Where the built-in models were made, nothing is written that a user has."""
    package, makers = Path(erase_concept.__file__).parent, ("emojinette", "fashion_ddpm")
    for folder in (package, package.parent / "pipelines", package.parent / "eval"):
        for file in folder.rglob("*.py"):
            if file.parent.name not in makers and "save_file(" in file.read_text(encoding="utf-8"):
                assert file.name in ("tensors.py", "make.py"), file
