"""A run's log: a line for each step, which agrees with the checkpoint that the run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write, parse_json, read_lines
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
    return [_loss(log, place, line) for place, line in enumerate(_whole_lines(log), 1)]


def _loss(log: Path, place: int, line: str) -> float:
    try:
        loss = parse_json(line)["loss"]
        if isinstance(loss, float | int) and not isinstance(loss, bool):
            return float(loss)
    except (ValueError, TypeError, KeyError):
        pass
    advice = "delete the file, and the run goes on from its checkpoint; 'verify' will miss the steps before"
    allowed = f"is damaged: line {place} is no step's record; {advice}"
    raise RequestError("log", log, allowed)


def _keep_log(log: Path, steps: int) -> None:
    """Drop log lines of steps that will be done again."""
    if log.exists():
        kept = _whole_lines(log)[:steps]
        with atomic_write(log) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def _whole_lines(log: Path) -> list[str]:
    """Return the lines of a log but for a last one that a kill cut short."""
    return [line for line in read_lines(log) if line.endswith("\n")]
