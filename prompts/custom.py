"""Concepts of one's own: from words, from a file of prompts, from a folder of images.

Nothing else is known of them, so their prompts become the empty prompt, and what is retained is everyday life and, of
what is known by name, all that is not meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.prompts import emojinette
from erase_concept.prompts.concept import Concept, fill, whole_words
from erase_concept.prompts.promptset import read_prompts

TEMPLATES = ("a photo of {o}", "an image of {o}", "a picture of {o}", "{o}")
EMOJINETTE = "emojinette"  # the built-in model, of which all objects and styles are known
_EVERYDAY = Path(__file__).parent / "everyday.csv"


def from_words(words: str, model: str = "", *, images: str = "") -> Concept:
    """Return the concept of these words; ``images`` may be a folder of pictures of it.

    Everyday prompts are retained, and the known names within the words, such as the rocket of a blue rocket; of the
    built-in model also its styles, and its objects that share no word. Raises RequestError when there is no word.
    """
    name = " ".join(words.split())
    if not re.search(r"\w", name):
        raise RequestError("--concept", repr(words), "needs at least one word")

    def within(known: str) -> bool:
        return known != name.casefold() and bool(whole_words([known]).search(name))

    retain: list[str] = []
    for names in emojinette.OBJECTS:
        both = (names.label, names.synonym)
        inside = [one for one in both if within(one)]
        shared = set(name.casefold().split()) & {word for one in both for word in one.split()}
        if name.casefold() in (*both, names.unseen):
            continue  # the object itself, by another name
        if inside or (model == EMOJINETTE and not shared):
            retain += inside or [names.label]
    styles = [
        style for style in emojinette.STYLES if within(style) or (model == EMOJINETTE and style != name.casefold())
    ]
    return Concept(
        name=name,
        kind="custom",
        templates=TEMPLATES,
        retain=tuple(retain),
        others=("", *_in_styles(styles), *_everyday([name])),
        images=images,
    )


def from_prompts(file: Path, model: str = "") -> Concept:
    """Return the concept that a file's prompts describe: a CSV file with a column of prompts, or a text of one a line.

    They are forgotten as they stand; what holds one of them is not retained. Raises RequestError when there is none, or
    the file is not readable.
    """
    if file.suffix.lower() == ".csv":
        found = [row.prompt for row in read_prompts(file, argument="--concept").rows]
    else:
        try:
            found = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise RequestError("--concept", file, f"not a readable text: {problem}") from None
    prompts = tuple(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise RequestError("--concept", file, "holds no prompt")
    drawn: list[str] = []
    if model == EMOJINETTE:
        drawn += [fill(emojinette.ERASE_OBJECT[0], label) for label in emojinette.OBJECT_LABELS]
        drawn += _in_styles(emojinette.STYLES)
    kept = [prompt for prompt in drawn if not whole_words(prompts).search(prompt)]
    return Concept(name=file.stem, kind="custom", prompts=prompts, others=("", *kept, *_everyday(prompts)))


def from_images(folder: Path, model: str = "") -> Concept:
    """Return the concept that a folder's images show and its name says: that of its words, so no built-in one."""
    return from_words(folder.resolve().name.replace("_", " ").replace("-", " "), model, images=str(folder))


def _in_styles(styles: Sequence[str]) -> list[str]:
    return [emojinette.ERASE_STYLE[0].replace("{s}", style) for style in styles]


def _everyday(names: Sequence[str]) -> list[str]:
    """Return the everyday prompts that hold none of the names."""
    return [row.prompt for row in read_prompts(_EVERYDAY).rows if not whole_words(names).search(row.prompt)]
