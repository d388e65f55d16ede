"""Keys of trials: the hash over all that a result depends on, so that no result of other weights or code comes back."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from erase_concept.eval.compare.trials import EXAMPLES, Trial, TrialContext, digest, is_guard, recipe_of
from erase_concept.files import file_sha256

_FLOORS = ("erase_concept", "erase_concept.pipelines", "erase_concept.prompts", "erase_concept.eval")
_NOT_MEASURING = {"cli", "report", "compare"}  # folders of code that no score depends on ...
_MEASURING = "trials.py"  # ... but for this file in them


def trial_key(context: TrialContext, trial: Trial) -> str:
    """Return the SHA-256 over all that a trial's result depends on, but for the installed versions of other packages.

    These are the recipe, the base model's weights, the code, the benchmark, and a mask that is read from a file.
    """
    from erase_concept.masks.choose import MASK_KINDS
    from erase_concept.methods import METHODS

    recipe = recipe_of(context.model, trial)
    guard = trial.method if is_guard(trial.method) else ""
    mask = "" if recipe.mask.kind in MASK_KINDS else file_sha256(Path(recipe.mask.kind))
    # A method may be another package's, whose files the code's version does not hold.
    method = "" if guard else file_sha256(Path(inspect.getfile(inspect.unwrap(METHODS.find(recipe.method).run))))
    return recipe.fingerprint(EXAMPLES, guard, mask, method, context.weights, context.code, context.benchmark_text)


@cache
def code_version() -> str:
    """Return the package's version and the first digits of a hash over the source files that a trial runs.

    A number in the source that is raised whenever results change would be forgotten once, and then old results come
    back. The price of a hash is that a changed comment measures again.
    """
    from erase_concept.version import __version__

    folders = {name: Path(importlib.import_module(name).__path__[0]) for name in _FLOORS}
    return f"{__version__}+{source_hash(folders)[:12]}"


def source_hash(folders: Mapping[str, Path]) -> str:
    """Return the SHA-256 over the source and data files of packages, by their place in each package's folder."""
    found = {}
    for package, folder in folders.items():
        walked = os.walk(folder, followlinks=True)
        for file in (Path(inside, name) for inside, _, names in walked for name in names):
            place = file.relative_to(folder)
            measuring = not _NOT_MEASURING & {*place.parts} or place.name == _MEASURING
            if file.suffix in (".py", ".yaml", ".csv") and measuring:
                found[f"{package.replace('.', '/')}/{place.as_posix()}"] = file
    total = hashlib.sha256()
    for name, file in sorted(found.items()):
        total.update(f"{name} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def base_weights(model: str, ema: bool | None = None) -> str:
    """Return a hash over the base model: its weights, configurations and noise schedule, and how it reads a prompt."""
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.model import weights_hash

    loaded = load(model, ema=ema)
    return digest([weights_hash(loaded.unet), loaded.besides_unet(["a prompt!"])])  # OpenCLIP pads with "!"
