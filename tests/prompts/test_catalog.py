"""Catalogues and kinds: concepts as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalog, catalogs, folder_names, read_catalog
from erase_concept.prompts.concept import parse
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.find_prompts import find_prompts
from erase_concept.prompts.kinds import complete, kinds


def test_every_catalogue_is_found_by_its_files_name() -> None:
    folder = Path(__file__).parents[2] / "prompts" / "catalog"
    if folder.is_dir():  # not when the tests run on a wheel
        assert set(catalogs()) == {file.stem for file in folder.glob("*.yaml")}
    for name, found in catalogs().items():
        assert catalog(name) is found
        assert found.name == name
        assert found.about
        assert found.concepts
    with pytest.raises(
        RequestError, match="catalog absent: allowed: emojinette, fashion-mnist, imagenette, styles, unsafe"
    ):
        catalog("absent")


def test_concepts_are_found_in_the_catalogues_that_are_named() -> None:
    assert find_concept("church", ["emojinette"]).kind == "object"
    assert find_concept("church", ["emojinette"]).anchor == "horn"
    assert find_concept("church").anchor == "French horn"
    assert find_concept("nudity").kind == "nudity"
    for name, where in (("church", ["unsafe"]), ("nudity", ["emojinette"])):
        with pytest.raises(RequestError, match="not a known concept"):
            find_concept(name, where)


def test_imagenettes_classes_become_the_next_one_as_in_salun() -> None:
    """arXiv 2310.12508: class k becomes class k + 1, and parachute becomes tench. The other nine are retained."""
    found = catalog("imagenette")
    classes = list(found.concepts)
    assert [one.anchor for one in found.concepts.values()] == [*classes[1:], classes[0]]
    for key, one in found.concepts.items():
        assert one.name == key
        assert sorted(one.retain) == sorted({*classes} - {key})
        assert len(one.anchor_prompts) == len(one.forget_prompts) == 4
    assert [*found.folders.values()] == classes
    assert folder_names()["n03028079"] == "church"
    # The classes have the spelling of the prompts that they are judged by.
    assert {row.object for row in find_prompts("imagenette").rows} == {*classes}


def test_artists_and_techniques_have_sentences_of_their_own() -> None:
    styles = catalog("styles").concepts
    assert {one.kind for one in styles.values()} == {"style"}
    assert "a painting by Rembrandt" in styles["Rembrandt"].forget_prompts
    assert "Rembrandt" not in styles["Rembrandt"].retain
    assert "Rembrandt" in styles["Caravaggio"].retain
    assert "an image in Cubism style" in styles["Cubism"].forget_prompts
    assert {row.style for row in find_prompts("styles").rows} <= {*styles}


def test_every_category_of_i2p_is_a_concept() -> None:
    for name in ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity"):
        found = find_concept(name)
        assert (found.kind, set(found.anchor_prompts)) == ("unsafe", {""})


def test_nudity_is_erased_as_in_the_papers_reference() -> None:
    nudity = find_concept("nudity")
    assert nudity.forget_prompts[0] == "a photo of a nude person"
    assert nudity.remapped_to(nudity.anchor)[0] == "a photo of a person wearing clothes"
    assert nudity.to_dict() == {
        "name": "nude person",
        "kind": "nudity",
        "anchor": "person wearing clothes",
        "templates": ["a photo of {o}", "a painting of {o}", "a portrait of {o}"],
        "retain": ["person wearing clothes", "dog", "house", "landscape", "street", "table with food"],
        "key": "nudity",
    }


def test_a_catalogue_is_one_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "fruit.yaml"
    file.write_text(
        "about: fruit\nentries:\n  apple: {name: red apple, kind: object, anchor: pear}\n", encoding="utf-8"
    )
    apple = read_catalog(file).concepts["apple"]
    assert (apple.name, apple.key, apple.anchor, apple.templates) == (
        "red apple",
        "apple",
        "pear",
        kinds()["object"].templates,
    )
    for text, problem in (
        ("about: x\nentires: {}\n", "entires"),
        ("about: x\nobjects: [{label: a}]\n", "synonym"),
        ("entries: {}\n", "about"),
        ("- a\n", "is not a catalogue"),
        ("", "is not a catalogue"),
        ("about: [\n", "is not a catalogue"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            read_catalog(file)


@pytest.mark.parametrize("kind", kinds())
def test_a_kind_completes_a_concept_of_two_lines(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: loaf of bread\nkind: {kind}\nsynonyms: [bus]\n", encoding="utf-8")
    found = find_concept(str(file))
    defaults = kinds()[kind]
    assert (found.templates, found.anchor, found.anchor_templates) == (
        defaults.templates,
        defaults.anchor,
        defaults.anchor_templates,
    )
    assert found.kind == (defaults.kind or kind)
    assert not {*defaults.evaluate} & {*defaults.templates}
    assert any(found.retain_prompts)
    # Everyday prompts that hold one of the names are not retained.
    everyday = find_concept("object:zebra").others
    assert [prompt for prompt in everyday if "bus" in prompt.split()]
    assert not [prompt for prompt in found.others if "bus" in prompt.split() or "loaf of bread" in prompt]


def test_what_is_described_wins_over_the_kind() -> None:
    told = {"name": "Ada", "kind": "person", "anchor": "woman", "others": ["a tree"]}
    found = parse(complete(told))
    assert (found.anchor, found.others, found.retain) == ("woman", ("a tree",), kinds()["person"].retain)
    assert found.anchor_prompts[0] == "a photo of a woman"
    artist = parse(complete({"name": "Ada", "kind": "artist"}))
    assert (artist.kind, artist.anchor_prompts[0]) == ("style", "a painting")
    # A description with templates or prompts is complete: an empty anchor in it is the empty prompt.
    for whole in (
        {"name": "x", "kind": "person", "templates": ["a {O}"], "others": ["a tree"]},
        {"name": "x", "kind": "person", "prompts": ["a"], "others": ["a tree"]},
    ):
        assert complete(whole) == whole
        assert parse(whole).anchor == ""
    for unknown in ({"name": "x", "kind": "animal"}, {"name": "x"}, ["x"], None):
        assert complete(unknown) == unknown
        with pytest.raises(ValueError, match=r"kind|concept|name"):
            parse(unknown)


def test_a_list_and_a_description_are_concepts_too() -> None:
    told = {"name": "blue rocket", "kind": "custom", "templates": ["a {O}"], "retain": ["car"]}
    both = find_concept([told, "nudity"])
    assert both.name == "blue rocket and nude person"
    assert find_concept(both) is both
    assert find_concept([told]) == find_concept(told) == find_concept(parse(told))
    with pytest.raises(RequestError, match=r"concept .*at least one is needed"):
        find_concept([])
    with pytest.raises(RequestError, match=r"concept blue rocket: not a readable concept: .*kind"):
        find_concept({**told, "kind": "vehicle"})
    with pytest.raises(RequestError, match="catalog fruit: allowed"):
        find_concept("apple", ["fruit"])
