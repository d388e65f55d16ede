"""Runs the command in forked children, each with a fault at an exact operation on a file; imports happen once.

A line of JSON on stdin asks for a child, or lets a stopped one go on; a line on stdout says how it ended.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from erase_concept.classification import run as _unlearning  # noqa: F401 - imported before any child is forked
from erase_concept.cli.main import main
from erase_concept.eval import evaluate as _evaluation  # noqa: F401 - imported before any child is forked
from erase_concept.eval.compare import sweep
from erase_concept.run import erase as _erasing  # noqa: F401

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "shutil.rmtree"}
CREATES = {"os.mkdir", "os.link"}


class InThisProcess:
    """In the place of the pool of a comparison, whose server would import everything anew for each child."""

    _processes = None

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *values: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*values))
        return done


class Faults:
    """Counts the operations on files below the working folder, and does its harm at one of them."""

    def __init__(self, harm: str, at: int, count: Path) -> None:
        self.harm, self.at, self.counted = harm, at, {"write": 0, "create": 0, "read": 0}
        self.here, self.count, self.on = Path.cwd(), count, True

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.on or not (event in WRITES or event == "open"):
            return
        path = values[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = Path(os.fsdecode(path))
        if path.is_absolute() and not path.is_relative_to(self.here):
            return
        written = event != "open" or bool((values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not written and not path.is_file():
            return
        self.counted["write" if written else "read"] += 1
        self.counted["create"] += event in CREATES or (event == "open" and written)
        self._harm(event, path, written)

    def _harm(self, event: str, path: Path, written: bool) -> None:
        if self.harm in ("kill", "stop", "interrupt", "terminate") and written and self.counted["write"] == self.at:
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
            os.kill(os.getpid(), number.get(self.harm, signal.SIGTERM))
        elif self.harm == "full" and written and (event in CREATES or event == "open"):
            if self.counted["create"] >= self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        elif self.harm == "vanish" and not written and self.counted["read"] == self.at:
            self.on = False
            path.unlink()
            self.on = True


def run(asked: dict[str, Any]) -> None:
    """Run a command in this child, and end it."""
    code, folder = 99, Path(asked["told"])
    os.chdir(asked["folder"])
    os.environ["ERASE_CONCEPT_CACHE"] = "cache"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked.get("largest") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest"], resource.RLIM_INFINITY))
    if asked.get("nobody"):
        os.setuid(65534)
    sweep.processes_for_trials = InThisProcess  # type: ignore[assignment,misc]
    # A comparison asks for it by this name.
    importlib.import_module("erase_concept.eval.compare.compare").processes_for_trials = InThisProcess
    before = set(sys.modules)
    faults = Faults(asked.get("harm", ""), asked.get("at", 0), folder / "count")
    sys.addaudithook(faults)
    sys.argv = ["erase-concept", *asked["command"]]
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    faults.on = False
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if not asked.get("nobody"):
        new = sorted(name for name in set(sys.modules) - before if "." in name or not name.startswith("_"))
        (folder / "count").write_text(json.dumps({"operations": faults.counted, "modules": new}))
    os._exit(code)


def wait(child: int, deadline: float | None) -> dict[str, Any]:
    """Wait for a child's end, or until it stops itself; kill it at the deadline."""
    while True:
        found, status = os.waitpid(child, os.WUNTRACED | (0 if deadline is None else os.WNOHANG))
        if found:
            if os.WIFSTOPPED(status):
                return {"stopped": child}
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() > (deadline or 0):
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


def start(asked: dict[str, Any]) -> tuple[int, int, int]:
    """Fork a child; return its number, and pipes of its stdout and stderr: a full disk does not cut those short."""
    pipes = [os.pipe(), os.pipe()]
    child = os.fork()
    for number, (reading, writing) in enumerate(pipes, 1):
        if not child:
            os.dup2(writing, number)
            os.close(reading)
        else:
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 1 << 20)  # read at the child's end alone
        os.close(writing)
    if not child:
        run(asked)
    return child, pipes[0][0], pipes[1][0]


def said(pipe: int) -> str:
    """Return all that an ended child wrote."""
    with os.fdopen(pipe, errors="replace") as stream:
        return stream.read()


def serve() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    children: dict[int, tuple[Path, int, int]] = {}
    for line in requests:
        asked = json.loads(line)
        began = time.monotonic()
        child = asked.get("go_on")
        if child is None:
            child, *pipes = start(asked)
            children[child] = Path(asked["told"]), *pipes
        else:
            os.kill(child, signal.SIGCONT)
        ended = wait(child, None if asked.get("after") is None else began + asked["after"])
        if "code" in ended:
            folder, out, err = children.pop(child)
            ended |= {"out": said(out), "err": said(err)}
            if (folder / "count").is_file():
                count = json.loads((folder / "count").read_text())
                (folder / "count").unlink()
                ended["operations"] = count["operations"]
                for name in count["modules"]:  # the next child need not import them
                    try:
                        importlib.import_module(name)
                    except Exception:
                        continue
        ended["seconds"] = time.monotonic() - began
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
