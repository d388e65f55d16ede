"""Concepts: their prompts, their checks, and their way in and out of YAML."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalog, catalogs
from erase_concept.prompts.concept import Concept, combine, fill, parse
from erase_concept.prompts.find import find_concept

WORLD = catalog("emojinette")
OWN = ("emojinette", "unsafe")  # the catalogues of the built-in model


def concept(name: str) -> Concept:
    """Find a concept as for the built-in model."""
    return find_concept(name, OWN)


def test_fill_finds_the_article() -> None:
    assert fill("see {o} and the {O}", "church") == "see a church and the church"
    assert fill("{o}", "umbrella") == "an umbrella"
    assert fill("{o}", "ukulele") == "a ukulele"
    assert fill("{o}", "oak") == "an oak"


def test_a_name_with_braces_is_text() -> None:
    assert fill("an image of {O}", "{x} {o}") == "an image of {x} {o}"


@pytest.mark.parametrize("key", [*WORLD.labels, *WORLD.styles, "nudity"])
def test_every_built_in_concept_is_sound(key: str) -> None:
    found = concept(key)
    names = (found.name, *found.synonyms)
    assert all(any(name in prompt for name in names) for prompt in found.forget_prompts)
    for asked, becomes in zip(found.forget_prompts, found.remapped_to(found.anchor), strict=True):
        assert any(fill(t, found.anchor) == becomes and asked in [fill(t, n) for n in names] for t in found.templates)
    assert not set(found.forget_prompts) & set(found.retain_prompts)
    assert len(set(found.retain_prompts)) == len(found.retain_prompts)
    assert parse(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found


def test_objects_and_styles_cover_one_another() -> None:
    church, sketch = concept("church"), concept("sketch")
    assert set(church.retain) == set(WORLD.labels) - {"church"}
    assert church.anchor == "horn"
    assert "a sketch church" in church.forget_prompts
    assert "a sketch chapel" in sketch.forget_prompts
    assert "a church" in sketch.retain_prompts
    assert sketch.prompts_for("flat")[0] == sketch.forget_prompts[0].replace("sketch", "flat")


def test_unknown_concept_names_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"concept chruch: unknown concept; did you mean church"):
        concept("chruch")
    with pytest.raises(RequestError, match="did you mean sketch style"):
        concept("skech style")
    with pytest.raises(RequestError, match=r"words:chruch takes the words as they are"):
        concept("chruch")
    assert concept("words:chruch").name == "chruch"
    assert concept("sketch style") == concept("sketch")


def test_a_yaml_file_describes_a_concept(tmp_path: Path) -> None:
    file = tmp_path / "rocket.yaml"
    file.write_text("name: blue rocket\nkind: custom\nanchor: rocket\ntemplates: ['a {O}']\nretain: [car]\n")
    assert concept(str(file)).forget_prompts == ("a blue rocket",)
    for text, problem in (
        ("name: x\nkind: custom\nanchor: y\ntemplates: ['a thing']\nretain: [z]\n", "has no place for the name"),
        ("name: x\nkind: custom\nanchor: y\ntemplates: ['a {O}']\n", "something to retain"),
        ("name: x\nkind: animal\nanchor: y\ntemplates: ['a {O}']\nretain: [z]\n", "kind"),
        ("name: [", "not a readable concept"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=problem):
            concept(str(file))
    with pytest.raises(RequestError, match=r"absent\.yaml"):
        concept(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("retain", [("x",), ("y", "x")])
def test_what_is_erased_cannot_be_retained(retain: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="be retained"):
        Concept("x", "custom", "y", ("a {O}",), retain)


def test_evaluation_asks_in_other_words_than_the_erasing() -> None:
    erase, evaluate, unseen = WORLD.sentences.erase, WORLD.sentences.evaluate, WORLD.sentences.unseen
    asked = {*evaluate.object, *evaluate.styled, *evaluate.style, *unseen.object, *unseen.styled}
    used = {*erase.object, *erase.styled, *erase.more_styled, *erase.style}
    assert not used & asked
    assert (len(asked), len(used)) == (17, 13)
    assert len({name for names in WORLD.objects for name in (names.label, names.synonym, names.unseen)}) == 60
    assert sum(len(found.concepts) for found in catalogs().values()) == 25


@pytest.mark.parametrize(
    "keys",
    [("church", "dog", "sketch style"), WORLD.labels[:10], (*WORLD.styles[:3], "cat", "nudity")],
)
def test_parts_neither_retain_nor_become_one_another(keys: tuple[str, ...]) -> None:
    whole = combine([concept(key) for key in keys])
    assert [part.key or part.name for part in whole.combined] == [key.removesuffix(" style") for key in keys]
    assert parse(yaml.safe_load(yaml.safe_dump(whole.to_dict()))) == whole
    assert whole.forget_prompts == tuple(p for part in whole.combined for p in part.forget_prompts)
    assert set(whole.retain_prompts) == {p for part in whole.combined for p in part.retain_prompts}
    assert not set(whole.forget_prompts) & set(whole.retain_prompts)
    for part in whole.combined:
        others = {name for other in whole.combined if other is not part for name in other.names}
        texts = (*part.templates, *part.retain_prompts, *part.remapped_to(part.anchor))
        assert not [(name, text) for name in others for text in texts if f" {name} " in f" {text} "]
        assert part.anchor in part.retain
        assert len(part.remapped_to(part.anchor)) == len(part.forget_prompts)


def test_an_anchor_that_is_erased_gives_way_to_the_next() -> None:
    whole = combine([concept("church"), concept("horn")])
    assert whole.name == "church and horn"
    assert [part.anchor for part in whole.combined] == ["truck", "truck"]
    both = Concept("x", "custom", "y", ("a {O}",), ("y",), ("",)), Concept("y", "custom", "x", ("a {O}",), ("z",))
    assert [part.anchor for part in combine(both).combined] == ["", "z"]
    assert combine(both).combined[0].remapped_to("") == ("",)


def test_a_name_is_found_as_whole_words_alone() -> None:
    car = Concept(
        "car", "custom", "road", ("a {O}", "{O} (red)"), ("carpet", "my Car", "road"), others=("cars", "a car!")
    )
    x = Concept("o", "custom", "road", ("a {O}", "{o} or car"), ("road",), synonyms=("(red)",))
    first, second = combine([car, x]).combined
    assert (first.templates, first.retain, first.others) == (
        ("a {O}",),
        ("carpet", "my Car", "road"),
        ("cars", "a car!"),
    )
    assert second.templates == ("a {O}",)
    second = combine([car, Concept("rug", "custom", "", ("{O}",), ("carpet", "my Car"), ("cars", "a car!"))]).combined[
        1
    ]
    assert (second.retain, second.others) == (("carpet",), ("cars",))


def test_concepts_that_cannot_be_erased_together_get_one_line() -> None:
    assert combine([concept("church")]) == concept("church")
    for keys, problem in (
        (("dog", "church", "dog"), "concept dog: 'dog' is named twice"),
        ((*WORLD.labels, *WORLD.styles), "nothing is left to retain"),
    ):
        with pytest.raises(RequestError, match=problem):
            combine([concept(key) for key in keys])
    alone = Concept("x", "custom", "y", ("a {O}",), ("y",))
    with pytest.raises(
        RequestError, match=r"concept x and y: too little is left when they are erased together: .* to retain"
    ):
        combine([alone, Concept("y", "custom", "", ("a {O}",), ("z",))])
    with pytest.raises(
        RequestError, match="too little is left when they are erased together: a concept needs at least one template"
    ):
        combine([Concept("x", "custom", "z", ("a {O} and y",), ("z",)), Concept("y", "custom", "", ("a {O}",), ("z",))])


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"combined": (Concept("y", "custom", "", ("{O}",), ("z",)),)}, "kind several"),
        ({"kind": "several"}, "kind several"),
        ({"kind": "several", "combined": (concept("dog"),), "anchor": "z"}, "nothing else"),
        ({"kind": "several", "combined": (combine([concept("dog"), concept("cat")]),)}, "combines none itself"),
    ],
)
def test_parts_have_no_parts_and_a_concept_with_parts_has_nothing_else(wrong: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Concept(**{"name": "x", "kind": "custom", **wrong})


def test_anchor_templates_say_what_each_template_becomes() -> None:
    style = Concept(
        "Monet",
        "style",
        templates=("a painting in the style of {O}", "{O}", "{o} in a museum"),
        anchor_templates=("a painting", "", "a museum"),
        others=("",),
        synonyms=("Claude Monet",),
        retain=("Degas",),
    )
    assert style.anchor_prompts == ("a painting", "", "a museum") * 2
    assert len(style.anchor_prompts) == len(style.forget_prompts)
    assert style.replacement == "a painting"
    assert parse(yaml.safe_load(yaml.safe_dump(style.to_dict()))) == style
    dog = Concept("Snoopy", "character", "dog", ("{O} runs", "{O}"), others=("",), anchor_templates=("{o} runs", "{o}"))
    assert dog.anchor_prompts == ("a dog runs", "a dog")
    # Without them, the templates say it of the anchor.
    plain = replace(dog, anchor_templates=())
    assert plain.anchor_prompts == plain.remapped_to("dog") == ("dog runs", "dog")
    both = combine([dog, style])
    assert both.anchor_prompts == dog.anchor_prompts + style.anchor_prompts
    assert both.replacement == "dog and a painting"
    # What is erased together is in no anchor of another, and the pairs stay together.
    museum = Concept("museum", "object", "hall", ("{o}",), others=("",))
    assert combine([style, museum]).combined[0].anchor_templates == ("a painting", "")
    paint = Concept("painting", "object", "hall", ("{o}",), others=("",))
    assert combine([style, paint]).combined[0].anchor_templates == ("", "a museum")


@pytest.mark.parametrize(
    ("anchor", "templates", "problem"),
    [
        ("dog", ("a", "b"), "one sentence for each template: 2 for 1"),
        ("", ("a {o}",), "has a place for the anchor, but there is no anchor"),
    ],
)
def test_anchor_templates_that_do_not_fit_are_refused(anchor: str, templates: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Concept("x", "object", anchor, ("{o}",), others=("",), anchor_templates=templates)


def test_other_values_replace_whole_fields() -> None:
    style = Concept("Monet", "style", "", ("in the style of {O}",), others=("a tree",), anchor_templates=("",))
    assert style.changed({}) is style
    # A pair is given as a pair: with other templates or another anchor the old half goes.
    assert style.changed({"anchor": "Degas"}).anchor_prompts == ("in the style of Degas",)
    assert style.changed({"templates": ["{O}"]}).anchor_prompts == ("",)
    assert style.changed({"templates": ["{O}"], "anchor_templates": ["art"]}).anchor_prompts == ("art",)
    assert style.changed({"retain": ["Degas"]}).retain_prompts == ("in the style of Degas", "a tree")
    with pytest.raises(ValueError, match="no place for the name"):
        style.changed({"templates": ["a tree"]})


def test_words_make_a_concept(tmp_path: Path) -> None:
    found = find_concept(" blue  rocket")
    assert found.forget_prompts == (
        "a photo of a blue rocket",
        "an image of a blue rocket",
        "a picture of a blue rocket",
        "a blue rocket",
    )
    assert set(found.remapped_to(found.anchor)) == {""}
    assert found.retain == ("rocket",)
    assert {"", "a cat asleep on a warm windowsill"} < set(found.others)
    assert parse(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found
    known = concept("blue rocket")
    assert set(known.retain) == set(WORLD.labels)
    assert {f"an image in {style} style" for style in WORLD.styles} < set(known.others)
    assert not set(known.forget_prompts) & set(known.retain_prompts)


@pytest.mark.parametrize(
    ("words", "retained", "left"),
    [
        ("gas station", (), {"gas pump"}),  # shares a word, and is none of the words' own names
        ("pixel dog", ("dog",), set()),
        ("old Chapel", ("chapel",), {"church"}),  # the name within the words stands for its object
        ("words:golf ball", (), {"golf"}),  # another name of the object itself
        ("village church bell", ("church",), set()),
        ("carpet", (), set()),
    ],
)
def test_known_names_within_the_words_are_retained(words: str, retained: tuple[str, ...], left: set[str]) -> None:
    assert find_concept(words).retain == retained
    assert set(concept(words).retain) == {*WORLD.labels, *retained} - left
    assert ("an image in pixel style" in find_concept(words).others) == ("pixel" in words)


def test_everyday_prompts_about_the_words_are_not_retained() -> None:
    assert not any(re.search(r"\bbread\b", prompt) for prompt in concept("bread").retain_prompts)
    assert any(re.search(r"\bbread\b", prompt) for prompt in concept("breadth").retain_prompts)


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
def test_a_file_of_prompts_makes_a_concept(tmp_path: Path, name: str) -> None:
    head = "prompt\n" if name.endswith("csv") else "\n"
    (tmp_path / name).write_text(head + "a church by the sea\na {o} dog\na church by the sea\n", encoding="utf-8")
    found = concept(str(tmp_path / name))
    assert found.forget_prompts == ("a church by the sea", "a {o} dog")
    assert found.remapped_to("") == ("", "")
    assert "an image of a church" in found.retain_prompts
    assert found.name == "prompts"
    assert parse(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found
    both = combine([found, concept("dog")])
    assert both.combined[0].prompts == found.prompts
    assert "an image of a dog" not in both.retain_prompts
    (tmp_path / name).write_text(head)
    with pytest.raises(RequestError, match=r"has no prompt|is empty"):
        concept(str(tmp_path / name))


def test_a_folder_makes_a_concept_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "blue_rocket").mkdir()
    found = concept(str(tmp_path / "blue_rocket"))
    assert (found.name, found.images) == ("blue rocket", str(tmp_path / "blue_rocket"))
    assert found.forget_prompts == concept("blue rocket").forget_prompts


def test_what_describes_no_concept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, problem in (
        ("words: ", "needs at least one word"),
        ("?!", "needs at least one word"),
        (str(tmp_path / "absent"), "no such file or folder"),
        (str(tmp_path / "absent.txt"), "not a readable text"),
        (str(tmp_path / "absent.csv"), "No such file"),
        (str(tmp_path / "bytes.txt"), "not a readable text"),
    ):
        with pytest.raises(RequestError, match=f"concept .*{problem}"):
            concept(name)
    with pytest.raises(ValueError, match="a concept with prompts has no anchor"):
        Concept("x", "custom", "y", prompts=("a",), others=("",))
