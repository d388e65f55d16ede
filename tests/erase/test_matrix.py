"""Every method, for every kind of concept and every family, runs with what its presets say, and a real tokenizer.

The models are small ones with random weights. Only steps, epochs and counts of rows are fewer than a preset's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.make_data import data_key, make_data_for
from erase_concept.masks import SCOPES, all_ones, expand_to, in_scope
from erase_concept.masks.make import make_mask, needs_mask
from erase_concept.methods import METHODS
from erase_concept.pipelines.formats.tokenizer import clip_tokenizer
from erase_concept.pipelines.model import Diffusion
from erase_concept.presets import authors_settings
from erase_concept.recipe import Recipe, recipe_for, with_settings
from erase_concept.run import check
from erase_concept.training.loop import Record

CONCEPTS = {
    "object": "church",
    "style": "style:Vincent van Gogh",
    "person": "person:Ada Lovelace",
    "character": "character:Snoopy",
    "brand": "brand:Nike",
    "nudity": "nudity",
    "unsafe": "violence",
}
FAMILIES = ("sd1", "sd2", "sdxl")
FEW = {"sampling_steps": 2, "fisher_rows": 2, "trim_batches": 1}


def recipe(method: str, kind: str, preset: str) -> Recipe:
    """A preset's recipe with fewer steps, epochs and rows."""
    whole = recipe_for("any/model", CONCEPTS[kind], method=method, preset_name=preset)
    assert whole.concept.kind == kind
    own = {one.name for one in fields(whole.settings)}
    few: dict[str, Any] = {name: count for name, count in FEW.items() if name in own}
    if getattr(whole.settings, "epochs", None) is not None:
        few["epochs"] = 1
    elif "steps" in own:
        few["steps"] = 2 * getattr(whole.settings, "passes", 1)
    data = replace(whole.data, forget=2, retain=2, anchor=min(whole.data.anchor, 2), steps=2)
    return replace(with_settings(whole, **few), data=data)


def presets(method: str) -> list[str]:
    """The presets that a method has."""
    authors = authors_settings().get(method)
    if authors is None:
        return ["default"]
    return ["default", "paper", *(["latest-code"] if authors.latest_code else [])]


@dataclass
class Small:
    """A small model whose UNet can be put back, and the data that it has made so far."""

    model: Diffusion
    data: dict[str, ForgetRetain] = field(default_factory=dict)
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {name: value.clone() for name, value in self.model.unet.state_dict().items()}

    def data_for(self, asked: Recipe) -> ForgetRetain:
        """Make a recipe's data, once for all methods that take the same."""
        key = data_key(asked, "")
        if key not in self.data:
            self.data[key] = make_data_for(asked, self.model)
        return self.data[key]


@pytest.fixture(scope="module")
def small(new_model: Callable[..., Diffusion]) -> Iterator[dict[str, Small]]:
    """A small model of each family, with the tokenizers that the family has."""
    pytest.importorskip("open_clip.tokenizer")
    clip, open_clip = clip_tokenizer(), clip_tokenizer(pad_token="!")
    made = {"sd1": new_model(clip, "sd1"), "sd2": new_model(open_clip, "sd2"), "sdxl": new_model(clip, "sdxl")}
    made["sdxl"] = made["sdxl"].with_components(tokenizer_2=open_clip)
    gc.freeze()  # Accelerate collects garbage after each training: it need not look at all the libraries each time
    yield {family: Small(model) for family, model in made.items()}
    gc.unfreeze()


def run(small: Small, asked: Recipe) -> None:
    """Follow a recipe, and check what must be true of every one."""
    unet = small.model.unet
    check(asked)
    data = small.data_for(asked)
    mask = make_mask(asked, small.model, data, "") if needs_mask(asked) else None
    method = METHODS.find(asked.method)
    try:
        events = list(method.start(small.model, data, mask, asked.settings, seed=asked.seed))
        changed = 0
        for name, after in unet.state_dict().items():
            differs = after.view(torch.int32) != small.before[name].view(torch.int32)
            changed += int(differs.sum())
            assert torch.isfinite(after).all(), name
            if mask is not None:
                assert not (differs & ~mask.dense(name)).any(), name
    finally:
        unet.load_state_dict(small.before)
    records = [event for event in events if isinstance(event, Record)]
    assert changed
    assert [record.step for record in records] == list(range(1, records[-1].steps + 1))
    assert all(math.isfinite(value) for one in records for value in (one.loss, *one.terms.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONCEPTS)
@pytest.mark.parametrize("method", METHODS.all())
def test_every_method_erases_every_kind_from_every_family(
    small: dict[str, Small], method: str, kind: str, family: str
) -> None:
    """The presets take turns, so that each runs with every kind and with every family."""
    names = presets(method)
    turn = list(CONCEPTS).index(kind) + FAMILIES.index(family)
    run(small[family], recipe(method, kind, names[turn % len(names)]))


@pytest.mark.parametrize("method", ["uce", "rece", "mace"])
def test_a_closed_form_without_keys_and_values_is_refused_before_sampling(
    small: dict[str, Small], method: str, tmp_path: Path
) -> None:
    model = small["sd1"].model
    for scope in SCOPES:
        asked = recipe_for("any/model", "church", method=method, mask={"scope": scope})
        shapes = in_scope(model.unet, scope, model.family.layers)
        if any(model.family.layers.is_key_or_value(name) for name in shapes):
            check(asked)
            continue
        with pytest.raises(RequestError, match=rf"mask\.scope {scope}: leaves no weight .* keys and values free"):
            check(asked)
        expand_to(all_ones(shapes), model.unet).save(tmp_path / "mask.safetensors")
        with pytest.raises(RequestError, match=r"mask\.kind .*mask\.safetensors: leaves no weight"):
            check(recipe_for("any/model", "church", method=method, mask={"kind": str(tmp_path / "mask.safetensors")}))
    all_ones(in_scope(model.unet, "full")).save(tmp_path / "all.safetensors")
    check(recipe_for("any/model", "church", method=method, mask={"kind": str(tmp_path / "all.safetensors")}))


@pytest.mark.parametrize("kind", CONCEPTS)
@pytest.mark.parametrize("method", METHODS.all())
def test_every_preset_of_every_method_is_accepted(method: str, kind: str) -> None:
    """Whole, as people run it."""
    for preset in presets(method):
        check(recipe_for("any/model", CONCEPTS[kind], method=method, preset_name=preset))
