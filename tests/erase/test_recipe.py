"""Recipes: validated, layered, and the same after a trip through YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from erase_concept.errors import RequestError
from erase_concept.make_data import check_data
from erase_concept.methods import METHODS
from erase_concept.methods.salun import SalUnSettings
from erase_concept.presets import PRESETS, AuthorsSettings, KindSettings, authors_settings, preset
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe, MaskRecipe, find_concept, make_recipe, read_recipe, recipe_for
from erase_concept.run import check
from erase_concept.settings import check_settings, merge


def test_comes_back_from_its_file(tmp_path: Path) -> None:
    recipe = recipe_for("emojinette", "church", settings={"lr": 3e-5}, mask={"kind": "random"}, seed=4)
    recipe.save(tmp_path / "r.yaml")
    back = make_recipe(read_recipe(tmp_path / "r.yaml"))
    assert back == recipe
    assert back.fingerprint() == recipe.fingerprint()
    assert back.fingerprint() != recipe_for("emojinette", "church", seed=4).fingerprint()
    assert back.fingerprint("base") != back.fingerprint("other base")


def test_a_list_of_concepts_is_erased_together(tmp_path: Path) -> None:
    recipe = recipe_for("emojinette", ["church", "sketch style"], mask={"combine": "union"})
    assert (recipe.concept.name, recipe.concept.kind) == ("church and sketch", "several")
    recipe.save(tmp_path / "r.yaml")
    assert make_recipe(read_recipe(tmp_path / "r.yaml")) == recipe
    assert recipe_for("emojinette", ["church"]) == recipe_for("emojinette", "church")
    # Of one kind, that kind's preset; of several, the one for any.
    guidance = {kinds: recipe_for("emojinette", kinds.split()).settings.guidance for kinds in ("flat 3d", "flat dog")}
    assert guidance == {"flat 3d": 2.0, "flat dog": 0.5}
    with pytest.raises(RequestError, match="named twice"):
        recipe_for("emojinette", ["church", "church"])
    with pytest.raises(RequestError, match="at least one"):
        recipe_for("emojinette", [])


def test_layers_change_what_they_name_alone() -> None:
    assert merge({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    preset = recipe_for("emojinette", "church")
    changed = recipe_for("emojinette", "church", settings={"steps": 3})
    assert changed.settings == replace(preset.settings, steps=3)


@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("concept", ["church", "sketch", "nudity"])
def test_every_preset_is_valid(name: str, concept: str) -> None:
    assert recipe_for("emojinette", concept, preset_name=name).concept.kind in ("object", "style", "nudity")


AUTHORS = [
    (method, name, kind)
    for method, authors in authors_settings().items()
    for name, entries in (("paper", authors.paper), ("latest-code", authors.latest_code))
    for kind, entry in entries.items()
    if not entry.like
]


@pytest.mark.parametrize(("method", "name", "kind"), AUTHORS)
def test_the_settings_of_authors_are_settings_that_there_are(method: str, name: str, kind: str) -> None:
    """A misspelt name would be dropped in silence, as one that only other methods have is."""
    entry, of = authors_settings()[method].of(name, kind)
    assert of == kind
    check_settings(METHODS.find(method).settings, entry.settings)
    check_settings(MaskRecipe, entry.mask)
    check_settings(DataRecipe, entry.data)
    named = Concept("zebra", "object", "horse", ("a photo of {o}",), others=("",))
    assert named.changed(entry.concept).forget_prompts


def test_every_file_of_authors_is_a_methods() -> None:
    assert {*authors_settings()} <= {*METHODS.all()}
    for authors in authors_settings().values():
        assert authors.source
        assert authors.paper


def test_a_file_like_another_says_only_what_differs() -> None:
    authors = authors_settings()
    base, ascent = authors["random-label"], authors["gradient-ascent"]
    assert ascent.source != base.source
    assert ascent.differs[: len(base.differs)] == base.differs
    assert ascent.paper["nudity"] == base.paper["nudity"]
    one, other = base.paper["object"], ascent.paper["object"]
    assert other.settings == one.settings | {"alpha": 0.1, "epochs": 10}
    assert (other.concept, other.data) == (one.concept, one.data)


def test_a_kind_without_settings_takes_anothers_and_says_so() -> None:
    told = {"source": "a/b: c", "paper": {"style": {"settings": {"lr": 1}}, "any": {"like": "style"}}}
    authors = TypeAdapter(AuthorsSettings).validate_python(told)
    assert authors.of("paper", "person") == (KindSettings(settings={"lr": 1}), "style")
    assert authors.of("paper", "style")[1] == "style"
    for wrong in ({"person": {"like": "style"}}, {"style": {}, "person": {"like": "style", "data": {"forget": 1}}}):
        with pytest.raises(ValueError, match="an entry with like has nothing else, and names another entry"):
            TypeAdapter(AuthorsSettings).validate_python({**told, "paper": wrong})
    person = preset("paper", "any/model", "person", "esd-x")
    assert person.notes[0].startswith("the authors have no settings for the kind person: theirs for the kind style, ")
    assert person.concept == {}, "prompts for a style are no sentences about a person"
    assert preset("paper", "any/model", "style", "esd-x").notes[0].startswith("authors' settings for the kind style (")


def test_the_default_preset_has_the_authors_settings_and_prompts_of_ours() -> None:
    """The paper's preset has their prompts too, and a description that is given whole stays as it is."""
    default, paper = (recipe_for("any/model", "nudity", preset_name=name) for name in ("default", "paper"))
    assert (default.settings, default.mask, default.data) == (paper.settings, paper.mask, paper.data)
    assert default.concept == find_concept("nudity", "any/model")
    assert paper.concept.forget_prompts == ("a photo of a nude person",)
    assert paper.concept.retain_prompts == paper.concept.anchor_prompts == ("a photo of a person wearing clothes",)
    told = default.concept.to_dict()
    for whole in (told, default.concept):
        assert recipe_for("any/model", whole, preset_name="paper").concept == default.concept
    assert default.notes[0].startswith("default for the kind nudity: ")
    assert make_recipe(default.to_dict()) == default
    assert default.fingerprint() == replace(default, notes=()).fingerprint()


