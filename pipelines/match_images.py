"""Images that other programs made, matched with the prompts of a set."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.pipelines.image_set import (
    ImageSet,
    manifests,
    natural_order,
    read_images,
    shortened,
)
from erase_concept.pipelines.pictures import SUFFIXES, hidden_pictures, read_picture
from erase_concept.prompts.promptset import PromptRow, PromptSet

# 00012.png, 12_0.png (the first image of case 12), case_12.png: a case number alone, and no other program's counter.
_CASE = re.compile(r"(?:case[_-]?)?([0-9]{1,18})(?:_([0-9]{1,9}))?", re.IGNORECASE)


@dataclass(frozen=True)
class _Matches:
    """Pairs of (place in the set, file), the names of images of no prompt, and how they were matched."""

    pairs: list[tuple[int, Path]]
    strangers: list[str]
    how: str


def match_images(folder: str | Path, prompts: PromptSet, *, setting: str = "images") -> ImageSet:
    """Return the images of a folder with the rows that they were made from, in the order of the prompt set.

    They are matched by the first of these that applies:

    1. ``manifest.jsonl``, where there is one: prompt, seed, guidance scale and size must be the row's;
    2. the case number, where every image is named by one (``00012.png``, ``case_12.png``, or ``12_0.png`` and
       ``12_1.png`` for several images of one prompt), and these numbers are among the set's, or the set's among them;
    3. the order, where there are as many images as prompts: the n-th in the natural order of their names is the n-th
       prompt's. This fits programs that count by themselves (``ComfyUI_00001_.png``).

    A part of the set is matched too. ``notes`` tell of prompts without an image, images of no prompt of the set, files
    that are no image or hidden, and images of one colour, as a safety checker leaves them. Raises RequestError naming
    ``setting`` when the images cannot be matched, are empty or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(setting, folder, "no such folder")
    others: list[str] = []
    hidden = [file.name for file in hidden_pictures(folder)]
    if manifests(folder):
        made = read_images(folder, setting=setting)
        matches, settings = _match_manifest(made, prompts), made.settings
        if not matches.pairs:
            raise RequestError(setting, folder, f"no line of its manifest.jsonl is a prompt of {prompts.name}")
    else:
        files, others = _listed(folder, setting)
        matches = _match_names(files, prompts, folder, setting)
        settings = {"matched": matches.how}
    notes = [f"{_count(others, 'file')} no image: {shortened(others)}"] if others else []
    notes += [f"{_count(hidden, 'file')} hidden and left out: {shortened(hidden)}"] if hidden else []
    matched = {place for place, _ in matches.pairs}
    if absent := [number for place, number in enumerate(prompts.case_numbers) if place not in matched]:
        missing = f"of {len(prompts.rows):,} prompts {len(absent):,} without an image"
        notes.append(f"{missing}: case number {shortened(absent)}")
    if matches.strangers:
        notes.append(f"{_count(matches.strangers, 'image')} of no prompt of the set: {shortened(matches.strangers)}")
    rows = tuple(prompts.rows[place] for place, _ in matches.pairs)
    chosen = tuple(file for _, file in matches.pairs)
    if matches.how != "manifest" and (plain := _check_readable(chosen, folder, setting)):  # a manifest has hashes
        notes.append(f"{_count(plain, 'image')} of one colour only: {shortened(plain)}")
    return ImageSet(chosen, rows, settings, (f"matched by {matches.how}", *notes))


def _listed(folder: Path, setting: str) -> tuple[list[Path], list[str]]:
    """Return the images of a folder in natural order, and the names of everything else in it."""
    entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=lambda e: natural_order(e.name))
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    others = [entry.name for entry in entries if entry.is_dir() or entry.suffix.lower() not in SUFFIXES]
    if not files:
        what = f"holds no images ({', '.join(SUFFIXES)})"
        raise RequestError(setting, folder, f"{what}, only {shortened(others)}" if others else what)
    return files, others


