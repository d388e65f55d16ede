"""Prompt sets made from labels ask in words that the erasing did not use, and for everything equally often."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import astuple, replace

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import Catalog, ObjectNames, SentenceGroups, Sentences, catalog
from erase_concept.prompts.concept import Concept, combine
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.label_grid import asks_for, catalog_prompts, concept_prompts, object_rows
from erase_concept.prompts.promptset import PromptSet

WORLD = catalog("emojinette")
CHURCH, DOG, SKETCH = (WORLD.concepts[key] for key in ("church", "dog", "sketch"))


def ask(concept: Concept, seeds: int = 2, **more: object) -> PromptSet:
    """Make a concept's prompts as the built-in model's benchmark does."""
    return concept_prompts(WORLD, concept, seeds, guidance=5.0, **more)


def test_the_built_in_models_prompts_are_those_that_were_measured() -> None:
    """The published results and the model card were measured with these very prompts and seeds.

    The hash is that of the prompts as they were then. After a change of them these numbers must be measured again.
    """
    concepts = [*WORLD.concepts.values(), combine([CHURCH, DOG]), combine([CHURCH, DOG, SKETCH])]
    sets = [catalog_prompts(WORLD, range(3)), catalog_prompts(WORLD, range(3), unseen=True, first_seed=50_000)]
    sets += [ask(one, seeds) for one in concepts for seeds in (1, 2)]
    sets.append(ask(CHURCH, 1, first_seed=77_000, earlier=[WORLD.concepts["tree"], WORLD.concepts["3d"]]))
    erased = [[one.forget_prompts, one.remapped_to(one.anchor), one.retain_prompts] for one in concepts]
    everything = [erased, [[one.name, [astuple(row)[:8] for row in one.rows]] for one in sets]]
    found = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
    assert found == "36bd29c63bbb4cf7d46393501ab629d1b9d0a0ea068fcaf6658881f3e896e9a9"


def test_a_small_catalogue_is_asked_word_for_word() -> None:
    """Written down by hand: two objects in two styles, with two sentences of each group."""
    world = Catalog(
        name="small",
        about="for this test",
        objects=(
            ObjectNames(label="owl", synonym="tawny owl", unseen="night bird"),
            ObjectNames(label="hut", synonym="cabin", unseen="shed"),
        ),
        styles=("ink", "wax"),
        sentences=SentenceGroups(
            erase=Sentences(object=("{o}",), styled=("{s} {O}",), style=("{s}",)),
            evaluate=Sentences(object=("see {o}",), styled=("{o} in {s}", "{o}, {s}")),
            unseen=Sentences(object=("find {o}",), styled=("my {O} in {s}",)),
        ),
    )
    assert [
        (row.prompt, row.seed, row.object, row.style) for row in catalog_prompts(world, [0], first_seed=7).rows
    ] == [
        ("an owl in ink", 7, "owl", "ink"),
        ("a hut, ink", 8, "hut", "ink"),
        ("an owl, wax", 9, "owl", "wax"),
        ("a cabin in wax", 10, "hut", "wax"),
    ]
    assert [row.prompt for row in catalog_prompts(world, [1], unseen=True).rows] == [
        "my owl in ink",
        "my shed in ink",
        "my night bird in wax",
        "my hut in wax",
    ]
    owl = world.concepts["owl"]
    assert owl.forget_prompts == ("an owl", "ink owl", "wax owl", "a tawny owl", "ink tawny owl", "wax tawny owl")
    assert owl.retain_prompts == ("a hut", "ink hut", "wax hut", "ink", "wax", "")
    assert [(row.prompt, row.seed, row.style) for row in concept_prompts(world, owl, 2, 5).rows] == [
        ("a hut, ink", 6, "ink"),
        ("a cabin in wax", 8, "wax"),
        ("a cabin in ink", 10, "ink"),
        ("a cabin, wax", 12, "wax"),
        ("see an owl", 13, ""),
        ("a tawny owl in ink", 14, "ink"),
        ("a night bird in wax", 15, "wax"),
        ("find an owl", 16, ""),
    ]
    assert [row.prompt for row in object_rows(world, "hut", 3)] == ["see a hut", "a cabin in ink", "a shed in wax"]


@pytest.mark.parametrize("concept", WORLD.concepts.values(), ids=lambda concept: concept.name)
def test_no_prompt_is_one_that_the_erasing_used(concept: Concept) -> None:
    rows = ask(concept, seeds=4).rows
    assert not {row.prompt for row in rows} & {*concept.forget_prompts, *concept.retain_prompts}
    assert sum(asks_for(row, concept) for row in rows) == 80
    assert len(rows) == 80 + 320 - (16 if concept.kind == "object" else 80)  # none was dropped
    assert {row.guidance for row in rows} == {5.0}
    assert len({row.seed for row in rows}) == len(rows)


def test_an_object_is_asked_for_in_every_style_and_by_every_name() -> None:
    rows = [row for row in ask(CHURCH).rows if row.object == "church"]
    assert Counter(row.style for row in rows) == {"": 8} | dict.fromkeys(WORLD.styles, 8)
    names = WORLD.names_of("church")
    for style in ("", *WORLD.styles):
        prompts = " | ".join(row.prompt for row in rows if row.style == style)
        assert all(name in prompts for name in (names.synonym, names.unseen))
    assert all(row.style in row.prompt and any(n in row.prompt for n in ("church", "chapel")) for row in rows)
    unseen = sum(any(words in row.prompt for words in ("rendering", "here you see", "please", "today")) for row in rows)
    assert 15 <= unseen <= 25  # about half of them


def test_a_style_is_asked_for_with_every_object() -> None:
    rows = [row for row in ask(SKETCH, seeds=3).rows if row.style == "sketch"]
    assert Counter(row.object for row in rows) == dict.fromkeys(WORLD.labels, 3)
    assert all("sketch" in row.prompt for row in rows)
    assert len({row.prompt for row in rows}) == len(rows)


def test_retain_rows_ask_for_everything_else_equally() -> None:
    rows = [row for row in ask(CHURCH).rows if row.object != "church"]
    counts = Counter((row.object, row.style) for row in rows)
    assert counts == {(label, style): 2 for label in WORLD.labels if label != "church" for style in WORLD.styles}


def test_a_prompt_that_a_concept_is_erased_with_is_left_out() -> None:
    asked = ask(CHURCH).rows
    mine = replace(CHURCH, templates=("a photo of {o}",), retain=("dog",), others=(asked[0].prompt,))
    left = ask(mine).rows
    gone = {row.prompt for row in asked} - {row.prompt for row in left}
    assert gone == {asked[0].prompt, "a photo of a church"}


def test_first_seed_keeps_runs_apart() -> None:
    first, second = (ask(CHURCH, first_seed=seed).rows for seed in (0, 1_000_000))
    assert [row.seed + 1_000_000 for row in first] == [row.seed for row in second]
    assert [row.prompt for row in first] == [row.prompt for row in second]


def test_several_concepts_are_asked_for_one_by_one_and_the_rest_is_none_of_them() -> None:
    three = combine([CHURCH, DOG, SKETCH])
    rows = ask(three).rows
    gone = [asks_for(row, three) for row in rows]
    assert len({row.seed for row in rows}) == len(rows)
    retained = Counter((row.object, row.style) for row, erased in zip(rows, gone, strict=True) if not erased)
    others = [label for label in WORLD.labels if label not in ("church", "dog")]
    assert retained == {(label, style): 2 for label in others for style in WORLD.styles if style != "sketch"}
    assert sum(gone) == 3 * 40
    for part in three.combined:
        alone = ask(WORLD.concepts[part.name]).rows
        own = {(row.prompt, row.style) for row in alone if part.name in (row.object, row.style)}
        assert own <= {(row.prompt, row.style) for row in rows}


def test_what_was_erased_earlier_is_asked_for_and_no_part_of_the_rest() -> None:
    rows = ask(CHURCH, 1, earlier=(DOG, SKETCH)).rows
    counts = [sum(asks_for(row, one) for row in rows) for one in (CHURCH, DOG, SKETCH)]
    # That style is asked for with church and dog as well, and each of them four times in that style.
    assert counts == [21, 21, 20 + 8]
    assert sum(row.style != "sketch" and row.object not in ("church", "dog") for row in rows) == 18 * 3


def test_bad_requests_are_refused() -> None:
    with pytest.raises(RequestError, match="the objects and styles of emojinette are: fish, dog"):
        ask(find_concept("nudity"))
    with pytest.raises(RequestError, match="concept 'castle'"):
        ask(replace(CHURCH, name="castle"))
    with pytest.raises(RequestError, match="seeds 0: at least 1"):
        ask(CHURCH, seeds=0)
    with pytest.raises(RequestError, match="catalog unsafe: has no objects and styles"):
        catalog_prompts(catalog("unsafe"), range(1))
