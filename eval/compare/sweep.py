"""Run many trials, each in a process of its own. A result is a line of ``trials.jsonl`` and is not measured again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import EraseError
from erase_concept.eval.compare.keys import trial_key
from erase_concept.eval.compare.trials import Trial, TrialContext, TrialResult, prepare_trial, run_trial
from erase_concept.files import append_lines, only_process, read_lines

RESULTS = "trials.jsonl"
_LINE = TypeAdapter(TrialResult)
_PRELOADED = ("erase_concept.run", "erase_concept.methods", "erase_concept.eval.evaluate")


def read_results(file: Path) -> list[TrialResult]:
    """Return the results in a file. A line that a kill cut short, or that another version wrote, does not count."""
    found = []
    for text in read_lines(file):
        try:
            found.append(_LINE.validate_json(text))
        except ValidationError:
            continue
    return found


def append_result(file: Path, result: TrialResult) -> None:
    """Add a line."""
    append_lines(file, [json.dumps(asdict(result), ensure_ascii=False) + "\n"])


def processes_for_trials() -> ProcessPoolExecutor:
    """Return a pool whose every task runs in a process of its own.

    A server imports once and forks a fresh process for each task. So no trial sees another's memory, and each has a
    peak of its own. Where there is no such server, each process starts from nothing.
    """
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload(list(_PRELOADED))
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process when the one that began it ends: the same command, run again, works in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def ended_at_once(processes: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """Close a pool at the end; after an error or a signal its process is not waited for, but ended."""
    with processes:
        try:
            yield processes
        except BaseException:
            for process in list((processes._processes or {}).values()):
                process.terminate()
            raise


def run_trials(context: TrialContext, trials: Iterable[Trial]) -> Iterator[TrialResult]:
    """Yield the result of each trial in order, and measure those that ``trials.jsonl`` does not have.

    A trial whose recipe was measured under another name has that result. Raises RequestError, before anything is
    measured, when a recipe or the benchmark cannot be followed or another process works in the folder, and EraseError
    when a process dies. An erasure that fails is a result.
    """
    trials = list(trials)
    keys = {trial: trial_key(context, trial) for trial in trials}
    file = context.folder / RESULTS
    done = {result.key: result for result in read_results(file)}
    context.folder.mkdir(parents=True, exist_ok=True)
    with only_process(context.folder), ended_at_once(processes_for_trials()) as processes:
        for trial in trials:
            key = keys[trial]
            if key not in done:
                try:
                    processes.submit(prepare_trial, context, trial).result()
                    done[key] = processes.submit(run_trial, context, trial, key).result()
                except BrokenProcessPool:
                    raise EraseError(f"the process of {trial.label} died, perhaps for want of memory") from None
                append_result(file, done[key])
            yield replace(done[key], trial=trial)
