"""Checks that a run's log has a line for each step: a training that ended early, or a log that was cut, lacks some."""

from __future__ import annotations

from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.eval.verify.check import Check, failed
from erase_concept.files import parse_json, read_lines

LOG = "log.jsonl"


def check_log(run: Path, asked: int | None = None) -> Check:
    """Check that a run's log has a line for each step, in order, to the last one.

    ``asked`` is how many steps the settings ask for, where they say it.
    """
    try:
        steps = [_step(place, line) for place, line in enumerate(read_lines(run / LOG), 1)]
    except (RequestError, OSError, ValueError) as problem:
        return failed(LOG, LOG, getattr(problem, "allowed", str(problem)))
    if not steps:
        return failed(LOG, LOG, "has no line, and a run writes one for each step")
    total = steps[0][1]
    for place, (step, of) in enumerate(steps, 1):
        if (step, of) != (place, total):
            return failed(LOG, LOG, f"line {place} is of step {step} of {of}, not of step {place} of {total}")
    if len(steps) != total:
        return failed(LOG, LOG, f"ends with step {len(steps)} of {total}")
    if asked not in (None, total):
        return failed(LOG, LOG, f"is of {total} steps, and the run's settings ask for {asked}")
    return Check(LOG, True, f"has a line for each step, {total} in all")


def _step(place: int, line: str) -> tuple[int, int]:
    """Return a line's step, and of how many it is one; raises ValueError where it is no step's record."""
    try:
        found = parse_json(line)
        step, steps = found["step"], found["steps"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"line {place} is no step's record") from None
    if not (type(step) is type(steps) is int):
        raise ValueError(f"line {place} is no step's record")
    return step, steps
