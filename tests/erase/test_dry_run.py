"""What a run is expected to take, against what its parts are and against a real step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml
from diffusers import UNet2DConditionModel

from erase_concept import masks
from erase_concept.cards import cards, find_card
from erase_concept.counting import LivingBytes
from erase_concept.dry_run import Expected, expect, of_memory, plan_stages
from erase_concept.errors import RequestError
from erase_concept.make_data import make_data_for
from erase_concept.methods import METHODS
from erase_concept.methods.salun import SalUnSettings
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.load import ModelConfigs, configs, load
from erase_concept.predict import predict_edit, predict_saliency, predict_sampling, predict_step, predict_vae
from erase_concept.prompts.concept import Concept, combine
from erase_concept.recipe import MaskRecipe, Recipe, make_recipe, recipe_for
from erase_concept.settings import settings_of
from erase_concept.training.loop import Training


@pytest.fixture(scope="module")
def make() -> ModelConfigs:
    """Emojinette's configurations."""
    return configs("emojinette")


CONFIG = SalUnSettings(batch_size=2)


@pytest.fixture
def few_prompts() -> Concept:
    """A concept whose prompts take no memory to speak of."""
    return Concept("square", "object", "circle", ("a {O}", "one {O}"), retain=("circle", "line"))


def test_weights_and_state_are_counted(make: ModelConfigs) -> None:
    unet = UNet2DConditionModel.from_config(make.components["unet"])
    weights = sum(p.numel() for p in unet.parameters())
    expected = predict_step(make, CONFIG, 0.5).bytes
    assert expected["weights"] == 4 * weights
    for state, size in (("fp32", 8), ("bf16", 4)):
        assert predict_step(make, replace(CONFIG, state=state), 0.25).bytes["optimizer"] == round(weights / 4 * size)
    assert predict_step(make, replace(CONFIG, accumulation=2), 0.5).bytes["gradients"] == 4 * weights


def test_recomputing_takes_less_memory_and_more_operations(make: ModelConfigs) -> None:
    plain, lean = (predict_step(make, replace(CONFIG, recompute=recompute), 0.5) for recompute in (False, True))
    assert lean.bytes["activations"] < 0.45 * plain.bytes["activations"]
    assert 1.1 * plain.operations < lean.operations < 1.5 * plain.operations
    plain, lean = (predict_saliency(make, MaskRecipe(recompute=recompute)) for recompute in (False, True))
    assert lean.bytes["activations"] < 0.7 * plain.bytes["activations"]


def test_activations_grow_with_rows_and_pixels(make: ModelConfigs) -> None:
    one, four = (predict_step(make, replace(CONFIG, batch_size=n), 0.5).bytes["activations"] for n in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)
    assert predict_step(make, replace(CONFIG, batch_size=1), 0.5, size=128).bytes["activations"] > 3 * one


@pytest.mark.parametrize("name", [name for name, one in METHODS.all().items() if issubclass(one.settings, Training)])
def test_every_method_takes_what_is_predicted_of_it(make: ModelConfigs, few_prompts: Concept, name: str) -> None:
    """The most bytes that live at once in a real step, beside the weights, are within 10 % of the prediction."""
    settings = {"steps": 1, "batch_size": 2, "fisher_rows": 1, "sampling_steps": 2, "anchors": 2}
    settings["vary_size"] = False  # the most that it takes is at the whole size
    known = settings_of(METHODS.find(name).settings)
    values = {"model": "emojinette", "concept": few_prompts, "method": name}
    values |= {"settings": {key: value for key, value in settings.items() if key in known}}
    recipe = make_recipe(values | {"data": {"forget": 4, "anchor": 4, "retain": 4, "steps": 1}})
    model = load("emojinette")
    data, scope = make_data_for(recipe, model), recipe.mask.scope
    mask = masks.random(model.unet, 0.5, seed=0, scope=scope)
    with LivingBytes(model.unet) as living:
        list(METHODS.find(name).run(model, data, mask, recipe.settings, seed=0))
    phases = METHODS.find(name).memory(recipe.settings)
    expected = predict_step(make, recipe.settings, 0.5, phases=phases, scope=scope).bytes
    held = sum(size for part, size in expected.items() if part not in ("weights", "mask", "workspace"))
    assert held == pytest.approx(living.peak, rel=0.1)


