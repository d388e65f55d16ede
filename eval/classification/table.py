"""Tables of unlearning methods: each metric over seeds, the gap to Retrain of the same seed, and the time it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import EraseError
from erase_concept.eval.classification.gap import OverSeeds, average_gap, gap_of_means, over_seeds, paired_gaps
from erase_concept.files import atomic_write, read_lines

_T = TypeVar("_T")
RETRAIN = "retrain"
TITLES = {"ua": "UA", "ra": "RA", "ta": "TA", "mia": "MIA", "mia_loss": "MIA, loss"}


@dataclass(frozen=True)
class Trial:
    """One method on one seed's original: what was forgotten, the tuned setting's multiplier, and what came of it.

    ``values`` are shares from 0 to 1 by metric. ``key`` tells settings apart. A trial that ``failed`` has no values.
    """

    forget: str
    method: str
    seed: int
    multiplier: float
    values: dict[str, float]
    seconds: float
    key: str
    failed: str = ""


@dataclass(frozen=True)
class Row:
    """A method's line of a table. Gaps are in the units of the values, ``seconds`` the mean time of a run."""

    method: str
    values: dict[str, OverSeeds]
    gap: OverSeeds
    gap_of_means: float
    seconds: float
    multiplier: float


def read_trials(file: Path, kind: type[_T]) -> list[_T]:
    """Read the trials of a file with one a line, an unfinished last line left out; none where there is no file.

    ``kind`` is the dataclass of a trial.
    """
    found = []
    lines = read_lines(file)
    for place, line in enumerate(lines, 1):
        try:
            found.append(TypeAdapter(kind).validate_json(line))
        except ValidationError as problem:
            if place == len(lines) and not line.endswith("\n"):
                break
            raise EraseError(f"{file}, line {place}: {problem.errors()[0]['msg']}") from None
    return found


def write_trial(trial: object, file: Path) -> None:
    """Add a trial, a dataclass, to a file, one a line, in the place of a last line that is unfinished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.read_bytes() if file.exists() else b""
    if not whole.endswith(b"\n"):
        with atomic_write(file) as partial:
            partial.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with file.open("ab") as stream:
        stream.write(TypeAdapter(type(trial)).dump_json(trial) + b"\n")


def best_multiplier(trials: Sequence[Trial], retrained: Trial) -> float:
    """Return the multiplier with the least average gap among one method's trials of a seed; of equals, that nearest 1.

    Where every trial failed it is the smallest.
    """
    done = [trial for trial in trials if not trial.failed]
    if not done:
        return min(trial.multiplier for trial in trials)
    return min(done, key=lambda one: (average_gap(one.values, retrained.values), abs(one.multiplier - 1))).multiplier


def rows(trials: Sequence[Trial]) -> list[Row]:
    """Return a line for each method of one kind of forgetting, Retrain first, then by the gap.

    Each trial is compared with Retrain of its seed. Raises EraseError where that is missing.
    """
    retrained = {trial.seed: trial for trial in trials if trial.method == RETRAIN}
    found = []
    for method in dict.fromkeys(trial.method for trial in trials):
        own = sorted((one for one in trials if one.method == method and not one.failed), key=lambda one: one.seed)
        if not own:
            continue
        if missing := [trial.seed for trial in own if trial.seed not in retrained]:
            raise EraseError(f"there is no trial of {RETRAIN} with seed {missing[0]} to compare {method} with")
        ours, theirs = [one.values for one in own], [retrained[one.seed].values for one in own]
        found.append(
            Row(
                method,
                {metric: over_seeds([one[metric] for one in ours]) for metric in TITLES},
                paired_gaps(ours, theirs),
                gap_of_means(ours, theirs),
                sum(one.seconds for one in own) / len(own),
                own[0].multiplier,
            )
        )
    return sorted(found, key=lambda row: (row.method != RETRAIN, row.gap.mean))


def table(found: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Return lines as a Markdown table, in per cent; ``titles`` are those of the methods."""
    head = ["method", *TITLES.values(), "average gap", "95 % interval", "gap of means", "seconds", "setting times"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            titles.get(row.method, row.method),
            *(_spread(row.values[metric]) for metric in TITLES),
            _spread(row.gap),
            "" if row.gap.ci95 is None else f"{max(0.0, 100 * row.gap.ci95[0]):.2f} to {100 * row.gap.ci95[1]:.2f}",
            f"{100 * row.gap_of_means:.2f}",
            f"{row.seconds:.1f}",
            f"{row.multiplier:g}",
        ]
        for row in found
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(found: Sequence[Row], published: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """Return as a Markdown table the methods by their gap, with that of a paper and their places in both."""
    ours = [row for row in found if row.method in published]
    places = {name: at for at, name in enumerate(sorted(published, key=lambda name: published[name]), 1)}
    lines = [["method", "place here", "gap here", "published place", "published gap"], ["---"] * 5]
    for at, row in enumerate(sorted(ours, key=lambda row: row.gap.mean), 1):
        theirs = [str(places[row.method]), f"{published[row.method]:.2f}"]
        lines.append([titles.get(row.method, row.method), str(at), f"{100 * row.gap.mean:.2f}", *theirs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(value: OverSeeds) -> str:
    return f"{100 * value.mean:.2f}" + ("" if value.sd is None else f" ± {100 * value.sd:.2f}")
