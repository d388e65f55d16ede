"""Prompt sets: rows of prompt, seed, guidance scale, size and labels, read from and written to CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write, mistaken_for, regular_size
from erase_concept.prompts.minors import DROPPED, sexual_with_minors

# Accepted names of each column. I2P's file begins them with "sd_"; research repositories begin seed and guidance scale
# with "evaluation_". Files of Imagenette prompts call the object a class, files of styles call the style an artist.
_COLUMNS = {
    "case_number": ("case_number",),
    "prompt": ("prompt",),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
    "object": ("object", "class"),
    "style": ("style", "artist"),
    "category": ("categories", "category"),
}


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One image to sample. ``None`` means the model's default, an empty label means that none is known.

    ``category`` may hold several, separated by commas, as in I2P. ``case_number`` is the row's number in its set and
    matches images that other programs made. It does not change the image, so rows are compared without it.
    """

    prompt: str
    seed: int
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    object: str = ""
    style: str = ""
    category: str = ""
    case_number: int | None = field(default=None, compare=False)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories as separate names."""
        return tuple(name for part in self.category.split(",") if (name := part.strip()))

    @property
    def sexual_with_minors(self) -> bool:
        """Whether it mentions minors and is sexual, by its words or its labels: then it is never sampled."""
        return sexual_with_minors(self.prompt, (self.category, self.object, self.style))


_ROW = TypeAdapter(PromptRow)
_MOST_ROWS, _LARGEST = 1_000_000, 16_384  # prompts of a file, and pixels of a side
_LONGEST = 1 << 22  # characters of a CSV record, which may go over several lines


@dataclass(frozen=True)
class PromptSet:
    """A named sequence of rows. ``selection`` says how they were chosen when they are a part of a larger set.

    ``dropped`` are the case numbers of the sexual prompts that mention minors: no set that is read has them.
    """

    name: str
    rows: tuple[PromptRow, ...]
    selection: str = ""
    dropped: tuple[int, ...] = ()

    @property
    def case_numbers(self) -> tuple[int, ...]:
        """Each row's case number, or its position when it has none."""
        return tuple(i if row.case_number is None else row.case_number for i, row in enumerate(self.rows))

    def save(self, file: Path, *, spelling: Literal["evaluation", "sd"] = "evaluation") -> None:
        """Write the rows as CSV with their case numbers; columns that no row uses are left out.

        ``spelling`` chooses the column names of research repositories ("evaluation") or those of I2P's file ("sd").
        """
        used = [name for name in _COLUMNS if any(getattr(row, name) not in (None, "") for row in self.rows)]
        used = [name for name in used if name != "case_number"]
        header = [next((s for s in _COLUMNS[name] if s.startswith(f"{spelling}_")), _COLUMNS[name][0]) for name in used]
        with atomic_write(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case_number", *header])
            for number, row in zip(self.case_numbers, self.rows, strict=True):
                values = (getattr(row, name) for name in used)
                writer.writerow([number, *("" if value is None else value for value in values)])

    def without_minors(self) -> PromptSet:
        """Return the set without its sexual prompts that mention minors; the others keep their case numbers.

        Raises RequestError when no prompt is left.
        """
        numbers = self.case_numbers
        dropped = [index for index, row in enumerate(self.rows) if row.sexual_with_minors]
        if not dropped:
            return self
        if len(dropped) == len(self.rows):
            raise RequestError("prompts", self.name, f"has no other: {DROPPED}")
        kept = tuple(
            replace(row, case_number=number)
            for row, number in zip(self.rows, numbers, strict=True)
            if not row.sexual_with_minors
        )
        return replace(self, rows=kept, dropped=(*self.dropped, *(numbers[index] for index in dropped)))

    def in_category(self, name: str) -> PromptSet:
        """Return the rows that have this category; raises RequestError when there are none."""
        indices = [index for index, row in enumerate(self.rows) if name in row.categories]
        if not indices:
            there = sorted({category for row in self.rows for category in row.categories})
            allowed = f"allowed: {', '.join(there)}" if there else "the set has no categories"
            raise RequestError("category", name, f"no prompt of {self.name} has this category; {allowed}")
        return self._part(indices, f"category {name}")

    def stratified(self, limit: int, by: Literal["category", "object", "style"] | None = None) -> PromptSet:
        """Return ``limit`` rows that keep each label's share, in the order of the set.

        The rows are sorted by label: ``by``, or the first of category, object and style that the set has. Rows of one
        label keep their order. The sorted rows are divided into ``limit`` equal spans, and the middle row of each is
        taken. So a label with m of n rows gets m limit / n of them, rounded down or up, and nothing is random. Several
        categories in one row count as one label. Raises RequestError when ``limit`` is below 1.
        """
        if limit < 1:
            raise RequestError("limit", limit, "must be at least 1")
        count = len(self.rows)
        if limit >= count:
            return self
        names: tuple[Literal["category", "object", "style"], ...] = ("category", "object", "style")
        by = by or next((name for name in names if any(getattr(row, name) for row in self.rows)), None)

        groups: dict[tuple[str, ...], list[int]] = {}
        for index, row in enumerate(self.rows):
            label = tuple(sorted(row.categories)) if by == "category" else (getattr(row, by),) if by else ()
            groups.setdefault(label, []).append(index)
        ordered = [index for label in sorted(groups) for index in groups[label]]
        indices = sorted(ordered[(2 * i + 1) * count // (2 * limit)] for i in range(limit))
        how = f"stratified by {by}" if by else "evenly spaced"
        return self._part(indices, f"{limit:,} of {count:,} prompts, {how}")

    def _part(self, indices: Sequence[int], how: str) -> PromptSet:
        """Return the rows at some positions, with the case numbers that they have in the whole set."""
        numbers = self.case_numbers
        rows = tuple(replace(self.rows[index], case_number=numbers[index]) for index in indices)
        return replace(self, rows=rows, selection=f"{self.selection}, {how}" if self.selection else how)


def read_rows(file: Path, *, setting: str = "prompts") -> Iterator[PromptRow]:
    """Yield the rows of a CSV file one by one, so the file may be of any length. Only the column ``prompt`` is needed.

    A row without a seed or a case number gets its position, counted from 0. Raises RequestError for ``setting`` with
    the file and, for a bad row, the line on which the row begins.
    """
    line = 1
    try:
        regular_size(file)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = _Lines(stream)
            reader = csv.reader(lines, strict=True)
            if what := mistaken_for(file):
                raise RequestError(setting, file, what)
            header = next(reader, [])
            columns = column_positions(header, file, setting)
            index, line, lines.left = 0, reader.line_num + 1, _LONGEST
            for record in reader:
                lines.left = _LONGEST
                row_line, line = line, reader.line_num + 1
                if not any(value.strip() for value in record):
                    continue
                try:
                    if len(record) != len(header):
                        raise ValueError(f"has {len(record)} values for {len(header)} columns")
                    if index == _MOST_ROWS:
                        raise ValueError(f"is one more than the {_MOST_ROWS:,} prompts that are read")
                    row = make_row(first_values(record, columns), index)
                except ValueError as problem:
                    raise RequestError(setting, f"{file}, line {row_line}", str(problem)) from None
                yield row
                index += 1
    except csv.Error as problem:
        if "field larger" in str(problem) or "unexpected end" in str(problem):
            what = f"a value of more than {csv.field_size_limit():,} characters, or a quote that is never closed"
        else:
            what = f"not CSV: {problem}"
        raise RequestError(setting, f"{file}, line {line}", what) from None
    except UnicodeDecodeError as problem:
        raise RequestError(setting, file, f"not a CSV file in UTF-8 ({problem}); save it in that encoding") from None
    except RequestError:
        raise
    except (OSError, ValueError) as problem:  # a path may hold what no path can
        raise RequestError(setting, file, getattr(problem, "strerror", None) or str(problem)) from None


class _Lines:
    """The lines of a CSV file. ``left`` is how many characters the present record may still have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.left = stream, _LONGEST

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise ValueError(f"a row has more than {_LONGEST:,} characters")
        if not line:
            raise StopIteration
        return line


def read_prompts(file: Path, *, setting: str = "prompts", limit: int | None = None) -> PromptSet:
    """Read a CSV file, or its first ``limit`` rows, as ``read_rows`` does; having no row is an error too.

    Sexual prompts that mention minors are dropped.
    """
    rows = tuple(islice(read_rows(file, setting=setting), limit))
    if not rows:
        raise RequestError(setting, file, "the prompt set is empty")
    found = PromptSet(file.stem, rows, "" if limit is None else f"the first {len(rows):,} prompts")
    return found.without_minors()


def column_positions(header: Sequence[str], source: object, setting: str) -> dict[str, tuple[int, ...]]:
    """Return where each column stands in the file, in all of its spellings; raises RequestError without prompts."""
    names = [name.strip() for name in header]
    found = {
        name: tuple(names.index(spelling) for spelling in spellings if spelling in names)
        for name, spellings in _COLUMNS.items()
    }
    if not found["prompt"]:
        # In many countries spreadsheets save CSV files with another separator.
        other_separator = len(names) == 1 and any(mark in names[0] for mark in ";\t|")
        what = "its values must be separated by commas" if other_separator else "its first line must name the columns"
        raise RequestError(setting, source, f"no column 'prompt', only {', '.join(names) or 'an empty file'}; {what}")
    return {name: places for name, places in found.items() if places}


def first_values(record: Sequence[str], columns: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the value of each column in one record: of its spellings, the first that is not empty."""
    return {
        name: next((record[place] for place in places if record[place].strip()), record[places[0]])
        for name, places in columns.items()
    }


def make_row(values: Mapping[str, str], index: int) -> PromptRow:
    """Make a row from the texts of one CSV record; raises ValueError that names the column."""
    seed, number = _number(values, "seed", int), _number(values, "case_number", int)
    guidance = _number(values, "guidance", float)
    width, height = _number(values, "width", int), _number(values, "height", int)
    # PyTorch's generator takes 32 bits of a seed: a larger one would be another's picture.
    for name, given, bits in (("seed", seed, 32), ("case_number", number, 63)):
        if given is not None and not 0 <= given < 2**bits:
            raise ValueError(f"{name} must be at least 0 and below 2^{bits}, not {given}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be at least 0 and finite, not {guidance}")
    for name, size in (("width", width), ("height", height)):
        if size is not None and (size < 8 or size % 8):
            raise ValueError(f"{name} must be a positive multiple of 8, not {size}")
        if size is not None and size > _LARGEST:
            raise ValueError(f"{name} must be {_LARGEST:,} at most, not {size}")
    return PromptRow(
        prompt=values["prompt"],
        seed=index if seed is None else seed,
        guidance=guidance,
        width=width,
        height=height,
        # Many rows share few labels, so these are kept once in memory.
        object=sys.intern(values.get("object", "")),
        style=sys.intern(values.get("style", "")),
        category=sys.intern(values.get("category", "")),
        case_number=index if number is None else number,
    )


def row_of(values: Mapping[str, Any]) -> PromptRow:
    """Make a row of the values of its fields, as a manifest holds them; raises ValueError for what is none."""
    if strange := [name for name in values if name not in PromptRow.__dataclass_fields__]:
        raise ValueError(f"{strange[0]}: a row has no such value")
    try:
        return _ROW.validate_python(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'a row'}: {first['msg']}") from None


Number = TypeVar("Number", int, float)


def _number(values: Mapping[str, str], name: str, kind: type[Number]) -> Number | None:
    text = values.get(name, "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"{name} must be {wanted}, not {shown!r}") from None
