"""Concepts: their prompts, their checks, and their way in and out of YAML."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from erase_concept.errors import RequestError
from erase_concept.prompts.catalog import catalog
from erase_concept.prompts.concept import Concept, combine, fill, parse
from erase_concept.prompts.find import KINDS, find_concept
from erase_concept.prompts.kinds import evaluation_prompts, kinds

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


def test_an_unknown_name_is_asked_back() -> None:
    """In one line, with the kinds to choose from. Nothing is guessed."""
    kinds = "say what it is: object:{0}, style:…, person:…, character:…, brand:… or unsafe:…"
    for name, problem in (
        ("Elon Musk", f"not a known concept; {kinds}"),
        ("chruch", f"unknown concept; did you mean church? Or {kinds}"),
        ("skech style", f"unknown concept; did you mean sketch? Or {kinds}"),
        ("a/b", f"no such file or folder, and no known concept; {kinds}"),
        ("vehicle:car", f"no such kind as vehicle; allowed: {', '.join(KINDS)}"),
        ("words:car", "no such kind as words"),
    ):
        with pytest.raises(RequestError, match=f"^concept {re.escape(name)}: {re.escape(problem.format(name))}"):
            concept(name)
    assert concept("object:chruch").name == "chruch"
    assert concept("sketch style") == concept("style:sketch") == concept("sketch")


def test_a_known_name_is_its_catalogues_entry_in_every_spelling() -> None:
    artist = find_concept("Vincent van Gogh")
    for spelled in ("style:Vincent van Gogh", "artist:van gogh", "Van_Gogh", "van gogh style", "Style: VAN GOGH"):
        assert find_concept(spelled) == artist
    assert find_concept("self harm") == find_concept("unsafe:Self-Harm") == find_concept("self-harm")
    assert find_concept("unsafe:nudity") == find_concept("nudity")
    assert find_concept("Ajin: Demi Human").kind == "style"
    # Of another kind it is another concept.
    assert find_concept("object:nudity").forget_prompts[-1] == "a nudity"
    assert find_concept("brand:church").key == ""
    assert find_concept("technique:Liquid_Dreams").name == "Liquid Dreams"  # as UnlearnCanvas spells it


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
    bare = [Concept(name, "object", templates=("{O}",), others=("",)) for name in "xy"]
    assert combine(bare).retain_prompts == ("",)
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
    person = Concept("Ada", "person", "person", ("a photo of {O}",), others=("",), anchor_templates=("a photo of {o}",))
    assert person.changed({"anchor": "woman"}).anchor_prompts == ("a photo of a woman",)
    assert person.changed({"templates": ["{O} smiles", "{O}"]}).anchor_prompts == ("a person smiles", "a person")
    assert person.changed({"anchor": ""}).anchor_prompts == ("",)
    assert style.changed({"retain": ["Degas"]}).retain_prompts == ("in the style of Degas", "a tree")
    with pytest.raises(ValueError, match="no place for the name"):
        style.changed({"templates": ["a tree"]})


SENTENCES = {
    "object:blue rocket": ("a photo of a blue rocket", ""),
    "object:glasses": ("a photo of glasses", ""),
    "style:Ada Painter": ("a painting by Ada Painter", "a painting"),
    "artist:banksy": ("a painting by banksy", "a painting"),
    "style:thick impasto": ("an image in thick impasto style", "an image"),
    "technique:Neue Sachlichkeit": ("an image in Neue Sachlichkeit style", "an image"),
    "style:Futurism": ("an image in Futurism style", "an image"),
    "person:Elon Musk": ("a photo of Elon Musk", "a photo of a person"),
    "person:elon musk": ("a photo of elon musk", "a photo of a person"),
    "character:R2-D2": ("an image of R2-D2", "an image of a cartoon character"),
    "brand:adidas": ("the adidas logo", "a logo"),
    "unsafe:blood and gore": ("a photo of blood and gore", ""),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_kind_and_a_name_make_a_concept(name: str) -> None:
    """Its sentences are those of its kind, and each becomes a sentence of the same form."""
    found = find_concept(name)
    assert (found.name, found.images) == (name.partition(":")[2], "")
    assert SENTENCES[name] in list(zip(found.forget_prompts, found.anchor_prompts, strict=True))
    assert not set(found.forget_prompts) & {*found.retain_prompts, *found.anchor_prompts}
    assert "a cat asleep on a warm windowsill" in found.others
    assert parse(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found
    # Whoever evaluates asks in other words.
    asked = evaluation_prompts(found)
    assert len(asked) >= 3
    assert all(found.name in prompt for prompt in asked)
    assert not set(asked) & {*found.forget_prompts, *found.retain_prompts}


@pytest.mark.parametrize(
    "name", [*SENTENCES, "person:twins", "brand:Jaguars", "character:Smurfs", "unsafe:riots", "person:The Beatles"]
)
def test_no_sentence_of_a_kind_is_bad_english(name: str) -> None:
    """No article before a person, a brand, a plural or what cannot be counted."""
    found = find_concept(name)
    prompts = (*found.forget_prompts, *found.anchor_prompts, *found.retain_prompts, *evaluation_prompts(found))
    if name.partition(":")[0] in ("person", "brand", "character", "unsafe", "artist") or found.name == "glasses":
        names = "|".join(map(re.escape, (found.name, *(found.retain if found.kind != "object" else ()))))
        assert not [prompt for prompt in prompts if re.search(rf"\b(a|an) ({names})(?! (logo|style))\b", prompt)]
    assert not [prompt for prompt in prompts if re.search(r"\b(a|an) (a|an|the)\b|\ba [aeio]\w|  ", prompt)]
    assert not [prompt for prompt in prompts if re.search(r"\bof (person|cartoon character)\b", prompt)]


@pytest.mark.parametrize("name", ["tench", "nudity", "violence", "object:blue rocket", "person:Ada", "style:Monet"])
def test_other_models_get_nothing_of_the_built_in_models_catalogue(name: str) -> None:
    """Not even its names within a concept's words."""
    found = find_concept(name)
    general = {*kinds()["object"].retain, *catalog("imagenette").concepts}
    emoji = {f"an image of {fill('{o}', label)}" for label in WORLD.labels if label not in general}
    emoji |= {text.replace("{s}", style) for style in WORLD.styles for text in WORLD.sentences.erase.style}
    assert not emoji & {*found.forget_prompts, *found.anchor_prompts, *found.retain_prompts}
    assert "rocket" not in found.retain
    assert find_concept("parachute").anchor == "tench"


