"""Prompt sets: rows of prompt, seed, guidance scale, size and labels, read from and written to CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.files import whole
from erase_concept.prompts import emojinette
from erase_concept.prompts.concept import fill

# Accepted spellings of each column; the first is the one written. I2P's own and the research repositories' names.
_COLUMNS = {
    "prompt": ("prompt",),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale"),
    "width": ("width", "sd_image_width"),
    "height": ("height", "sd_image_height"),
    "object": ("object", "class"),
    "style": ("style", "artist"),
}


@dataclass(frozen=True)
class PromptRow:
    """One image to be made. ``None`` leaves a value to the model's default; an empty label means none is known."""

    prompt: str
    seed: int
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    object: str = ""
    style: str = ""


@dataclass(frozen=True)
class PromptSet:
    """A named sequence of rows."""

    name: str
    rows: tuple[PromptRow, ...]

    def save(self, file: Path) -> None:
        """Write the rows as CSV, with a case number per row; columns that no row uses are left out."""
        used = [name for name in _COLUMNS if any(getattr(row, name) not in (None, "") for row in self.rows)]
        with whole(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case_number", *(_COLUMNS[name][0] for name in used)])
            for number, row in enumerate(self.rows):
                values = (getattr(row, name) for name in used)
                writer.writerow([number, *("" if value is None else value for value in values)])


def read_prompts(file: Path, *, argument: str = "--prompts") -> PromptSet:
    """Read a CSV file with at least a ``prompt`` column; a row without a seed gets its case number's place as seed.

    Raises RequestError naming the file, and the line where one is at fault.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            header = reader.fieldnames or []
            columns = {name: next((s for s in spellings if s in header), None) for name, spellings in _COLUMNS.items()}
            if columns["prompt"] is None:
                raise RequestError(argument, file, f"no column 'prompt', only {', '.join(header) or 'an empty file'}")
            rows = []
            for place, record in enumerate(reader):
                try:
                    rows.append(_row({n: record[c] or "" for n, c in columns.items() if c}, place))
                except ValueError as problem:
                    raise RequestError(argument, f"{file}, line {reader.line_num}", str(problem)) from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else f"not a CSV file in UTF-8 ({problem})"
        raise RequestError(argument, file, str(reason)) from None
    if not rows:
        raise RequestError(argument, file, "the prompt set is empty")
    return PromptSet(file.stem, tuple(rows))


def _row(values: dict[str, str], place: int) -> PromptRow:
    """Build a row from the strings of one CSV record; raises ValueError that names the column."""
    numbers: dict[str, int | float | None] = {}
    for name, kind in (("seed", int), ("guidance", float), ("width", int), ("height", int)):
        text = values.get(name, "").strip()
        try:
            numbers[name] = kind(text) if text else None
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {wanted}, not {text!r}") from None
    seed = numbers["seed"]
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2^63, not {seed}")
    guidance = numbers["guidance"]
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be at least 0 and finite, not {guidance}")
    for name in ("width", "height"):
        size = numbers[name]
        if size is not None and (size < 8 or size % 8):
            raise ValueError(f"{name} must be a positive multiple of 8, not {size}")
    return PromptRow(
        prompt=values["prompt"],
        seed=place if seed is None else int(seed),
        guidance=guidance,
        width=None if numbers["width"] is None else int(numbers["width"]),
        height=None if numbers["height"] is None else int(numbers["height"]),
        object=values.get("object", ""),
        style=values.get("style", ""),
    )


def prompt_sets() -> dict[str, PromptSet]:
    """Return the built-in prompt sets by name."""
    return {
        "emojinette": emojinette_prompts(seeds=range(1)),
        "emojinette-unseen": emojinette_prompts(seeds=range(1), unseen=True),
    }


def emojinette_prompts(seeds: Iterable[int], *, unseen: bool = False, first_seed: int = 10_000) -> PromptSet:
    """Every object in every style, once per seed: 80 rows a seed, each image with a seed of its own.

    The sentences alternate between the templates that no built-in concept is erased with, and between each object's
    label and its synonym; with ``unseen``, between templates and names that Emojinette never saw.
    """
    styled = emojinette.UNSEEN_STYLED if unseen else emojinette.EVAL_STYLED
    rows = []
    for seed in seeds:
        for s, style in enumerate(emojinette.STYLES):
            for o, names in enumerate(emojinette.OBJECTS):
                turn = seed + s + o
                nouns = (names.unseen, names.label) if unseen else (names.label, names.synonym)
                template = styled[turn % len(styled)].replace("{s}", style)
                prompt = fill(template, nouns[turn // len(styled) % 2])
                number = first_seed + (seed * len(emojinette.STYLES) + s) * len(emojinette.OBJECTS) + o
                rows.append(PromptRow(prompt, number, object=names.label, style=style))
    return PromptSet("emojinette-unseen" if unseen else "emojinette", tuple(rows))


def prompts(name: str) -> PromptSet:
    """Return a built-in prompt set by name, or read the CSV file of that path."""
    known = prompt_sets()
    if name in known:
        return known[name]
    if not Path(name).exists():
        raise RequestError("--prompts", name, f"no such file, and no built-in prompt set; allowed: {', '.join(known)}")
    return read_prompts(Path(name))
