"""Progress bars on stderr, which vanish when their work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from erase_concept.pipelines.processes import main_process

_T = TypeVar("_T")


def bar() -> Progress:
    """Return a progress bar; of several processes only the main one shows it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    alone = main_process()
    return Progress(*columns, console=Console(stderr=True, quiet=not alone), transient=True, disable=not alone)


def progress(items: Iterable[_T], text: str, total: int | None = None) -> Iterator[_T]:
    """Yield the items while a bar under this text counts them; ``None`` means that their number is not known."""
    with bar() as shown:
        task = shown.add_task(text, total=total)
        for item in items:
            shown.advance(task)
            yield item
