"""Catalogues and kinds: concepts as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalog, catalogs, read_catalog
from erase_concept.prompts.concept import parse
from erase_concept.prompts.find import find_concept
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
    with pytest.raises(RequestError, match="catalog absent: allowed: emojinette, unsafe"):
        catalog("absent")


def test_concepts_are_found_in_the_catalogues_that_are_named() -> None:
    assert find_concept("church", ["emojinette"]).kind == "object"
    assert find_concept("church", ["unsafe"]).kind == find_concept("church").kind == "custom"
    assert find_concept("nudity").kind == "nudity"
    assert find_concept("nudity", ["emojinette"]).kind == "custom"


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
    assert (found.templates, found.anchor) == (kinds()[kind].templates, kinds()[kind].anchor)
    assert any(found.retain_prompts)
    # Everyday prompts that hold one of the names are not retained.
    everyday = find_concept("words:zebra").others
    assert [prompt for prompt in everyday if "bus" in prompt.split()]
    assert not [prompt for prompt in found.others if "bus" in prompt.split() or "loaf of bread" in prompt]


def test_what_is_described_wins_over_the_kind() -> None:
    told = {"name": "Ada", "kind": "person", "anchor": "woman", "others": ["a tree"]}
    found = parse(complete(told))
    assert (found.anchor, found.others, found.retain) == ("woman", ("a tree",), kinds()["person"].retain)
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
