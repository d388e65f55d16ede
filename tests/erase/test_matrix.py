"""Every method, for every kind of concept and every family, runs with what its presets say, and a real tokenizer.

The models are small ones with random weights. Only steps, epochs and counts of rows are fewer than a preset's.
"""

from __future__ import annotations

import gc
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erase_concept.cli.options import RecipeOptions
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
# Of each recipe that ships: what a person would type for it with --preset paper. Authors say "Van Gogh" alone.
_VAN_GOGH = {"name": "Van Gogh", "synonyms": ()}
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "concept-ablation-r2d2": ("concept-ablation", "character:R2D2", {"anchor": "robot"}),
    "concept-ablation-van-gogh": ("concept-ablation", "artist:Van Gogh", _VAN_GOGH),
    "esd-u-nudity": ("esd-u", "nudity", {}),
    "esd-x-van-gogh": ("esd-x", "artist:Van Gogh", _VAN_GOGH),
    "mace-melania-trump": ("mace", "person:Melania Trump", {}),
    "random-label-church": ("random-label", "church", {}),
    "rece-nudity": ("rece", "nudity", {}),
    "salun-church": ("salun", "church", {}),
    "salun-nudity": ("salun", "nudity", {}),
    "spm-pikachu": ("spm", "object:Pikachu", {}),
    "uce-van-gogh": ("uce", "artist:Van Gogh", _VAN_GOGH),
}
FOLDER = Path(__file__).parents[2] / "recipes"
FEW = {"sampling_steps": 2, "fisher_rows": 2, "trim_batches": 1}


def few_of(whole: Recipe) -> Recipe:
    """A recipe with fewer steps, epochs and rows."""
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
    whole = recipe_for("any/model", CONCEPTS[kind], method=method, preset_name=names[turn % len(names)])
    assert whole.concept.kind == kind
    run(small[family], few_of(whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_later_code_of_esd_samples_with_all_of_its_steps(small: dict[str, Small], family: str) -> None:
    """By PNDM, whose first steps are of another kind than its later ones."""
    whole = recipe_for("any/model", "nudity", method="esd-u", preset_name="latest-code")
    assert (whole.settings.scheduler, whole.settings.sampling_steps) == ("PNDMScheduler", 50)
    run(small[family], with_settings(whole, steps=3))


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


def test_every_recipe_that_ships_is_tested() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == {*RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_ships_is_the_papers_preset_and_runs(small: dict[str, Small], name: str) -> None:
    """Prompts that are retained count where the method takes them at all."""
    method, concept, changes = RECIPES[name]
    found = RecipeOptions(model="any/model", recipe=FOLDER / f"{name}.yaml").read()
    paper = recipe_for("any/model", concept, changes=changes, method=method, preset_name="paper")
    assert (found.method, found.settings, found.mask, found.data) == (method, paper.settings, paper.mask, paper.data)
    assert found.concept.kind == paper.concept.kind
    assert found.concept.forget_prompts == paper.concept.forget_prompts
    assert found.concept.anchor_prompts == paper.concept.anchor_prompts
    if "retain" in found.data_parts or method in ("uce", "rece", "mace"):
        assert found.concept.retain_prompts == paper.concept.retain_prompts
    run(small["sd1"], few_of(found))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_ships_says_how_to_run_it(name: str) -> None:
    """Its own file, with options that there are; the documentation names it."""
    head = [line for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    commands = [shlex.split(line.lstrip("# ")) for line in head if line.startswith("#   erase-concept ")]
    assert [command[1] for command in commands] == ["erase", "eval"]
    assert f"recipes/{name}.yaml" in commands[0]
    assert commands[0][-1] == commands[1][-1] == commands[1][2] == f"runs/{name}"
    assert any(line.startswith("# Published: ") for line in head)
    assert f"recipes/{name}.yaml" in (FOLDER.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
