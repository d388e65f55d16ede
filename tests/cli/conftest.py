"""The command in this process, and a working folder with a tiny model and a concept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erase_concept.cli import main as cli
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.model import Diffusion

CONCEPT = "name: square\nkind: custom\nanchor: circle\ntemplates: ['a {O}']\nretain: [circle, line]\n"


@pytest.fixture
def folder(tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and a concept in it."""
    save_pipeline(tiny, tmp_path / "model")
    (tmp_path / "square.yaml").write_text(CONCEPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small() -> list[str]:
    """Options for a run of two steps."""
    settings = ("steps=2", "batch_size=2", "data.forget=2", "data.retain=2", "data.steps=2")
    return [part for setting in settings for part in ("-s", setting)]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command in this process; it returns the exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["erase-concept", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call
