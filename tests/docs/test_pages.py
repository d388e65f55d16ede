"""Every command and every Python example in README.md and docs/ is run as printed, on the built-in model.

The blocks of a page are run in order, in a folder that holds ``runs/church``: the built-in model with "church" erased,
and its report. The demo's own folder is there too, so it is not made again. Every command and every Python block has a
process of its own, a fork of one that has imported everything. Three comments before a block say otherwise:

    <!-- not run: REASON -->    the block is only shown
    <!-- dry run: REASON -->    its ``erase`` commands are run with ``--dry-run``, which checks all but the training
    <!-- file: NAME -->         the block is a file that the page's later commands use
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if not {"build", "notebooks"} & set(page.relative_to(ROOT).parts)
)
BLOCK = re.compile(r"^(?:<!-- (not run|dry run|file): ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
RUN = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": ["block"]}
DRY_RUN = """erase-concept() { if [ "$1" = erase ]; then set -- "$@" --dry-run; fi; command erase-concept "$@"; }"""
PRELOADED = Path(__file__).with_name("preloaded.py")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and text, and what the comment before it says."""

    language: str
    text: str
    mark: str
    said: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, text, mark, said.strip()) for mark, said, language, text in found]


def runs(page: Path) -> bool:
    return any(block.language in RUN and block.mark != "not run" for block in blocks(page))


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of two commands, ``erase-concept`` and ``block``, which a process that has imported all runs."""
    folder = tmp_path_factory.mktemp("commands")
    for name, what in (("erase-concept", "cli"), ("block", "python")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {PRELOADED} run {folder}/socket {what} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(PRELOADED), "serve", str(folder / "socket")]
    with subprocess.Popen(command, env=environment) as process:
        while not (folder / "socket").exists():
            assert process.poll() is None, "the process that runs the commands has ended"
            time.sleep(0.1)
        yield folder
        process.terminate()


def run(block: Block, folder: Path, commands: Path, cache: Path) -> None:
    plugins = folder / "plugins"  # where `pip install .` of a page's own package goes
    environment = os.environ | {
        "PATH": os.pathsep.join((str(commands), str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(plugins), os.environ.get("PYTHONPATH")))),
        "PIP_TARGET": str(plugins),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which means: without isolation, so nothing is downloaded
        "PIP_QUIET": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "ERASE_CONCEPT_CACHE": str(cache),  # most pages learn from the same pictures
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    text = block.text
    if block.mark == "dry run":
        text = f"{DRY_RUN}\n{text}"
    done = subprocess.run(
        [*RUN[block.language], text], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_page_runs_as_printed(page: Path, demo_run: Path, commands: Path, tmp_path: Path) -> None:
    cache = demo_run.parent / "cache"
    for name in ("demo-church", "church"):
        shutil.copytree(demo_run, tmp_path / "runs" / name)
    for block in blocks(page):
        if block.mark == "file":
            file = tmp_path / block.said
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language in RUN and block.mark != "not run":
            run(block, tmp_path, commands, cache)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_is_not_run_says_why(page: Path) -> None:
    """A block that is not run, or only checked, has a reason of at least two words."""
    for block in blocks(page):
        if block.mark in ("not run", "dry run"):
            assert len(block.said.split()) > 1, block
    text = page.read_text(encoding="utf-8")
    comments = len(re.findall(r"^<!-- (?:not run|dry run|file): ", text, re.M))
    assert comments == sum(bool(block.mark) for block in blocks(page)), "a comment without its block right below it"