def test_the_authors_latest_code_is_a_preset_where_it_differs() -> None:
    steps = {
        name: recipe_for("any/model", "nudity", method="esd-x", preset_name=name).settings.steps for name in PRESETS
    }
    assert steps == {"default": 1000, "paper": 1000, "latest-code": 200}
    with pytest.raises(RequestError, match="preset latest-code: the authors of salun changed nothing"):
        recipe_for("any/model", "nudity", method="salun", preset_name="latest-code")
    with pytest.raises(RequestError, match="preset paper: edit-then-train has no settings of other authors"):
        recipe_for("any/model", "nudity", method="edit-then-train", preset_name="paper")


def test_a_file_without_an_authors_settings_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "authors").mkdir()
    monkeypatch.setattr("erase_concept.presets._FOLDER", tmp_path)
    for text in ("paper: {}", "source: x", "source: x\npaper: {style: {lr: 1}}", "- x", ""):
        (tmp_path / "authors" / "some.yaml").write_text(text)
        authors_settings.cache_clear()
        with pytest.raises(ValueError, match=r"some\.yaml does not hold the settings of a method's authors"):
            authors_settings()
    monkeypatch.undo()
    authors_settings.cache_clear()


def test_the_papers_settings_are_kept() -> None:
    """SalUn, arXiv 2310.12508: half of the weights, Adam 1e-5, alpha 0.5 (nudity 0.1), batch 8, guidance 7.5."""
    recipe = recipe_for("any/model", "church", preset_name="paper")
    config = recipe.settings
    assert (config.lr, config.alpha, config.batch_size, config.optimizer) == (1e-5, 0.5, 8, "adam")
    assert isinstance(config, SalUnSettings)
    assert config.remap == "anchor"
    assert (recipe.mask.sparsity, recipe.mask.accumulate, recipe.mask.guidance) == (0.5, "signed", 7.5)
    assert recipe_for("any/model", "nudity", preset_name="paper").settings.alpha == 0.1
    assert recipe_for("any/model", "church").settings == config


def test_the_default_of_a_model_names_its_method() -> None:
    assert recipe_for("emojinette", "church").method == "edit-then-train"
    assert recipe_for("emojinette", "church", preset_name="paper").method == "salun"
    assert recipe_for("any/model", "church").method == "salun"
    # Asked for by its name, the preset's own method has the same settings; every other one its own.
    assert recipe_for("emojinette", "church", method="edit-then-train") == recipe_for("emojinette", "church")
    assert recipe_for("emojinette", "church", method="salun").settings.steps == 60


