"""The command as a whole: exit codes, one clear line, nothing half-written, no torch for its help."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.text import Text

from erase_concept.cli import main as cli
from erase_concept.cli.flags import REPLACED
from erase_concept.errors import EraseError, RequestError

Command = Callable[..., tuple[int, str, str]]


def test_installed_command_answers() -> None:
    command = Path(sys.executable).with_name("erase-concept")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "erase", "mask", "mask-info", "sample", "eval", "report", "export", "list"):
        assert name in done.stdout


def test_one_of_several_processes_refuses_what_is_for_one_alone() -> None:
    """The first process of each machine says so: another machine may have another request, or other files."""
    refused = "processes 2: report works in one process; several share erase, eval, mask, "
    for rank, local, line in (("0", "0", refused), ("1", "1", ""), ("1", "0", refused)):
        command = [sys.executable, "-m", "erase_concept", "report", "run"]
        env = {**os.environ, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": local}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"erase-concept: {line}" if line else "")
        assert len(done.stderr.splitlines()) == len([line] if line else [])


@pytest.mark.parametrize(
    ("problem", "local", "said"),
    [
        (OSError(21, "Is a directory", "out/00004.png"), "1", "out/00004.png: Is a directory"),
        (EraseError("too little memory"), "1", "too little memory"),
        (EraseError("the loss is nan", of_all=True), "1", ""),
        (EraseError("the loss is nan", of_all=True), "0", "the loss is nan"),
        (RequestError("out", "x", "is wrong"), "1", ""),
        (RuntimeError("gloo: Connection closed by peer"), "0", "another process of this run has ended; if it gave no "),
    ],
)
def test_what_one_process_alone_may_know_it_says_itself(
    problem: Exception, local: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all of them raise alike the first of the machine says for all."""

    def fail(**given: object) -> None:
        raise problem

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(logging.getLogger("erase_concept"), "setLevel", lambda _: None)  # it would stay for later tests
    there = {"WORLD_SIZE": "2", "RANK": local, "LOCAL_RANK": local, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == (2 if isinstance(problem, OSError | RequestError) else 1)
    told = capsys.readouterr().err
    assert told.startswith(f"erase-concept: {said}") if said else not told


WRONG = {
    "unknown concept": (["erase", "model", "-c", "nudty", "-o", "x"], "--concept nudty: unknown concept; did you"),
    "concept twice": (
        ["erase", "model", "-c", "church", "-c", "church", "-o", "x"],
        "--concept church: 'church' is named twice",
    ),
    "no concept": (["erase", "model", "-o", "x"], "--concept (not given): needed"),
    "no model": (["erase", "absent", "-c", "square.yaml", "-o", "x"], "MODEL absent: no such model; allowed:"),
    "no pipeline": (["sample", ".", "-p", "emojinette", "-o", "x"], "MODEL .: the folder holds no model_index.json"),
    "bad setting": (["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "lrr=1"], "--set lrr=1: no such setting"),
    "no value": (["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "lr"], "--set lr: must be KEY=VALUE"),
    "bad part": (
        ["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "x.y=1"],
        "--set x.y: KEY is a setting of the method, ",
    ),
    "bad sparsity": (["erase", "model", "-c", "square.yaml", "-o", "x", "--sparsity", "2"], "--sparsity 2.0:"),
    "bad memory": (["erase", "model", "-c", "square.yaml", "-o", "x", "--memory", "y"], "--memory y: allowed: fast,"),
    "bad preset": (
        ["erase", "model", "-c", "square.yaml", "-o", "x", "--preset", "y"],
        "--preset y: allowed: default, paper, latest-code",
    ),
    "no images": (["erase", "model", "-c", "square.yaml", "-o", "x", "--forget-images", "no"], "no such folder"),
    "no mask": (["mask-info", "absent.safetensors"], "FILE absent.safetensors: not a readable mask"),
    "bad kind": (["mask", "model", "-c", "square.yaml", "-o", "x", "--mask", "none"], "--mask none: nothing"),
    "old flag": (["mask", "model", "-c", "square.yaml", "-o", "x", "--kind", "y"], "--kind: is now --mask"),
    "no prompts": (["sample", "model", "-p", "absent.csv", "-o", "x"], "--prompts absent.csv: no such file"),
    "empty prompts": (["sample", "model", "-p", "empty.csv", "-o", "x"], "the prompt set is empty"),
    "no report": (["report", "model", "-o", "x"], "model"),
    "not listed": (["list", "colours"], "WHAT colours: allowed: methods, guards"),
    "no such option": (["erase", "model", "--colour"], "--colour"),
    "no such command": (["erace"], "erace"),
    "bad number": (["sample", "model", "-p", "emojinette", "-o", "x", "--steps", "0"], "steps"),
    "no run": (["export", "model", "-o", "x"], "RUN model: holds no complete run"),
    "no delta": (["apply", "absent", "model", "-o", "x"], "DELTA absent: is not a readable delta"),
    "bad benchmark": (["eval", "model", "-b", "y", "-c", "church", "-o", "x"], "--benchmark y: unknown benchmark"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_get_one_line_and_2(folder: Path, command: Command, case: str) -> None:
    (folder / "empty.csv").write_text("prompt,seed\n")
    arguments, problem = WRONG[case]
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert problem in err
    assert len(err.strip().splitlines()) == 1
    assert not list(folder.rglob("*.partial*"))
    assert not (folder / "x" / "recipe.yaml").exists()  # the corrected request may use the same folder


def test_too_little_memory_gets_one_line_and_1(folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 2^19 pixels a side: torch's allocator refuses it at once, where the prompts' reader does not."""
    monkeypatch.setattr("erase_concept.prompts.promptset._LARGEST", 1 << 20)
    (folder / "p.csv").write_text("prompt,height,width\na,524288,524288\n")
    code, _, err = command("sample", "model", "-p", "p.csv", "-o", "x", "--steps", "1")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "too little memory" in err


@pytest.mark.parametrize("old", [*REPLACED])
def test_a_flag_that_is_gone_names_the_new_one(old: str, command: Command) -> None:
    start = {"--kind": ["mask", "model", "-o", "x"], "--strengths": ["compare", "-o", "x"]}.get(
        old, ["eval", "model", "-o", "x"]
    )
    code, _, err = command(*start, old, "1")
    assert (code, err) == (2, f"erase-concept: {old}: is now {REPLACED[old]}\n")


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["erase-concept", "--debug", "list", "colours"])
    with pytest.raises(RequestError, match="colours"):
        cli.main()


def test_an_interrupted_command_ends_with_130(folder: Path) -> None:
    """A real interrupt, as the terminal sends it, while images are sampled."""
    (folder / "p.csv").write_text("prompt,seed\n" + "".join(f"a square,{seed}\n" for seed in range(500)))
    asked = ["sample", "model", "-p", "p.csv", "-o", "images", "--batch-size", "1", "--steps", "20"]
    command = [sys.executable, "-m", "erase_concept", *asked]
    # Where the tests run in the background, interrupts are ignored, and a command would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        signal.signal(signal.SIGINT, before)
        while running.poll() is None and not list(folder.glob("images/*.png")):
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        try:
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, "the same command goes on from here" in err) == (130, True), err


@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt(), 130), (SystemExit(129), 129)])
@pytest.mark.parametrize("after", [OSError(5, "Input/output error"), SystemExit(1)])
def test_what_fails_after_a_signal_does_not_hide_it(
    signalled: BaseException,
    code: int,
    after: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A progress bar says so when its terminal is gone, or the pipe's other end."""

    def app(**_: object) -> None:
        try:
            raise signalled
        finally:
            raise after

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert "the same command goes on from here" in capsys.readouterr().err


def test_help_shows_all_that_is_in_brackets() -> None:
    """Rich takes them for its own tags, and shows nothing of one that is not escaped."""
    commands = typer.main.get_command(cli.app).commands
    for name, command in commands.items():
        for text in (command.help, *(getattr(one, "help", None) for one in command.params)):
            assert Text.from_markup(text or "").plain == (text or "").replace("\\[", "["), name
    done = subprocess.run(
        [sys.executable, "-m", "erase_concept", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "TERMINAL_WIDTH": "200"},
    )
    assert "erase-concept train 'resnet18-cifar[width=16,stride=2]' --data" in done.stdout


@pytest.mark.parametrize("asked", ["--help", "--version", "erase --help", "eval --help", "list --help"])
def test_help_loads_no_torch(asked: str) -> None:
    script = (
        "import sys; from erase_concept.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *asked.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
