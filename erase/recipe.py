"""Recipes: the validated description of a run, from the command line or a YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.builtin import catalogs_of
from erase_concept.presets import preset
from erase_concept.prompts import find
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.find import ConceptSource
from erase_concept.settings import merge

if TYPE_CHECKING:
    from erase_concept.method import Method

# What a run's memory presets set.
MEMORY: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"settings": {"recompute": True, "state": "bf16"}, "mask": {"recompute": True}},
    "low": {"settings": {"recompute": True, "state": "8bit"}, "mask": {"recompute": True, "offload": True}},
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MaskRecipe(_Part):
    """Which weights may change: ``kind`` is salient, none, random, least-salient, or the path of a mask file."""

    kind: str = "salient"
    scope: str = "full"  # the part of the UNet that is ranked, and may change at all
    sparsity: float = Field(0.5, ge=0, lt=1)  # share of the scope's weights that stay frozen
    combine: Literal["joint", "union"] = "joint"  # of several concepts: one sum of gradients, or a mask for each
    accumulate: Literal["signed", "absolute"] = "signed"
    guidance: float = Field(0.0, ge=0)  # w of the guided prediction in the saliency loss; the reference uses 7.5
    passes: int = Field(1, ge=1)  # times each forget row is seen, with new noise
    batch_size: int = Field(8, ge=1)
    recompute: bool = False  # activations in the backward pass: less memory, a third more time, the same bits
    offload: bool = False  # keep the sums of gradients in main memory


class DataRecipe(_Part):
    """What the erasing learns from: rows sampled from the model itself, or folders of images."""

    forget: int = Field(64, ge=1)
    retain: int = Field(128, ge=1)
    anchor: int = Field(0, ge=0)  # rows that show the anchor, for the forget term; the reference has none
    steps: int = Field(25, ge=1)
    guidance: float = Field(7.5, ge=0)
    size: int | None = Field(None, ge=1)  # pixels a side, by default the model's; smaller takes less memory
    forget_images: Path | None = None
    retain_images: Path | None = None


class Recipe(_Part):
    """A whole run. ``settings`` are the method's own, see ``erase-concept list methods``."""

    model: str
    ema: bool = True  # of a single file with both, take the UNet's averaged weights and not the live ones
    concept: Concept
    method: str = "salun"
    settings: dict[str, Any] = {}
    mask: MaskRecipe = MaskRecipe()
    data: DataRecipe = DataRecipe()
    seed: int = Field(0, ge=0)

    @field_validator("concept", mode="before")
    @classmethod
    def _find_concept(cls, value: Any, about: ValidationInfo) -> Any:
        return value if isinstance(value, Concept) else find_concept(value, about.data.get("model", ""))

    def erasure(self) -> Method:
        """Return the recipe's method; raises RequestError when there is no such one."""
        from erase_concept.methods import METHODS

        return METHODS.find(self.method)

    @property
    def latents(self) -> dict[str, int]:
        """How many rows of each part of the data are made: what neither method nor mask needs is left out."""
        needed = {*self.erasure().latents, *(("forget",) if self.mask.kind in ("salient", "least-salient") else ())}
        return {part: getattr(self.data, part) if part in needed else 0 for part in ("forget", "anchor", "retain")}

    def config(self) -> Any:
        """Return the method's config with the settings in it; raises RequestError for a setting it does not have."""
        config = self.erasure().settings
        fields = config.__dataclass_fields__
        for name, value in self.settings.items():
            if name not in fields:
                raise RequestError("--set", f"{name}={value}", f"{self.method} has: {', '.join(fields)}")
        try:
            return TypeAdapter(config).validate_python(self.settings)
        except ValidationError as problem:
            first = problem.errors()[0]
            where = "".join(f"{part}=" for part in first["loc"])
            raise RequestError("--set", f"{where}{first['input'] if where else ''}", first["msg"]) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in YAML."""
        return self.model_dump(mode="json", exclude={"concept"}) | {"concept": self.concept.to_dict()}

    def fingerprint(self, *more: object) -> str:
        """Return a SHA-256 over the recipe and whatever else is given."""
        return hashlib.sha256(json.dumps([self.to_dict(), *map(str, more)], sort_keys=True).encode()).hexdigest()

    def save(self, file: Path) -> None:
        """Write the recipe as YAML."""
        with atomic_write(file) as partial:
            partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def make_recipe(values: dict[str, Any], *, argument: str = "recipe") -> Recipe:
    """Build a recipe from nested values; mask and scope are the method's own unless they are named.

    Raises RequestError that names the first bad value.
    """
    try:
        recipe = Recipe.model_validate(values)
        method = recipe.erasure()
        own = {"kind": method.mask, "scope": method.scope} | recipe.mask.model_dump(exclude_unset=True)
        return recipe.model_copy(update={"mask": MaskRecipe(**own)})
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or argument
        raise RequestError(where, first.get("input", ""), first["msg"]) from None


def read_settings(texts: Iterable[str], argument: str) -> dict[str, dict[str, Any]]:
    """Read settings given as KEY=VALUE: the method's, and the recipe's mask and data where KEY begins with "mask." so.

    Values are read as in YAML, and numbers such as 1e-5, which YAML takes for text. Raises RequestError for another
    form, named by the argument.
    """
    found: dict[str, dict[str, Any]] = {"settings": {}, "mask": {}, "data": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RequestError(argument, text, "must be KEY=VALUE")
        part, dot, name = key.strip().rpartition(".")
        if dot and part not in ("mask", "data"):
            raise RequestError(argument, text, "KEY is a setting of the method, mask.KEY or data.KEY")
        found[part or "settings"][name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except (yaml.YAMLError, ValueError):
        return text


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the values of a recipe file; raises RequestError when it is no YAML mapping."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise RequestError("--recipe", file, f"not readable: {problem}") from None
    if not isinstance(values, dict):
        raise RequestError("--recipe", file, "must hold a mapping, such as a run's recipe.yaml")
    return values


def find_concept(what: ConceptSource, model: str) -> Concept:
    """Return the concept that is meant, looked up in the catalogues of the model or of the base model of a run."""
    return find.find_concept(what, catalogs_of(first_base(model)))


def earlier_runs(model: str) -> list[dict[str, Any]]:
    """Return what was erased before from a model that is a run folder, the first run first; of any other model, none.

    Each is the concept's description and the model that it was erased from.
    """
    folder = Path(model)
    if not (folder / "run.json").is_file():
        return []
    account = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    concept = read_recipe(folder / "recipe.yaml")["concept"]
    return [*account.get("earlier", []), {"concept": concept, "base": account["base"]["source"]}]


def first_base(model: str) -> str:
    """Return the model that all erasing of a run folder began with, whose presets are the run's too."""
    runs = earlier_runs(model)
    return runs[0]["base"] if runs else model


