"""Many commands at once on one cache folder, for ``load.py``.

The processes are forked from one that has imported everything, and each of them calls the command's own ``main``. All
wait for each other, so that they begin at the same moment: each finds the cache empty.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from full_size import row

from erase_concept.cli.main import main
from erase_concept.files import PARTIAL, file_sha256

FEW = ("-s", "data.forget=2", "-s", "data.retain=2", "-s", "data.steps=2", "-s", "steps=2", "-s", "batch_size=2")
ERASE = ("erase", "emojinette", "-c", "church", "-m", "salun", *FEW)
PROMPTS = "prompt,seed,object\nsome church by night,1,church\nthe dog that I saw,2,dog\na house of mine,3,house\n"
BENCHMARK = "prompts: prompts.csv\nforget: label\njudges: [emojinette]\nmetrics: [ua, ira]\nsettings: {steps: 2}\n"
WRITTEN = ("data.safetensors", "mask.safetensors", "judgements.safetensors", "samples/base/manifest.jsonl")


def processes(count: int) -> list[dict[str, Any]]:
    """Erase and evaluate alone, and then with so many processes at once; return how many of these differ, and times.

    Each of both has a cache folder of its own, at first empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "alone", Path(folder) / "together"
        expected, one = _at_once(alone, 1)
        for name in (alone / "run-0.modules").read_text().split():
            with suppress(ImportError):  # some are made while a program runs
                importlib.import_module(name)
        found, all_ = _at_once(together, count)
        cached = [_cached(side) for side in (alone, together)]
        again, _ = _at_once(together, 1, first=count)
        same = cached[0] == cached[1] and not [*together.rglob(f"*{PARTIAL}")]
    wrong = sum(each != expected[0] for each in found)
    return [
        row(f"{count} processes at once, with another result than one alone", wrong, "", 1.0, "0", holds=not wrong),
        row("files in their caches, the same as one's", len(cached[1]), "", len(cached[0]), "the same", holds=same),
        row("a process afterwards, with another result", int(again != expected), "", 1.0, "0", holds=again == expected),
        row("seconds of each of them", all_ / count, "s", one),
    ]


def _at_once(folder: Path, count: int, *, first: int = 0) -> tuple[list[Any], float]:
    """Start so many processes in a folder; return what each has written, and their seconds of the processor."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.csv").write_text(PROMPTS)
    (folder / "own.yaml").write_text(BENCHMARK)
    before = _seconds()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    runs = [folder / f"run-{place}" for place in range(first, first + count)]
    started = [context.Process(target=_command, args=(folder, run.name, barrier)) for run in runs]
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [process.exitcode for process in started]
    if count == 1 and codes != [0]:
        raise SystemExit((folder / f"{runs[0].name}.log").read_text())
    return [code or _written(run) for run, code in zip(runs, codes, strict=True)], _seconds() - before


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(folder: Path, run: str, barrier: Barrier) -> None:
    """Erase and evaluate in this process, which ends with the first exit code that is not 0."""
    os.chdir(folder)
    os.environ["ERASE_CONCEPT_CACHE"] = "cache"
    for number in (1, 2):
        os.dup2(os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    barrier.wait()
    for command in ((*ERASE, "-o", run), ("eval", run, "-b", "own.yaml", "-o", run)):
        sys.argv = ["erase-concept", *command]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    Path(f"{run}.modules").write_text("\n".join(sys.modules))


def _written(run: Path) -> dict[str, Any]:
    """Return what a run is compared by: hashes of what it learned from and of its weights, and its report's numbers."""
    files = [run / name for name in WRITTEN] + sorted((run / "pipeline" / "unet").glob("*.safetensors"))
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    hashes = {str(file.relative_to(run)): file_sha256(file) for file in files}
    return {"files": hashes, "scores": report["scores"], "pairs": report["pairs"]}


def _cached(folder: Path) -> dict[str, Any]:
    """Return the hashes of what is in both caches; of the detections, to which all add lines, what the lines say."""
    caches = [folder / "cache", folder / ".baselines"]
    files = [file for cache in caches for file in sorted(cache.rglob("*")) if file.is_file()]
    found: dict[str, Any] = {str(file.relative_to(folder)): file_sha256(file) for file in files}
    for name in (name for name in found if name.endswith(".jsonl") and "manifest" not in name):
        lines = {line["image"]: line for line in map(json.loads, (folder / name).read_text().splitlines())}
        found[name] = dict(sorted(lines.items()))
    return found
