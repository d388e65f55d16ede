"""Custom concepts: made from words, from a file of prompts, or from a folder of images.

Custom concepts are mapped to the empty prompt. Everyday prompts are retained, and so are the objects and styles of the
model's own catalogues, as far as they are not the concept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import Catalog, catalogs
from erase_concept.prompts.concept import Concept, fill, whole_words
from erase_concept.prompts.kinds import kinds
from erase_concept.prompts.promptset import read_rows


def from_words(words: str, own: Sequence[str] = (), *, images: str = "") -> Concept:
    """Return the concept of these words. ``images`` may be a folder of images that show it.

    Names of any catalogue that stand within the words are retained: "rocket" for a blue rocket. ``own`` names the
    model's catalogues, whose styles and objects are retained too; objects that share a word with the concept are not.
    Raises RequestError when there is no word.
    """
    name = " ".join(words.split())
    if not re.search(r"\w", name):
        raise RequestError("concept", repr(words), "needs at least one word")
    retain: list[str] = []
    in_styles: list[str] = []
    for catalog in catalogs().values():
        retain += _retained_objects(catalog, name, drawn=catalog.name in own)
        styles = [
            style
            for style in catalog.styles
            if _is_within(style, name) or (catalog.name in own and style != name.casefold())
        ]
        in_styles += _style_prompts(catalog, styles)
    defaults = kinds()["custom"]
    return Concept(
        name=name,
        kind="custom",
        anchor=defaults.anchor,
        templates=defaults.templates,
        retain=tuple(retain),
        others=defaults.retained_prompts([name], *in_styles),
        images=images,
    )


def from_prompts(file: Path, own: Sequence[str] = ()) -> Concept:
    """Return the concept that a file's prompts describe: a CSV file, or a text file with one prompt per line.

    The prompts are forgotten word for word. No prompt that contains one of them is retained. Raises RequestError when
    the file has no prompt or is not readable.
    """
    if file.suffix.lower() == ".csv":
        found = [row.prompt for row in read_rows(file, setting="concept")]
    else:
        try:
            found = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise RequestError("concept", file, f"not a readable text file: {problem}") from None
    prompts = tuple(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise RequestError("concept", file, "has no prompt")
    known: list[str] = []
    for catalog in catalogs().values():
        if catalog.name in own:
            known += [fill(catalog.sentences.erase.object[0], label) for label in catalog.labels]
            known += _style_prompts(catalog, catalog.styles)
    words = whole_words(prompts)
    known = [prompt for prompt in known if not words.search(prompt)]
    return Concept(
        name=file.stem, kind="custom", prompts=prompts, others=kinds()["custom"].retained_prompts(prompts, *known)
    )


def from_images(folder: Path, own: Sequence[str] = ()) -> Concept:
    """Return the concept that a folder's images show. The folder's name is its name, as words and never as a key."""
    return from_words(folder.resolve().name.replace("_", " ").replace("-", " "), own, images=str(folder))


def _retained_objects(catalog: Catalog, name: str, *, drawn: bool) -> list[str]:
    """Return the names of objects to retain: those within ``name`` and, if the model draws them, all others."""
    retain: list[str] = []
    for names in catalog.objects:
        known = (names.label, names.synonym)
        within = [one for one in known if _is_within(one, name)]
        shares_a_word = set(name.casefold().split()) & {word for one in known for word in one.split()}
        if name.casefold() in (*known, names.unseen):
            continue  # the concept is this object
        if within or (drawn and not shares_a_word):
            retain += within or [names.label]
    return retain


def _is_within(known: str, name: str) -> bool:
    """Return whether a known name is a part of the concept's name, in whole words."""
    return known != name.casefold() and bool(whole_words([known]).search(name))


def _style_prompts(catalog: Catalog, styles: Sequence[str]) -> list[str]:
    return [catalog.sentences.erase.style[0].replace("{s}", style) for style in styles]