def test_a_copy_of_the_unet_is_in_the_plan(make: ModelConfigs) -> None:
    """At the same number of rows ESD takes SalUn's memory and a second UNet, and the plan says so."""
    plans = {}
    for name in ("salun", "salun-soft", "esd-full", "selective-amnesia"):
        method = METHODS.find(name)
        plans[name] = predict_step(make, method.settings(), 0.5, phases=method.memory(method.settings())).bytes
    weights = plans["salun"]["weights"]
    copies = {name: plan["copies"] for name, plan in plans.items()}
    assert copies == {"salun": 0, "salun-soft": weights, "esd-full": weights, "selective-amnesia": 2 * weights}
    assert predict_edit(make).peak < sum(plans["salun"].values())


def test_a_scope_needs_the_state_of_its_own_weights_alone(make: ModelConfigs) -> None:
    unet = UNet2DConditionModel.from_config(make.components["unet"])
    own = sum(p.numel() for name, p in unet.named_parameters() if ".attn2." in name)
    full, part = (predict_step(make, CONFIG, 0.5, scope=scope).bytes for scope in ("full", "cross-attention"))
    assert part["optimizer"] == round(own / 2 * 8)
    assert part["activations"] < full["activations"]
    words = predict_step(make, CONFIG, 0.5, scope="text-encoder").bytes
    assert (words["optimizer"], words["weights"] > full["weights"]) == (0, True)


@pytest.mark.parametrize(("family", "millions"), [("sd1", 859.5), ("sd2", 865.9), ("sdxl", 2567.5)])
def test_every_family_at_full_size(family: str, millions: float) -> None:
    """No weights exist: 10 GB of them are predicted in seconds."""
    record = FAMILIES.find(family)
    make = ModelConfigs(record, record.single_file.configs({}))
    expected = predict_step(make, SalUnSettings(batch_size=1, recompute=True), 0.5, size=256)
    assert expected.bytes["weights"] / 4e6 == pytest.approx(millions, abs=0.1)
    assert expected.peak == sum(expected.bytes.values())
    assert math.isfinite(expected.operations)


def test_bf16_weights_are_bf16_in_the_masks_plan_too(make: ModelConfigs) -> None:
    recipes = [recipe_for("emojinette", "church", method="salun", memory=memory) for memory in ("fast", "low")]
    wide, narrow = (plan_stages(recipe, find_card(CARD), ["mask"])[0].bytes for recipe in recipes)
    assert wide["weights"] == 2 * narrow["weights"]
    assert (wide["sums"] > 0, narrow["sums"]) == (True, 0)  # with the preset they are in main memory
    on_cpu = plan_stages(recipes[1], find_card(None), ["mask"])[0].bytes
    assert on_cpu["sums"] == wide["sums"]  # which is all that a CPU has


CARD = "RTX 3060"  # 12 GiB; 12.7 TFLOPS in fp32 and 25.5 in bf16


def test_the_whole_run_is_in_the_plan(make: ModelConfigs) -> None:
    """Images, batches and steps are those of the recipe, and operations so many times those of each."""
    data = {"forget": 10, "retain": 7, "anchor": 3, "steps": 4}
    recipe = recipe_for(
        "emojinette", "church", method="salun", data=data, mask={"batch_size": 4}, settings={"steps": 9}
    )
    found = expect(recipe, CARD)
    stages = {stage.name: stage for stage in found.stages}
    assert {name: stage.times for name, stage in stages.items()} == {
        "data": 20,
        "mask": 3,
        "training": 9,
        "evaluation": 1000,
    }
    row = predict_sampling(make).operations
    assert stages["data"].operations == 20 * 4 * row
    assert stages["mask"].operations == pytest.approx(10 / 4 * predict_saliency(make, recipe.mask).operations, rel=1e-9)
    assert stages["training"].operations == 9 * predict_step(make, recipe.settings, 0.5).operations
    assert stages["evaluation"].operations == 1000 * (25 * row + predict_vae(make, encode=False).operations)
    for name, stage in stages.items():
        assert found.seconds(stage) == pytest.approx(stage.operations / (0.4 * 12.7e12))
        assert found.to_dict()["stages"][name]["peak_gib"] == pytest.approx(stage.peak / 2**30, abs=0.01)


