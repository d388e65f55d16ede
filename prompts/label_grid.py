"""Prompt sets made from a catalogue's labels: every object in every style, and the prompts for one concept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import Catalog
from erase_concept.prompts.concept import Concept, fill
from erase_concept.prompts.promptset import PromptRow, PromptSet


def catalog_prompts(
    catalog: Catalog, seeds: Iterable[int], *, unseen: bool = False, first_seed: int = 10_000
) -> PromptSet:
    """Return every object in every style once per seed, each row with an image seed of its own.

    The sentences alternate between those to evaluate with, and between each object's label and its synonym. With
    ``unseen`` they alternate between the unseen sentences, and between each object's unseen name and its label. Raises
    RequestError when the catalogue has no objects or no styles.
    """
    _check_labelled(catalog)
    styled = catalog.sentences.unseen.styled if unseen else catalog.sentences.evaluate.styled
    rows = []
    for seed in seeds:
        for s, style in enumerate(catalog.styles):
            for o, names in enumerate(catalog.objects):
                turn = seed + s + o
                nouns = (names.unseen, names.label) if unseen else (names.label, names.synonym)
                template = styled[turn % len(styled)].replace("{s}", style)
                prompt = fill(template, nouns[turn // len(styled) % 2])
                number = first_seed + (seed * len(catalog.styles) + s) * len(catalog.objects) + o
                rows.append(PromptRow(prompt, number, object=names.label, style=style))
    return PromptSet(f"{catalog.name}-unseen" if unseen else catalog.name, tuple(rows))


def concept_prompts(
    catalog: Catalog,
    concept: Concept,
    seeds: int = 2,
    first_seed: int = 10_000,
    earlier: Sequence[Concept] = (),
    guidance: float | None = None,
) -> PromptSet:
    """Return the rows that ask for a concept and for everything else in the catalogue.

    ``earlier`` are concepts that the base model has lost already; they are asked for like the concept. Each of these
    concepts gets as many forget rows per seed as the catalogue has objects. An object is asked for in each style and in
    none, by its label, its synonym and its unseen name. A style is asked for with every object. Nearly half of these
    sentences are unseen ones. Retain rows are all objects in all styles, once per seed, without those that ask for any
    of these concepts. Prompts that a concept is erased with are left out. Image seeds count up from ``first_seed``;
    every row gets the same ``guidance``.

    Raises RequestError for a concept that is not in the catalogue and for fewer than one seed.
    """
    concepts = (concept, *earlier)
    for one in concepts:
        check_labels(catalog, one)
    if seeds < 1:
        raise RequestError("seeds", seeds, "at least 1")
    everything = catalog_prompts(catalog, range(seeds), first_seed=first_seed).rows
    rows = [row for row in everything if not any(asks_for(row, one) for one in concepts)]
    forget = [
        row
        for one in concepts
        for part in one.parts
        for row in (
            object_rows(catalog, part.name, len(catalog.objects) * seeds)
            if part.kind == "object"
            else _style_rows(catalog, part.name, seeds)
        )
    ]
    rows += [replace(row, seed=first_seed + len(everything) + place) for place, row in enumerate(forget)]
    erased_with = {prompt for one in concepts for prompt in (*one.forget_prompts, *one.retain_prompts)}
    return PromptSet(
        f"{catalog.name}-{concept.name}",
        tuple(replace(row, guidance=guidance) for row in rows if row.prompt not in erased_with),
    )


def asks_for(row: PromptRow, concept: Concept) -> bool:
    """Return whether a row asks for the concept or one of its parts, by the row's labels."""
    return any(part.name == (row.object if part.kind == "object" else row.style) for part in concept.parts)


def check_labels(catalog: Catalog, concept: Concept) -> None:
    """Raise RequestError unless every part of the concept is an object or a style of the catalogue."""
    _check_labelled(catalog)
    known = {"object": catalog.labels, "style": catalog.styles}
    for part in concept.parts:
        if part.name not in known.get(part.kind, ()):
            allowed = f"the objects and styles of {catalog.name} are: {', '.join((*catalog.labels, *catalog.styles))}"
            raise RequestError("concept", f"{part.name!r} ({part.kind})", allowed)


def object_rows(catalog: Catalog, label: str, count: int) -> list[PromptRow]:
    """Return rows that ask for one object, all with seed 0. Styles, names and each style's sentences take turns."""
    known = catalog.names_of(label)
    names = (known.label, known.synonym, known.unseen)
    evaluate, unseen = catalog.sentences.evaluate, catalog.sentences.unseen
    plain, styled = _alternate(evaluate.object, unseen.object), _alternate(evaluate.styled, unseen.styled)
    rows = []
    for place in range(count):
        turn, s = divmod(place, len(catalog.styles) + 1)
        style = ("", *catalog.styles)[s]
        templates = styled if style else plain
        sentence = templates[turn % len(templates)].replace("{s}", style)
        rows.append(PromptRow(fill(sentence, names[place % len(names)]), 0, object=label, style=style))
    return rows


def _style_rows(catalog: Catalog, style: str, seeds: int) -> list[PromptRow]:
    """Return rows that ask for one style: every object once per seed, by label and synonym in turn."""
    styled = _alternate(catalog.sentences.evaluate.styled, catalog.sentences.unseen.styled)
    rows = []
    for seed in range(seeds):
        for place, names in enumerate(catalog.objects):
            turn = seed + place
            noun = (names.label, names.synonym)[turn // len(styled) % 2]
            sentence = styled[turn % len(styled)].replace("{s}", style)
            rows.append(PromptRow(fill(sentence, noun), 0, object=names.label, style=style))
    return rows


def _alternate(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return one of each in turn, then the rest of the longer, so that any few in a row hold both groups."""
    both = [item for pair in zip(first, second, strict=False) for item in pair]
    return [*both, *(item for item in (*first, *second) if item not in both)]


def _check_labelled(catalog: Catalog) -> None:
    if not catalog.objects or not catalog.styles:
        raise RequestError("catalog", catalog.name, "has no objects and styles to make prompts of")
