"""What a run is expected to take, against what its parts are and against a real step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diffusers import UNet2DConditionModel

from erase_concept import masks
from erase_concept.counting import LivingBytes
from erase_concept.dry_run import expect, predict_saliency, predict_step
from erase_concept.make_data import make_data_for
from erase_concept.methods import METHODS
from erase_concept.methods.salun import SalUnSettings
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.load import ModelConfigs, configs, load
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import MaskRecipe, make_recipe, recipe_for
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


def test_a_copy_of_the_unet_is_in_the_plan(few_prompts: Concept) -> None:
    """At the same number of rows ESD takes SalUn's memory and a second UNet, and the plan says so."""
    plans = {}
    for name in ("salun", "salun-soft", "esd-full", "selective-amnesia", "uce"):
        plans[name] = expect(make_recipe({"model": "emojinette", "concept": few_prompts, "method": name}))
    weights = plans["salun"]["step"]["of_which_gib"]["weights"]
    copies = {name: plan["step"]["of_which_gib"]["copies"] for name, plan in plans.items() if "step" in plan}
    held = {"salun": 0, "salun-soft": weights, "esd-full": weights, "selective-amnesia": 2 * weights}
    assert copies == pytest.approx(held, abs=0.011)
    assert plans["uce"]["edit"]["peak_gib"] < plans["salun"]["step"]["peak_gib"]


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


def test_bf16_weights_are_bf16_in_the_masks_plan_too() -> None:
    plans = [
        expect(recipe_for("emojinette", "church", method="salun", memory=memory)) for memory in ("balanced", "low")
    ]
    wide, narrow = (plan["mask, each batch"]["of_which_gib"] for plan in plans)
    assert (wide["weights"], narrow["weights"]) == (0.02, 0.01)
    assert narrow["sums"] in (wide["sums"], 0)  # in fp32 either way, or not on the device