def test_bf16_weights_are_planned_at_the_speed_of_bf16() -> None:
    recipe = recipe_for("emojinette", "church", method="salun", memory="low")
    (training,) = plan_stages(recipe, find_card(CARD), ["training"])
    for card, peak in ((CARD, 25.5e12), ("Tesla T4", 8.1e12)):  # a T4 has no bf16
        found = Expected(find_card(card), (training,), "")
        assert found.seconds(training) == pytest.approx(training.operations / (0.4 * peak))
    assert "no bf16" in found.card.speed_from


def test_what_needs_no_images_has_no_time_for_them(few_prompts: Concept) -> None:
    found = expect(make_recipe({"model": "emojinette", "concept": few_prompts, "method": "uce"}), CARD)
    assert [(stage.name, stage.operations > 0) for stage in found.stages] == [("training", False), ("evaluation", True)]
    several = combine([few_prompts, replace(few_prompts, name="triangle")])
    asked = {"model": "emojinette", "concept": several, "method": "salun", "data": {"forget": 5, "retain": 8}}
    assert plan_stages(make_recipe(asked), find_card(CARD), ["data"])[0].times == 2 * 5 + 8


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 64}, "recompute=true"),
        ({"batch_size": 64, "recompute": True}, "batch_size=32"),
        ({"batch_size": 1, "recompute": True}, "state=bf16"),
    ],
)
def test_the_advice_does_what_it_says(settings: dict, told: str) -> None:
    def planned(**more: object) -> tuple[Recipe, Expected]:
        asked = {"method": "salun", "mask": {"kind": "none"}, "settings": {**settings, **more}}
        recipe = recipe_for("emojinette", "church", **asked)
        return recipe, Expected(find_card(CARD), tuple(plan_stages(recipe, find_card(CARD), ["training"])), "")

    name, value = told.split("=")
    recipe, found = planned()
    _, lean = planned(**{name: yaml.safe_load(value)})
    assert f"With {told} it needs {lean.stages[0].peak / 2**30:.1f} GiB" in of_memory(recipe, found)
    assert lean.stages[0].peak < found.stages[0].peak


def test_what_does_not_fit_is_said_and_sampled_one_by_one() -> None:
    recipe = recipe_for("emojinette", "church", method="salun", mask={"kind": "none"})
    card = replace(find_card(CARD), memory=650 << 20)
    training, data = (plan_stages(recipe, card, [name])[0] for name in ("training", "data"))
    assert training.peak > card.memory
    assert "GiB, more than the 1 GiB there are; " in of_memory(recipe, Expected(card, (training,), ""))
    assert data.peak > card.memory or not data.what.startswith("images, 16 at once")
    assert plan_stages(recipe, replace(card, memory=1 << 40), ["data"])[0].what.startswith("images, 16 at once")


def test_cards_are_found_by_the_names_that_drivers_give_them() -> None:
    card = find_card("NVIDIA GeForce RTX 4090")
    assert (card.name, card.memory) == ("RTX 4090", 24 << 30)
    assert card.speed("bf16") == pytest.approx(0.4 * 165.2e12)
    with pytest.raises(RequestError, match=r"^card RTX 1: unknown; allowed: .*RTX 4090.*$"):
        find_card("RTX 1")
    assert all(card.peaks.keys() <= {"fp32", "bf16"} and 1 < card.memory >> 30 < 200 for card in cards().values())
    here = find_card(None)
    assert here.speed("fp32") > 1e9
    assert here.memory > here.process > 0
