"""A run's log: a line for each step, which agrees with the checkpoint that the run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from erase_concept.files import atomic_write
from erase_concept.training.checkpoint import steps_in
from erase_concept.training.loop import Record, TargetProgress


def checkpoint_file(out: Path) -> Path:
    """Return where a run keeps its last checkpoint."""
    return out / "checkpoints" / "last.safetensors"


def logged(out: Path, events: Iterator[Record | TargetProgress]) -> Iterator[Record | TargetProgress]:
    """Yield a method's events, and write each record to the log of the run in ``out``."""
    # MACE has a checkpoint for each of several concepts.
    _keep_log(out / "log.jsonl", steps_in(out / "checkpoints"))
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for record in events:
            if isinstance(record, Record):
                log.write(json.dumps(asdict(record)) + "\n")
                log.flush()
            yield record


def logged_losses(out: Path) -> list[float]:
    """Return the losses of the steps that an earlier process took, the first step first."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def _keep_log(log: Path, steps: int) -> None:
    """Drop log lines of steps that will be done again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
        with atomic_write(log) as partial:
            partial.write_text("".join(line for line in lines if line.endswith("\n")), encoding="utf-8")