@pytest.mark.parametrize("name", METHODS.all())
def test_every_method_says_what_it_is(name: str) -> None:
    record = METHODS.find(name)
    for text in (record.summary, record.title, record.paper, record.trains, record.needs):
        assert text.strip() == text != ""
    assert "\n" not in record.summary
    assert (record.needs == "prompts") == (record.latents == ())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"settings": {"lrr": 1}}, r"settings\.lrr 1: no such setting; there are: .*lr"),
        ({"settings": {"lr": "fast"}}, r"settings\.lr fast: .*number"),
        ({"settings": {"steps": 0}}, r"settings\.steps 0: should be greater than or equal to 1"),
        ({"method": "salun", "settings": {"remap": "all"}}, r"settings\.remap all: .*'anchor', 'random' or 'empty'"),
        ({"method": "magic"}, r"method magic: .*allowed: .*salun"),
        ({"mask": {"sparsity": 1.0}}, r"mask\.sparsity 1\.0: .*less than 1"),
        ({"mask": {"colour": "red"}}, r"mask\.colour red: "),
        ({"seed": -1}, r"seed -1: .*greater than or equal to 0"),
    ],
)
def test_bad_values_are_named(values: dict, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        recipe_for("emojinette", "church", **values)


def test_unreadable_files_and_presets_are_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("- a list")
    with pytest.raises(RequestError, match="must hold a mapping"):
        read_recipe(file)
    file.write_text("a: [")
    with pytest.raises(RequestError, match=r"recipe .*not readable"):
        read_recipe(file)
    with pytest.raises(RequestError, match="preset best: allowed: default, paper"):
        recipe_for("emojinette", "church", preset_name="best")


def test_steps_and_epochs_stand_for_each_other() -> None:
    """The ones of the upper layer count, and both together are refused."""
    assert recipe_for("any/model", "nudity", method="salun").settings.epochs == 1
    steps = recipe_for("any/model", "nudity", method="salun", settings={"steps": 7}).settings
    assert (steps.steps, steps.epochs) == (7, None)
    epochs = recipe_for("emojinette", "church", method="salun", settings={"epochs": 2}).settings
    assert epochs.epochs == 2
    assert epochs.resolved(17) == replace(epochs, steps=2 * 3, epochs=None)  # the last batch of 8 is not full
    assert steps.resolved(17) == steps
    with pytest.raises(RequestError, match=r"settings\.epochs 2: stands in the place of steps: give one"):
        recipe_for("any/model", "nudity", method="salun", settings={"epochs": 2, "steps": 3})


def test_anchor_rows_are_made_where_a_method_learns_from_nothing_else(tmp_path: Path) -> None:
    for method in METHODS.all().values():
        wanted = 64 if method.name.startswith("concept-ablation") or method.name == "selective-amnesia" else 0
        recipe = make_recipe({"model": "any/model", "concept": "nudity", "method": method.name})
        assert recipe.data.anchor == wanted
    none = {"model": "any/model", "concept": "nudity", "method": "selective-amnesia", "data": {"anchor": 0}}
    recipe = make_recipe({**none, "settings": {"surrogate": "noise"}})
    recipe.save(tmp_path / "r.yaml")
    assert make_recipe(read_recipe(tmp_path / "r.yaml")) == recipe  # none is not the method's own
    check(recipe)
    with pytest.raises(RequestError, match=r"data\.anchor 0: selective-amnesia needs pictures of the anchor"):
        check(make_recipe(none))


@pytest.mark.parametrize("method", ["salun", "random-label", "salun-soft"])
def test_random_names_need_names(method: str) -> None:
    """Without any, all prompts would become the empty one."""
    bare = Concept("zebra", "custom", "", ("a photo of {o}",), others=("",))
    asked = {"model": "any/model", "method": method, "settings": {"remap": "random"}}
    with pytest.raises(RequestError, match=r"settings\.remap random: needs names .* zebra has no anchor"):
        check(make_recipe({**asked, "concept": bare}))
    for named in (replace(bare, anchor="horse"), replace(bare, retain=("horse",))):
        check(make_recipe({**asked, "concept": named}))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"scheduler": "Magic"}, r"data\.scheduler Magic: allowed: "),
        ({"eta": 1.0}, r"data\.eta 1\.0: is a setting of DDIM: data\.scheduler must be DDIMScheduler"),
    ],
)
def test_samplers_that_there_are_not_are_refused(data: dict, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        check(recipe_for("any/model", "nudity", data=data))


@pytest.mark.parametrize("method", METHODS.all())
def test_every_method_takes_every_kind_of_concept_from_every_preset(method: str) -> None:
    """With prompts in good English: those that authors wrote for one kind are not said of another."""
    names = ["tench", "object:zebra", "style:Ada", "person:Ada", "character:Ada", "brand:Ada", "nudity", "violence"]
    for what in (*names, ["tench", "nudity"], ["tench", "church"]):
        for name in PRESETS:
            try:
                recipe = recipe_for("any/model", what, method=method, preset_name=name)
            except RequestError as problem:
                assert problem.setting == "preset"  # noqa: PT017 - some methods have no such preset
                continue
            concept = recipe.concept
            assert recipe.method == method
            assert len(concept.anchor_prompts) == len(concept.forget_prompts)
            assert not [prompt for prompt in concept.forget_prompts if " a Ada" in prompt or " an Ada" in prompt]
            assert make_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("kind", ["object", "style", "person", "character", "brand", "nudity", "unsafe", "several"])
def test_the_default_of_every_kind_has_a_method_and_a_reason(kind: str) -> None:
    found = preset("default", "any/model", kind)
    assert found.method in METHODS.all()
    assert found.notes[0].startswith(f"default for the kind {kind}: ")
    assert "unmeasured here" in found.notes[0]
    # Nothing of a built-in model's preset.
    assert found.method != preset("default", "emojinette", kind).method


@pytest.mark.parametrize("kind", ["object", "style", "person", "character", "brand", "unsafe"])
def test_the_default_of_every_kind_learns_from_images_where_they_are_given(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "red_star"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    named, given = f"{kind}:{folder}", {"data": {"forget_images": folder}}
    for recipe in (recipe_for("model", named), recipe_for("model", f"{kind}:red star", **given)):
        assert "forget" in METHODS.find(recipe.method).latents
        check_data(recipe)
