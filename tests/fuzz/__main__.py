"""A long run: ``make fuzz``, or ``python -m fuzz`` in the folder ``tests``. It counts each reader's files."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ERASE_CONCEPT_CACHE"] = ""

from fuzz.feed import Feeder
from fuzz.readers import BY_NAME, READERS, Reader
from fuzz.watch import limited_memory

_ROUND = 50  # files of the right structure in a round


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
    found: Counter[tuple[str, str]] = Counter()

    def report(reader: Reader, content: bytes, problem: str) -> None:
        kind = (reader.name, problem[:120])
        found[kind] += 1
        if found[kind] <= 2:
            asked.keep.mkdir(parents=True, exist_ok=True)
            (asked.keep / f"{reader.name}--{hashlib.sha256(content).hexdigest()[:10]}").write_bytes(content)
            print(f"{reader.name}: {problem}", flush=True)

    end, start = time.monotonic() + 60 * asked.minutes, asked.seed * 1_000_000
    logging.getLogger("erase_concept").propagate = False  # a reader that warns of a damaged file does as it must
    with tempfile.TemporaryDirectory() as folder, limited_memory():
        feeders = [Feeder(reader, Path(folder) / reader.name, report) for reader in chosen]
        for feeder in feeders:
            for file in feeder.corpus():
                feeder.feed(file.read_bytes())
        while time.monotonic() < end and not 0 < asked.count <= sum(feeder.count for feeder in feeders):
            for feeder in feeders:
                while asked.pause and asked.pause.exists():
                    time.sleep(2)
                feeder.run(max(1, round(_ROUND * feeder.reader.weight)), start)
            start += 1
            if start % 20 == 0:
                print(f"{sum(feeder.count for feeder in feeders):,} files", flush=True)
    for feeder in feeders:
        print(f"{feeder.count:>10,}  {feeder.reader.name}")
    print(f"{sum(feeder.count for feeder in feeders):>10,}  in all; {len(found)} ways in which a reader broke")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