def recipe_for(
    model: str,
    what: ConceptSource,
    *,
    preset_name: str = "default",
    memory: str = "fast",
    **values: Any,
) -> Recipe:
    """Return the recipe for erasing concepts from a model: the preset, with the given values laid over it.

    ``memory`` is fast, balanced or low: how much of it the run may take, for more time.
    ``what`` is a concept's key, the path of a file or folder that describes one, words, or a description as in a YAML
    file; or a list of these, which are erased together.
    ``values`` are a recipe's fields; nested mappings such as ``settings={"lr": 1e-5}`` change what they name alone.
    With ``method`` among them the preset is that method's, as it was published; without, the preset names the method.
    """
    found = find_concept(what, model)
    if memory not in MEMORY:
        raise RequestError("--memory", memory, f"allowed: {', '.join(MEMORY)}")
    kinds = {part.kind for part in found.parts}
    kind = kinds.pop() if len(kinds) == 1 else found.kind  # of several kinds, the preset for any
    start = merge(preset(preset_name, first_base(model), kind, values.get("method")), MEMORY[memory])
    recipe = make_recipe(merge(start, {"model": model, "concept": found, **values}))
    # What a preset says for all methods, a method takes where it has such a setting.
    given = values.get("settings", {})
    known = recipe.erasure().settings.__dataclass_fields__
    settings = {key: value for key, value in recipe.settings.items() if key in known or key in given}
    return recipe.model_copy(update={"settings": settings})
