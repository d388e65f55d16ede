"""Recipes: the validated description of a run, from the command line or a YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write, is_there, read_yaml
from erase_concept.method import Method
from erase_concept.methods import METHODS
from erase_concept.pipelines.builtin import catalogs_of
from erase_concept.presets import Preset, preset
from erase_concept.prompts import find
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.find import ConceptSource
from erase_concept.run_folder import base_source, read_run
from erase_concept.settings import changed_settings, check_settings, described, merge, read_assignments, settings
from erase_concept.training.loop import Training
from erase_concept.training.shards import sharding

SALUN = "SalUn, arXiv 2310.12508"
# What a run's memory presets set.
MEMORY: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"settings": {"recompute": True, "state": "bf16"}, "mask": {"recompute": True, "offload": True}},
    "low": {
        "settings": {"recompute": True, "state": "8bit", "weights": "bf16"},
        "mask": {"recompute": True, "offload": True},
    },
}


@settings
class MaskRecipe:
    """Which weights may change."""

    kind: Annotated[str, described("salient, none, random, least-salient, or the path of a mask file.")] = "salient"
    scope: Annotated[str, described("The part of the UNet that is ranked, and may change at all.")] = "full"
    sparsity: Annotated[
        float, described("Share of the scope's weights that stay frozen.", ge=0, lt=1, source=SALUN)
    ] = 0.5
    combine: Annotated[
        Literal["joint", "union"],
        described("Of several concepts: one mask from the sum of gradients, or the union of a mask for each."),
    ] = "joint"
    accumulate: Annotated[
        Literal["signed", "absolute"],
        described("Sum the gradients of batches with their signs, or their sizes.", source=SALUN),
    ] = "signed"
    guidance: Annotated[
        float, described("Guidance w of the prediction in the saliency loss; SalUn's code uses 7.5.", ge=0)
    ] = 0.0
    passes: Annotated[int, described("Times that each forget row is seen, with new noise.", ge=1)] = 1
    batch_size: Annotated[int, described("Forget rows in a batch.", ge=1, source=SALUN)] = 8
    recompute: Annotated[
        bool, described("Compute activations anew in the backward pass: less memory, a third more time, the same bits.")
    ] = False
    offload: Annotated[bool, described("Keep the sums of gradients in main memory.")] = False


@settings
class DataRecipe:
    """What the erasing learns from: rows that the model samples itself, or folders of images."""

    forget: Annotated[int, described("Rows that show the concept.", ge=1)] = 64
    retain: Annotated[int, described("Rows that show what is retained.", ge=1)] = 128
    anchor: Annotated[int, described("Rows that show the anchor, for the forget loss.", ge=0, source=SALUN)] = 0
    steps: Annotated[int, described("Sampling steps of a row.", ge=1)] = 25
    guidance: Annotated[float, described("Guidance scale of the sampling.", ge=0)] = 7.5
    scheduler: Annotated[str | None, described("A scheduler of diffusers; by default DPM-Solver++ 2M.")] = None
    eta: Annotated[float, described("Noise that DDIM adds in a step, from none to its full variance.", ge=0, le=1)] = (
        0.0
    )
    flip: Annotated[bool, described("Mirror each row of a batch, or leave it, at random.")] = False
    size: Annotated[int | None, described("Pixels a side, by default the model's; fewer take less memory.", ge=1)] = (
        None
    )
    forget_images: Annotated[Path | None, described("Folder of images of the concept.")] = None
    retain_images: Annotated[Path | None, described("Folder of images of what is retained.")] = None


@settings
class Recipe:
    """A whole run. ``settings`` are the method's own, of its record's class."""

    model: str
    concept: Concept
    method: str
    settings: Any
    mask: MaskRecipe
    data: DataRecipe
    seed: Annotated[int, described("Seed of the whole run.", ge=0)] = 0
    ema: Annotated[
        bool | None,
        described(
            "Of a single file with both, take the UNet's averaged weights (true) or the live ones (false); by default "
            "the averaged, where both are nearly alike."
        ),
    ] = None
    notes: Annotated[tuple[str, ...], described("Where the settings come from, in sentences.")] = ()

    @property
    def data_parts(self) -> tuple[str, ...]:
        """The parts of the data that are made: what neither method nor mask needs is left out."""
        ranked = ("forget",) if self.mask.kind in ("salient", "least-salient") else ()
        needed = {*METHODS.find(self.method).latents, *ranked}
        return tuple(part for part in ("forget", "anchor", "retain") if part in needed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in YAML: settings that differ from their defaults.

        Those whose default is the method's are always there: kind and scope of the mask, and anchor rows.
        """
        mask = {"kind": self.mask.kind, "scope": self.mask.scope} | changed_settings(self.mask)
        anchor = {"anchor": self.data.anchor} if METHODS.find(self.method).needs_anchor_rows else {}
        return {
            "model": self.model,
            "concept": self.concept.to_dict(),
            "method": self.method,
            "settings": changed_settings(self.settings),
            "mask": mask,
            "data": changed_settings(self.data) | anchor,
            "seed": self.seed,
            **({} if self.ema is None else {"ema": self.ema}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def fingerprint(self, *more: object) -> str:
        """Return a SHA-256 over the recipe, without its notes, and whatever else is given."""
        told = {key: value for key, value in self.to_dict().items() if key != "notes"}
        told |= {"ema": self.ema is not False}  # where the default loads anything, it is what "true" loads
        return hashlib.sha256(json.dumps([told, *map(str, more)], sort_keys=True).encode()).hexdigest()

    def save(self, file: Path) -> None:
        """Write the recipe as YAML."""
        with atomic_write(file) as partial:
            partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of nested plain values, as they stand in YAML.

    Method, mask and scope that are not named are SalUn and the method's own. Raises RequestError that names the first
    bad value.
    """
    known = [field.name for field in fields(Recipe)]
    for name in values:
        if name not in known:
            raise RequestError(name, values[name], f"a recipe has no such entry; it has: {', '.join(known)}")
    for name in ("model", "concept"):
        if not values.get(name):
            raise RequestError(name, "(not given)", "needed in a recipe")
    model, concept = str(values["model"]), values["concept"]
    method = METHODS.find(str(values.get("method", "salun")))
    if {"steps", "epochs"} <= {name for name, value in _mapping(values, "settings").items() if value is not None}:
        raise RequestError("settings.epochs", values["settings"]["epochs"], "stands in the place of steps: give one")
    parts: dict[str, Any] = {
        "settings": check_settings(method.settings, _mapping(values, "settings"), "settings."),
        "mask": check_settings(
            MaskRecipe, {"kind": method.mask, "scope": method.scope} | _mapping(values, "mask"), "mask."
        ),
        "data": check_settings(DataRecipe, _anchor_rows(method) | _mapping(values, "data"), "data."),
        "concept": concept if isinstance(concept, Concept) else find_concept(concept, model),
    }
    return check_settings(Recipe, {**values, "model": model, "method": method.name, **parts})


def _anchor_rows(method: Method) -> dict[str, int]:
    """Return how many anchor rows a method has by default, where it learns from them instead of forget rows."""
    return {"anchor": DataRecipe().forget} if method.needs_anchor_rows else {}


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name, {})
    if not isinstance(part, dict):
        raise RequestError(name, part, "must hold a mapping of settings")
    return part


def with_settings(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with some of the method's settings changed; raises RequestError for a bad value."""
    changed = check_settings(type(recipe.settings), asdict(recipe.settings) | changes, "settings.")
    return replace(recipe, settings=changed)


def read_settings(texts: Iterable[str], setting: str = "set") -> dict[str, dict[str, Any]]:
    """Read settings given as KEY=VALUE, by their part of a recipe: "mask.KEY", "data.KEY", or the method's own.

    Raises RequestError for another form, which names ``setting``.
    """
    found: dict[str, dict[str, Any]] = {"settings": {}, "mask": {}, "data": {}}
    for key, value in read_assignments(texts, setting).items():
        part, dot, name = key.rpartition(".")
        if dot and part not in ("mask", "data"):
            raise RequestError(setting, key, "KEY is a setting of the method, mask.KEY or data.KEY")
        found[part or "settings"][name] = value
    return found


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the values of a recipe file; raises RequestError when it is no YAML mapping."""
    try:
        values = read_yaml(file)
    except ValueError as problem:
        raise RequestError("recipe", file, f"not readable: {problem}") from None
    if not isinstance(values, dict):
        raise RequestError("recipe", file, "must hold a mapping, such as a run's recipe.yaml")
    return values


def find_concept(
    what: ConceptSource, model: str, changes: Callable[[Concept], Mapping[str, Any]] = lambda _: {}
) -> Concept:
    """Return the concept that is meant, looked up in the catalogues of the model or of the base model of a run.

    ``changes`` returns other values for some fields of a concept that is named and not described.
    """
    return find.find_concept(what, catalogs_of(first_base(model)), changes)


def in_low_precision(recipe: Recipe) -> bool:
    """Tell whether the UNet's weights are bf16 while the recipe's method changes them."""
    return getattr(recipe.settings, "weights", "fp32") == "bf16"


def check_weights(recipe: Recipe) -> None:
    """Raise RequestError for bf16 weights where they would lose what the method learns, and for a state SGD lacks."""
    if in_low_precision(recipe) and not _bf16_goes_with(recipe.method, recipe.mask.scope):
        able = ", ".join(name for name, one in METHODS.all().items() if one.bf16_weights)
        problem = f"goes with the UNet's own weights and these methods: {able}; allowed: fp32"
        raise RequestError("settings.weights", "bf16", problem)
    state = getattr(recipe.settings, "state", "fp32")
    if getattr(recipe.settings, "optimizer", "") == "sgd" and state != "fp32":
        raise RequestError("settings.state", state, "sgd keeps its momentum in fp32; allowed: fp32")


def check_shards(recipe: Recipe) -> None:
    """Raise RequestError where Accelerate shards the weights and the method, or what it trains, does not go with that.

    An engine that goes with no masked training is refused too.
    """
    method = METHODS.find(recipe.method)
    if isinstance(recipe.settings, Training) and sharding() is not None:
        if not method.sharded:
            able = ", ".join(name for name, one in METHODS.all().items() if one.sharded)
            raise RequestError(
                "method", recipe.method, f"cannot train on FSDP's shards; use DDP, or one of these: {able}"
            )
        if recipe.mask.scope == "text-encoder":
            raise RequestError("mask.scope", "text-encoder", "is not for FSDP, which shards the UNet; use DDP")
        if recipe.settings.state == "8bit":
            raise RequestError(
                "settings.state", "8bit", "is not for FSDP, whose shards cut its blocks; allowed: fp32, bf16"
            )


def _bf16_goes_with(method: str, scope: str | None) -> bool:
    return METHODS.find(method).bf16_weights and scope != "text-encoder"


def earlier_runs(model: str) -> list[dict[str, Any]]:
    """Return what was erased before from a model that is a run folder, the first run first; of any other model, none.

    Each is the concept's description and the model that it was erased from.
    """
    folder = Path(model)
    if not is_there(folder / "run.json"):
        return []
    run_info, recipe = read_run(folder), read_recipe(folder / "recipe.yaml")
    if not recipe.get("concept"):
        raise RequestError("model", model, "is no run folder: its recipe.yaml has no concept")
    return [*run_info.get("earlier", []), {"concept": recipe["concept"], "base": base_source(run_info)}]


def first_base(model: str) -> str:
    """Return the model that all erasing of a run folder began with, whose presets are the run's too."""
    runs = earlier_runs(model)
    return runs[0]["base"] if runs else model


def concept_for(
    model: str,
    what: ConceptSource,
    preset_name: str = "default",
    method: str | None = None,
    *,
    images: bool = False,
) -> tuple[Concept, Preset]:
    """Return the concept that a run would erase, and the preset that it would start from.

    A preset may change what a concept that is named is erased with; a concept that is described stays as it is.
    ``images`` says that the run has images of the concept, which the concept may name itself, too.
    """
    base = first_base(model)
    found = find_concept(what, model)
    images = images or any(part.images for part in found.parts)
    start = preset(preset_name, base, found.common_kind, method, images=images)
    if start.concept or found.combined:
        found = find_concept(what, model, lambda one: preset(preset_name, base, one.kind, start.method).concept)
    return found, start


def recipe_for(
    model: str,
    what: ConceptSource,
    *,
    changes: Mapping[str, Any] | None = None,
    preset_name: str = "default",
    memory: str = "fast",
    **values: Any,
) -> Recipe:
    """Return the recipe for erasing concepts from a model: the preset, with the given values laid over it.

    ``what`` is what ``find_concept`` takes, or a list of it, which is erased together. ``changes`` are other values of
    one concept's fields, such as ``{"anchor": "house"}``.
    ``memory`` is fast, balanced or low: how much of it the run may take, for more time.
    ``values`` are a recipe's fields; nested mappings such as ``settings={"lr": 1e-5}`` change what they name alone.
    With ``method`` among them the preset is that method's, without, the preset names the method.
    """
    model = str(model)
    if memory not in MEMORY:
        raise RequestError("memory", memory, f"allowed: {', '.join(MEMORY)}")
    images = bool(values.get("data", {}).get("forget_images"))
    found, start = concept_for(model, what, preset_name, values.get("method"), images=images)
    if changes and found.combined:
        name, value = next(iter(changes.items()))
        raise RequestError(name, value, "goes with one concept, not with several")
    found = find.change(found, changes or {})
    layers = ({"method": start.method, "notes": start.notes}, start.parts, MEMORY[memory], values)
    merged: dict[str, Any] = reduce(merge, layers) | {"model": model, "concept": found}
    asked = values.get("settings", {})
    if "weights" not in asked and not _bf16_goes_with(merged["method"], merged.get("mask", {}).get("scope")):
        merged.get("settings", {}).pop("weights", None)
    # What a preset says for all methods, a method takes where it has such a setting.
    known = {field.name for field in fields(METHODS.find(merged["method"]).settings)} | {*values.get("settings", {})}
    merged["settings"] = {name: value for name, value in merged.get("settings", {}).items() if name in known}
    return make_recipe(merged)
