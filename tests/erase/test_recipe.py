"""Recipes: validated, layered, and the same after a trip through YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from erase_concept.errors import RequestError
from erase_concept.methods import METHODS
from erase_concept.methods.salun import SalUnSettings
from erase_concept.presets import presets
from erase_concept.recipe import make_recipe, read_recipe, recipe_for
from erase_concept.settings import merge


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


@pytest.mark.parametrize("name", [*presets(), "default"])
@pytest.mark.parametrize("concept", ["church", "sketch", "nudity"])
def test_every_preset_is_valid(name: str, concept: str) -> None:
    config = recipe_for("emojinette", concept, preset_name=name).settings
    assert config.steps >= 1


def test_the_papers_settings_are_kept() -> None:
    """SalUn, arXiv 2310.12508: half of the weights, Adam 1e-5, alpha 0.5 (nudity 0.1), batch 8, guidance 7.5."""
    recipe = recipe_for("any/model", "church", preset_name="paper")
    config = recipe.settings
    assert (config.lr, config.alpha, config.batch_size, config.optimizer) == (1e-5, 0.5, 8, "adam")
    assert isinstance(config, SalUnSettings)
    assert config.remap == "anchor"
    assert (recipe.mask.sparsity, recipe.mask.accumulate, recipe.mask.guidance) == (0.5, "signed", 7.5)
    assert recipe_for("any/model", "nudity", preset_name="paper").settings.alpha == 0.1
    assert recipe_for("any/model", "church") == recipe


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
