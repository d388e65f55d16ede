"""Feed readers with files: valid ones, those that once broke one, wrong values in the right structure, and bytes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from fuzz.mutate import mutated
from fuzz.readers import Reader
from fuzz.watch import broken_by
from hypothesis import HealthCheck, Phase, given, seed, settings

from erase_concept.errors import RequestError

CORPUS = Path(__file__).with_name("corpus")
_MUTATED = 12  # files of changed bytes for each of the right structure


class Feeder:
    """One reader in a folder of its own. ``report`` gets each content that broke it, with what it did wrong."""

    def __init__(self, reader: Reader, folder: Path, report: Callable[[Reader, bytes, str], None]) -> None:
        self.reader, self.report = reader, report
        self.file = folder / reader.file
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.seeds = reader.prepare(self.file.parent)
        self.count = 0
        for content in self.seeds:  # valid files are read: what is fed reaches the inside, and libraries are imported
            self._write(content)
            with nullcontext() if reader.accepts else suppress(RequestError):
                reader.read(self.file)

    def _write(self, content: bytes) -> None:
        self.file.unlink(missing_ok=True)  # it may be a link, which must not be written through
        self.file.write_bytes(content)

    def feed(self, content: bytes) -> None:
        self._write(content)
        self.count += 1
        with _strict_warnings():
            problem = broken_by(self.reader.read, self.file)
        if problem:
            self.report(self.reader, content, problem)

    def corpus(self) -> list[Path]:
        """The files that once broke this reader: their names begin with its own."""
        return sorted(CORPUS.glob(f"{self.reader.name}--*"))

    def run(self, structured: int, start: int, more: int = _MUTATED) -> None:
        """Feed ``structured`` files of the right structure, and ``more`` of changed bytes for each."""
        dice = random.Random(f"{self.reader.name} {start}")

        @seed(start)
        @settings(
            max_examples=structured, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(self.reader.structure)
        def each(content: bytes) -> None:
            self.feed(content)
            for _ in range(more):
                self.feed(mutated(dice.choice([content, *self.seeds]), [content, *self.seeds], dice))

        each()


@contextmanager
def _strict_warnings() -> Iterator[None]:
    """Let a warning be an error, but for what libraries warn of inside themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for library in ("diffusers", "transformers", "accelerate", "torch"):
            warnings.filterwarnings("ignore", module=library)
        yield