def _match_manifest(made: ImageSet, prompts: PromptSet) -> _Matches:
    """Match images by the rows of their manifest."""
    places_of: dict[tuple[object, ...], deque[int]] = {}  # in order, for a set may ask for one image several times
    for place, row in enumerate(prompts.rows):
        places_of.setdefault(_identity(row), deque()).append(place)
    pairs, strangers = [], []
    for file, row in zip(made.files, made.rows, strict=True):
        if places := places_of.get(_identity(row)):
            pairs.append((places.popleft(), file))
        else:
            strangers.append(file.name)
    return _Matches(sorted(pairs), strangers, "manifest")


def _identity(row: PromptRow) -> tuple[object, ...]:
    """Return what makes an image: all but the labels."""
    return row.prompt, row.seed, row.guidance, row.width, row.height


def _match_names(files: Sequence[Path], prompts: PromptSet, folder: Path, setting: str) -> _Matches:
    """Match images by the case numbers in their names, or by their order."""
    places = {number: place for place, number in enumerate(prompts.case_numbers)}
    found = {file: match for file in files if (match := _CASE.fullmatch(file.stem))}
    unnamed = [file.name for file in files if file not in found]
    if found and unnamed:
        verb = "is" if len(unnamed) == 1 else "are"
        raise RequestError(
            setting, folder, f"{shortened(unnamed)} {verb} not named by a case number, as the others are"
        )
    keys = {file: (int(match[1]), int(match[2] or 0)) for file, match in found.items()}
    times = Counter(keys.values())
    numbers = {number for number, _ in times}
    missing, strange = places.keys() - numbers, numbers - places.keys()
    if found and len(places) == len(prompts.rows) and not (missing and strange):
        if twice := [file.name for file, key in keys.items() if times[key] > 1]:
            raise RequestError(setting, folder, f"several images have one case number: {shortened(twice)}")
        ordered = sorted((places[key[0]], key[1], file) for file, key in keys.items() if key[0] in places)
        strangers = [file.name for file, key in keys.items() if key[0] in strange]
        return _Matches([(place, file) for place, _, file in ordered], strangers, "case number")
    if len(files) == len(prompts.rows):
        return _Matches(list(enumerate(files)), [], "file order")
    whole = sorted({*places, *prompts.dropped})  # the case numbers of the file, with those that are never sampled
    if not prompts.selection and len(places) == len(prompts.rows) and len(files) == len(whole):
        file_of = dict(zip(whole, files, strict=True))
        pairs = sorted((places[number], file) for number, file in file_of.items() if number in places)
        return _Matches(pairs, [file.name for number, file in file_of.items() if number not in places], "file order")
    what = f"{len(files):,} images for {len(prompts.rows):,} prompts, and their names are no case numbers of the set"
    if found and len(places) == len(prompts.rows):
        what += f" (strange: {shortened(sorted(strange))}; missing: {shortened(sorted(missing))})"
    raise RequestError(setting, folder, f"{what}; name them by case number, such as {prompts.case_numbers[0]:05d}.png")


def _check_readable(files: Sequence[Path], folder: Path, setting: str) -> list[str]:
    """Read every image, and return the names of those of one colour; raises RequestError naming the unreadable."""
    bad, plain = [], []
    for file in files:
        try:
            one_colour = read_picture(file).getcolors(1) is not None
        except RequestError as problem:
            why = problem.allowed.split(str(file))[0].strip(" '") if file.stat().st_size else "an empty file"
            bad.append(f"{file.name} ({why})")
            continue
        if one_colour:
            plain.append(file.name)
    if bad:
        raise RequestError(setting, folder, f"{_number(bad, 'image')} cannot be read: {shortened(bad)}; make it again")
    return plain


def _number(items: Sequence[object], noun: str) -> str:
    return f"1 {noun}" if len(items) == 1 else f"{len(items):,} {noun}s"


def _count(items: Sequence[object], noun: str) -> str:
    return f"{_number(items, noun)} {'is' if len(items) == 1 else 'are'}"