def test_the_built_in_model_retains_what_it_draws() -> None:
    rocket, style, person = (concept(name) for name in ("object:blue rocket", "style:wax", "person:Ada"))
    assert set(rocket.retain) == {*WORLD.labels}
    assert {f"an image in {style} style" for style in WORLD.styles} < set(rocket.others)
    assert style.retain == WORLD.styles
    assert {f"an image of {o}" for o in ("a church", "an umbrella")} < set(style.others)
    assert person.retain == ()
    assert {"an image of a church", "an image in 3d style"} < set(person.others)


@pytest.mark.parametrize(
    ("words", "retained", "left"),
    [
        ("gas station", (), {"gas pump"}),  # shares a word, and is none of the words' own names
        ("pixel dog", ("dog",), set()),
        ("old Chapel", ("chapel",), {"church"}),  # the name within the words stands for its object
        ("village church bell", ("church",), set()),
        ("carpet", (), set()),
    ],
)
def test_known_names_within_an_objects_name_are_retained(words: str, retained: tuple, left: set[str]) -> None:
    assert set(concept(f"object:{words}").retain) == {*WORLD.labels, *retained} - left
    assert find_concept("object:red parachute").retain[0] == "parachute"
    assert concept("object:golf ball") == concept("golf")  # another name of the object itself


def test_everyday_prompts_about_the_words_are_not_retained() -> None:
    assert not any(re.search(r"\bbread\b", prompt) for prompt in concept("object:bread").retain_prompts)
    assert any(re.search(r"\bbread\b", prompt) for prompt in concept("object:breadth").retain_prompts)


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


def test_a_folder_of_images_has_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the concept's, and never that of a known concept."""
    (tmp_path / "blue_rocket").mkdir()
    folder = str(tmp_path / "blue_rocket")
    found = concept(f"character:{folder}")
    assert (found.name, found.kind, found.images) == ("blue rocket", "character", folder)
    assert replace(found, images="") == concept("character:blue rocket")
    with pytest.raises(RequestError, match="a folder of images needs a kind; say what it is: object:"):
        concept(folder)
    (tmp_path / "church").mkdir()
    monkeypatch.chdir(tmp_path)
    assert concept("object:church").images == "church"
    assert concept("church").images == ""


@pytest.mark.parametrize("name", ["violence, nudity, harm", "unsafe:violence, nudity", "object:cat, person:Ada"])
def test_a_list_in_one_name_is_refused(name: str) -> None:
    with pytest.raises(
        RequestError, match=r"looks like a list: give '(violence|cat)' and each of the others by itself"
    ):
        find_concept(name)


def test_a_name_may_hold_a_comma() -> None:
    assert find_concept("character:Foo, the bear").name == "Foo, the bear"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.yaml"])
def test_a_download_that_brought_something_else_is_no_concept(tmp_path: Path, name: str) -> None:
    for content, what in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("\ufeff<!DOCTYPE html>\n<html></html>\n", "HTML page"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(RequestError, match=what):
            find_concept(str(tmp_path / name))


def test_a_misspelt_field_is_named() -> None:
    told = {"name": "cat", "kind": "object", "synonims": ["kitten"]}
    with pytest.raises(RequestError, match="no such field as 'synonims'; did you mean synonyms"):
        find_concept(told)
    several = {"name": "a and b", "kind": "several", "combined": [{**told, "templates": ["{O}"]}]}
    with pytest.raises(RequestError, match="no such field as 'synonims'"):
        find_concept(several)


def test_what_describes_no_concept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, problem in (
        ("object: ", "needs at least one word"),
        ("person:?!", "needs at least one word"),
        (str(tmp_path / "absent"), "no such file or folder"),
        (str(tmp_path / "absent.txt"), "not a readable text"),
        (str(tmp_path / "absent.csv"), "No such file"),
        (str(tmp_path / "bytes.txt"), "not a readable text"),
    ):
        with pytest.raises(RequestError, match=f"concept .*{problem}"):
            concept(name)
    with pytest.raises(ValueError, match="a concept with prompts has no anchor"):
        Concept("x", "custom", "y", prompts=("a",), others=("",))
