"""Prompt sets: rows of prompt, seed, guidance scale, size and labels, read from and written to CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write

# Accepted spellings of each column. I2P's own begin with "sd_", and the research repositories' seed and guidance scale
# with "evaluation_"; Imagenette's prompts name a class, and those of styles an artist.
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
    """One image to be made. ``None`` leaves a value to the model's default; an empty label means none is known.

    ``category`` may hold several, with commas between them, as I2P's do. ``case_number`` is the row's number in its
    set, by which images made elsewhere are found; it is no part of what is asked, so rows are equal without it.
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
        """The categories one by one."""
        return tuple(name for part in self.category.split(",") if (name := part.strip()))


@dataclass(frozen=True)
class PromptSet:
    """A named sequence of rows; ``selection`` says how they were chosen where they are a part of a set."""

    name: str
    rows: tuple[PromptRow, ...]
    selection: str = ""

    @property
    def case_numbers(self) -> tuple[int, ...]:
        """Each row's case number, or its place where it has none."""
        return tuple(i if row.case_number is None else row.case_number for i, row in enumerate(self.rows))

    def save(self, file: Path, *, spelling: Literal["evaluation", "sd"] = "evaluation") -> None:
        """Write the rows as CSV, with a case number per row; columns that no row uses are left out.

        ``spelling`` names seed and guidance scale as the research repositories or as I2P's own file does.
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

    def in_category(self, name: str) -> PromptSet:
        """Return the rows of one category, alone or among others; raises RequestError when there are none."""
        places = [place for place, row in enumerate(self.rows) if name in row.categories]
        if not places:
            there = sorted({category for row in self.rows for category in row.categories})
            allowed = f"allowed: {', '.join(there)}" if there else "the set has no categories"
            raise RequestError("category", name, f"no prompt of {self.name} is of it; {allowed}")
        return self._part(places, f"category {name}")

    def stratified(self, limit: int, by: Literal["category", "object", "style"] | None = None) -> PromptSet:
        """Return ``limit`` rows in which every label has its share, in the order of the set.

        The rows are ordered by label (``by``, or the first of the three that the set has) and, within one, as they
        stand; from each of ``limit`` equal spans of that order the middle row is taken. So a label with m of n rows
        gets m limit / n of them, rounded down or up, and nothing is left to chance. Several categories of one row count
        as a label of their own. Raises RequestError when ``limit`` is below 1.
        """
        if limit < 1:
            raise RequestError("limit", limit, "must be at least 1")
        count = len(self.rows)
        if limit >= count:
            return self
        names: tuple[Literal["category", "object", "style"], ...] = ("category", "object", "style")
        by = by or next((name for name in names if any(getattr(row, name) for row in self.rows)), None)

        groups: dict[tuple[str, ...], list[int]] = {}
        for place, row in enumerate(self.rows):
            label = tuple(sorted(row.categories)) if by == "category" else (getattr(row, by),) if by else ()
            groups.setdefault(label, []).append(place)
        ordered = [place for label in sorted(groups) for place in groups[label]]
        places = sorted(ordered[(2 * i + 1) * count // (2 * limit)] for i in range(limit))
        how = f"stratified by {by}" if by else "evenly spaced"
        return self._part(places, f"{limit:,} of {count:,} prompts, {how}")

    def _part(self, places: Sequence[int], how: str) -> PromptSet:
        """Return some of the rows, under the case numbers that they have in the whole set."""
        numbers = self.case_numbers
        rows = tuple(replace(self.rows[place], case_number=numbers[place]) for place in places)
        return PromptSet(self.name, rows, f"{self.selection}, {how}" if self.selection else how)


def read_rows(file: Path, *, setting: str = "prompts") -> Iterator[PromptRow]:
    """Yield the rows of a CSV file with at least a ``prompt`` column, one by one, so that it may be of any length.

    A row without a seed or a case number gets its place, counted from 0. Raises RequestError naming the file, and the
    line on which the row begins where one is at fault.
    """
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            columns = known_columns(header, file, setting)
            place, line = 0, reader.line_num + 1
            for record in reader:
                begun, line = line, reader.line_num + 1
                if not record:
                    continue
                try:
                    if len(record) != len(header):
                        raise ValueError(f"has {len(record)} values for {len(header)} columns")
                    row = make_row({name: record[column] for name, column in columns.items()}, place)
                except ValueError as problem:
                    raise RequestError(setting, f"{file}, line {begun}", str(problem)) from None
                yield row
                place += 1
    except csv.Error as problem:
        if "field larger" in str(problem) or "unexpected end" in str(problem):
            what = f"a value of more than {csv.field_size_limit():,} characters, or a quote that is never closed"
        else:
            what = f"not CSV: {problem}"
        raise RequestError(setting, f"{file}, line {line}", what) from None
    except UnicodeDecodeError as problem:
        raise RequestError(setting, file, f"not a CSV file in UTF-8 ({problem}); save it in that encoding") from None
    except OSError as problem:
        raise RequestError(setting, file, str(problem.strerror)) from None


def read_prompts(file: Path, *, setting: str = "prompts", limit: int | None = None) -> PromptSet:
    """Read a CSV file as ``read_rows`` does, or its first ``limit`` rows; raises RequestError also when it has none."""
    rows = tuple(islice(read_rows(file, setting=setting), limit))
    if not rows:
        raise RequestError(setting, file, "the prompt set is empty")
    return PromptSet(file.stem, rows, "" if limit is None else f"the first {len(rows):,} prompts")


def known_columns(header: Sequence[str], source: object, setting: str) -> dict[str, int]:
    """Return the place of each known column; raises RequestError when there are no prompts among them."""
    names = [name.strip() for name in header]
    spelled = {name: next((s for s in spellings if s in names), None) for name, spellings in _COLUMNS.items()}
    if spelled["prompt"] is None:
        # One name with another separator in it is how spreadsheets save their files in many countries.
        apart = len(names) == 1 and any(mark in names[0] for mark in ";\t|")
        what = "its values must be separated by commas" if apart else "its first line must name the columns"
        raise RequestError(setting, source, f"no column 'prompt', only {', '.join(names) or 'an empty file'}; {what}")
    return {name: names.index(spelling) for name, spelling in spelled.items() if spelling is not None}


def make_row(values: Mapping[str, str], place: int) -> PromptRow:
    """Build a row from the strings of one CSV record; raises ValueError that names the column."""
    seed, number = _number(values, "seed", int), _number(values, "case_number", int)
    guidance = _number(values, "guidance", float)
    width, height = _number(values, "width", int), _number(values, "height", int)
    for name, given in (("seed", seed), ("case_number", number)):
        if given is not None and not 0 <= given < 2**63:
            raise ValueError(f"{name} must be at least 0 and below 2^63, not {given}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be at least 0 and finite, not {guidance}")
    for name, size in (("width", width), ("height", height)):
        if size is not None and (size < 8 or size % 8):
            raise ValueError(f"{name} must be a positive multiple of 8, not {size}")
    return PromptRow(
        prompt=values["prompt"],
        seed=place if seed is None else seed,
        guidance=guidance,
        width=width,
        height=height,
        # Labels are few: a million rows share them.
        object=sys.intern(values.get("object", "")),
        style=sys.intern(values.get("style", "")),
        category=sys.intern(values.get("category", "")),
        case_number=place if number is None else number,
    )


Number = TypeVar("Number", int, float)


def _number(values: Mapping[str, str], name: str, kind: type[Number]) -> Number | None:
    text = values.get(name, "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"{name} must be {wanted}, not {shown!r}") from None
