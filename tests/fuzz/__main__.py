"""A long run: ``make fuzz``, or ``python -m fuzz`` in the folder ``tests``. It counts each reader's files.

The readers take turns, each in a process of its own, so that what ends the process is found like anything else. In a
turn Hypothesis makes files of the right structure, and bytes of them are changed at random; then atheris changes bytes,
and goes on from the files that reached new code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ERASE_CONCEPT_CACHE"] = ""

GUIDED = importlib.util.find_spec("atheris") is not None
if GUIDED:
    import atheris
with atheris.instrument_imports(include=["erase_concept"]) if GUIDED else nullcontext():
    from fuzz.feed import Feeder
    from fuzz.readers import BY_NAME, READERS, Reader
    from fuzz.watch import limited_memory

_ROUND = 100  # files of the right structure in a turn, and with each some of changed bytes
_GUIDED = 1500  # files that atheris makes in a turn
_LONGEST = 1 << 16  # bytes of such a file


def structured(start: int) -> Callable[[Feeder], None]:
    """Return what feeds a reader with files that Hypothesis makes."""
    return lambda feeder: feeder.run(max(1, round(_ROUND * feeder.reader.weight)), start)


def guided(corpus: Path, start: int) -> Callable[[Feeder], None]:
    """Return what feeds a reader with files that atheris makes; those that reach new code are kept in a folder."""

    def feed(feeder: Feeder) -> None:
        corpus.mkdir(parents=True, exist_ok=True)
        known = len(list(corpus.iterdir()))
        for place, content in enumerate(feeder.seeds if not known else ()):
            (corpus / f"seed-{place}").write_bytes(content)
        runs = known + max(10, round(_GUIDED * feeder.reader.weight))
        # The time and memory of a reader are watched by ``broken_by``, and not by libFuzzer.
        options = {"runs": runs, "seed": start % (1 << 31), "max_len": _LONGEST, "timeout": 0, "rss_limit_mb": 0}
        options["verbosity"] = 0
        atheris.Setup(["fuzz", *(f"-{name}={value}" for name, value in options.items()), str(corpus)], feeder.feed)
        atheris.Fuzz()  # it ends the process

    return feed


class Run:
    """What was fed, and what broke."""

    def __init__(self, folder: Path, keep: Path) -> None:
        self.folder, self.keep = folder, keep
        self.counts: Counter[str] = Counter()
        self.guided = 0
        self.found: Counter[tuple[str, str]] = Counter()
        self._shared = mmap.mmap(-1, 8)  # a child's count

    def report(self, reader: Reader, content: bytes, problem: str) -> None:
        """Say what a reader did wrong, and keep the file; of each kind the first two."""
        kind = (reader.name, problem[:120])
        self.found[kind] += 1
        if self.found[kind] <= 2:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{reader.name}--{hashlib.sha256(content).hexdigest()[:10]}").write_bytes(content)
            print(f"{reader.name}: {problem}", flush=True)

    def turn(self, reader: Reader, feed: Callable[[Feeder], None]) -> int:
        """Feed a reader in a child, and return with how many files."""
        place = self.folder / reader.name
        shutil.rmtree(place, ignore_errors=True)
        self._shared[:] = bytes(8)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            self._feed(reader, place, writing, feed)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                content, problem = json.loads(line)
                self.report(reader, bytes.fromhex(content), problem)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            problem = f"ends the process: {signal.Signals(-status).name}"
            self.report(reader, (place / reader.file).read_bytes(), problem)
        elif status:
            raise SystemExit(f"the process that feeds {reader.name} failed with {status}")
        count: int = struct.unpack("q", self._shared)[0]
        self.counts[reader.name] += count
        return count

    def _feed(self, reader: Reader, place: Path, pipe: int, feed: Callable[[Feeder], None]) -> None:
        lines = os.fdopen(pipe, "w")

        def report(_: Reader, content: bytes, problem: str) -> None:
            print(json.dumps([content.hex(), problem]), file=lines, flush=True)

        class Counting(Feeder):
            def feed(self, content: bytes) -> None:
                super().feed(content)
                struct.pack_into("q", shared, 0, self.count)

        shared = self._shared
        feeder = Counting(reader, place, report)
        with limited_memory():
            feed(feeder)
        os._exit(0)


def main() -> int:
    """Feed all readers in turn until the time or the count is up; return 1 when one of them broke."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Feed every reader with hostile files.")
    parser.add_argument("--minutes", type=float, default=5, help="how long (default 5)")
    parser.add_argument("--count", type=int, default=0, help="stop after so many files")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other files")
    parser.add_argument("--readers", default="", help=f"some of: {', '.join(BY_NAME)}")
    parser.add_argument("--pause", type=Path, help="wait while this file exists")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="where to keep what broke a reader")
    asked = parser.parse_args()
    chosen = [BY_NAME[name] for name in asked.readers.split(",")] if asked.readers else READERS
    end, start = time.monotonic() + 60 * asked.minutes, asked.seed * 1_000_000
    logging.getLogger("erase_concept").propagate = False  # a reader that warns of a damaged file does as it must
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "fed", asked.keep)
        for reader in chosen:
            run.turn(reader, lambda feeder: [feeder.feed(file.read_bytes()) for file in feeder.corpus()])
        while time.monotonic() < end and not 0 < asked.count <= run.counts.total():
            for reader in chosen:
                while asked.pause and asked.pause.exists():
                    time.sleep(2)
                run.turn(reader, structured(start))
                if GUIDED:
                    run.guided += run.turn(reader, guided(Path(folder) / "corpora" / reader.name, start + 1))
            start += 1
            print(f"{run.counts.total():,} files", flush=True)
    for reader in chosen:
        print(f"{run.counts[reader.name]:>10,}  {reader.name}")
    ways = f"{run.guided:,} by atheris" if GUIDED else "none by atheris, which is not installed"
    print(f"{run.counts.total():>10,}  in all, {ways}; {len(run.found)} ways in which a reader broke")
    return 1 if run.found else 0


if __name__ == "__main__":
    raise SystemExit(main())
