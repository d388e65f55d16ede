"""What is said where processes do not find each other, or one that is alone is told that it is one of several."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from erase_concept.errors import EraseError
from erase_concept.pipelines.processes import first_of_machine, from_main, lost_process, main_process


def test_a_port_that_is_in_use_is_told_from_a_process_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    with pytest.raises(RuntimeError) as problem:
        TCPStore("127.0.0.1", store.port, 2, True, timeout=timedelta(seconds=1), wait_for_workers=False)
    assert lost_process(problem.value).startswith(f"port {store.port} is in use: choose another one")


def test_other_errors_are_no_lost_process() -> None:
    assert lost_process(RuntimeError("Connection closed by peer [127.0.0.1]:5")).startswith("another process of this")
    assert not lost_process(RuntimeError("shapes do not fit"))
    assert not lost_process(ConnectionResetError("connection reset by peer"))


def test_what_the_first_process_raises_is_of_all() -> None:
    """And it stays so on its way to the others."""

    def fail() -> None:
        raise EraseError("a full disk")

    with pytest.raises(EraseError) as problem:
        from_main(fail)
    assert problem.value.of_all
    copied = pickle.loads(pickle.dumps(problem.value))
    assert (str(copied), copied.of_all) == ("a full disk", True)
    assert not EraseError("a full disk").of_all


def test_who_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of all, or of its machine; and one that is alone, whatever number a scheduler gave it."""
    for there, main, first in (
        ({}, True, True),
        ({"RANK": "3"}, True, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, True, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, False, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, False, True),
        ({"RANK": "2", "WORLD_SIZE": "4"}, False, False),
    ):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        assert (main_process(), first_of_machine()) == (main, first), there


@pytest.mark.parametrize(
    ("asked", "alone"), [(("--cpu", "2"), True), (("--cpu", "1"), False), (("--multi_gpu", "2"), False)]
)
def test_a_launcher_that_starts_one_process_is_told(asked: tuple[str, str], alone: bool, tmp_path: Path) -> None:
    """Accelerate's own launcher sets what it is told by."""
    script = tmp_path / "told.py"
    script.write_text("from erase_concept.pipelines.processes import launched_alone; print('alone:', launched_alone())")
    kind, count = asked
    command = [
        "-m",
        "accelerate.commands.launch",
        kind,
        "--num_processes",
        count,
        "--main_process_port",
        "0",
        str(script),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert f"alone: {alone}" in done.stdout, done.stderr
