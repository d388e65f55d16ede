"""A run: data, mask, training and the new classifier in one folder. The same recipe on it resumes a killed run.

The folder holds ``recipe.yaml``, ``unlearn.json`` (versions, hashes, seeds, times, checks), ``forget.txt`` (the numbers
of the forgotten images), ``mask.safetensors``, ``log.jsonl``, ``checkpoints/`` and ``classifier/``.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase_concept.classification.data import SPLIT, ForgetRetainImages, Split, forget_retain, split_data
from erase_concept.classification.forget import forget_rows, read_rows
from erase_concept.classification.mask import given_mask, make_mask
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.recipe import NOTHING, UnlearnRecipe, make_unlearn_recipe, unlearn_recipe
from erase_concept.classification.training import ClassifierTraining
from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.frozen import check_frozen, keep_base
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier, head_of
from erase_concept.pipelines.classifiers.load import (
    InPython,
    Module,
    is_architecture,
    load_classifier,
    new_classifier,
    source_of,
    take_classifier,
)
from erase_concept.pipelines.processes import from_main, held, processes, same_for_all
from erase_concept.pipelines.progress import bar
from erase_concept.recipe import read_recipe
from erase_concept.run_folder import claimed, complete, read_run, versions, weights_files, write_json
from erase_concept.run_log import checkpoint_file, logged, logged_losses
from erase_concept.seed import stage_seed
from erase_concept.training.checkpoint import steps_done
from erase_concept.training.health import watched_losses
from erase_concept.training.loop import Record, TargetProgress
from erase_concept.training.shards import sharding

RUN_FILE = "unlearn.json"  # another name than that of runs of diffusion models: neither is taken for the other


@dataclass(frozen=True)
class UnlearnRun(os.PathLike[str]):
    """A complete run: its folder, which it can stand for as a path. Raises RequestError when the folder holds none."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        read_run(self.path, RUN_FILE)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def run_info(self) -> dict[str, Any]:
        """What ``unlearn.json`` says: versions, hashes, seeds, times, checks."""
        return read_run(self.path, RUN_FILE)

    @property
    def recipe(self) -> UnlearnRecipe:
        """The recipe that was followed."""
        return make_unlearn_recipe(read_recipe(self.path / "recipe.yaml"))

    @property
    def forgotten(self) -> Tensor:
        """The numbers of the forgotten images, int64 [n]; raises RequestError where their list is damaged."""
        return torch.tensor(list(read_rows(self.path / "forget.txt")), dtype=torch.int64)

    def classifier(self, split: Split, module: Module | None = None) -> Classifier:
        """Return the new classifier, for its data.

        One that was a module in Python needs such a module, or a function that returns one with new weights.
        """
        return load_classifier(str(self.path), split.images, module)


def unlearn(
    classifier: str | os.PathLike[str] | nn.Module | Classifier,
    *,
    data: str | Mapping[str, Any],
    forget: str,
    out: str | Path,
    method: str = "salun",
    preset: str = "default",
    **values: Any,
) -> UnlearnRun:
    """Forget some of a classifier's training images, with a progress bar, and return the run.

    ``classifier`` is the folder of a run or of a classifier, ``ARCHITECTURE=FILE``, a ``Classifier``, or a module that
    takes images in [0, 1] and returns logits of the data's classes. What is given in Python stays as it is. ``data``,
    ``forget`` and ``values`` are as in ``unlearn_recipe``. Raises as ``iter_unlearn`` does.
    """
    given = None if isinstance(classifier, str | os.PathLike) else classifier
    source = os.fspath(classifier) if isinstance(classifier, str | os.PathLike) else source_of(classifier)
    recipe = unlearn_recipe(source, data, forget, method=method, preset=preset, **values)
    return run_unlearn(recipe, Path(out), classifier=given)


def train_classifier(
    architecture: str | Module,
    *,
    data: str | Mapping[str, Any],
    out: str | Path,
    preset: str = "default",
    **values: Any,
) -> UnlearnRun:
    """Train a new classifier on a data set's training images, with a progress bar, and return the run.

    ``architecture`` is a name, or a function that returns a module with new weights, such as the module's class. It
    draws them from torch's own generator, to which the seed is given. A module is trained from the weights that it has,
    in a copy.
    """
    given = None if isinstance(architecture, str) else architecture
    source = architecture if isinstance(architecture, str) else source_of(architecture)
    if isinstance(given, nn.Module):
        given = partial(copy.deepcopy, given)
    recipe = unlearn_recipe(source, data, NOTHING, method="retrain", preset=preset, **values)
    return run_unlearn(recipe, Path(out), classifier=given)


def run_unlearn(recipe: UnlearnRecipe, out: Path, *, classifier: InPython | None = None) -> UnlearnRun:
    """Run a recipe to its end, with a progress bar, and return the run; see ``iter_unlearn``."""
    events = iter_unlearn(recipe, out, classifier=classifier)
    begun = [event for event in (next(events, None),) if event]  # a wrong request ends here, before there is a bar
    with bar() as shown:
        task = shown.add_task("start", total=None)
        for event in chain(begun, events):
            if isinstance(event, str):
                shown.update(task, description=event, completed=0, total=None)
            elif isinstance(event, Record):
                text = f"{recipe.method}  loss {event.loss:.4f}"
                shown.update(task, description=text, completed=event.step, total=event.steps)
    return UnlearnRun(out)


def iter_unlearn(
    recipe: UnlearnRecipe, out: str | Path, *, classifier: InPython | None = None
) -> Iterator[Record | TargetProgress | str]:
    """Run a recipe in a folder, yielding the name of each stage as it begins and a record after each step.

    When it is exhausted, ``out/classifier`` holds the new classifier and ``out/unlearn.json`` says how it was made. A
    run that is already complete yields nothing. ``classifier`` gives the recipe's where it is no name, and stays as it
    is.

    Raises RequestError when the folder holds another run or the recipe cannot be followed, EraseError when the work
    fails or a weight changed that should not have.
    """
    out = Path(out)
    if from_main(lambda: _claimed(recipe, out) and complete(out, RUN_FILE)):
        return
    model, data = prepare(recipe, classifier)
    # From here on the request is known to be sound: only now does the folder become the run's.
    with held(out):
        yield from _stages(recipe, model, data, out)


def prepare(recipe: UnlearnRecipe, classifier: InPython | None = None) -> tuple[Classifier, ForgetRetainImages]:
    """Return the classifier and the images of a recipe; raises RequestError when it cannot be followed."""
    if sharding() is not None:
        raise RequestError("distributed_type", "FSDP", "shards a diffusion model; allowed for a classifier: DDP")
    method, mask = UNLEARNERS.find(recipe.method), given_mask(recipe.mask)
    split = split_data(recipe.data)
    if recipe.forget == NOTHING and method.anew:
        rows = torch.empty(0, dtype=torch.int64)
        if recipe.mask.kind != "none":
            raise RequestError("mask.kind", recipe.mask.kind, "nothing is forgotten, so all weights are trained")
    else:
        rows = forget_rows(recipe.forget, split, recipe.seed)
    if classifier is not None:
        model = take_classifier(classifier, split.images, stage_seed(recipe.seed, "before"), recipe.classifier)
    elif method.anew and is_architecture(recipe.classifier):
        model = new_classifier(recipe.classifier, split.images, stage_seed(recipe.seed, "before"))
    else:
        model = load_classifier(recipe.classifier, split.images)
    learnt = {"name": split.images.name, **recipe.data.recorded()}
    _check_data(model, learnt)
    if method.new_weights and not model.renewable:
        allowed = f"needs new weights, which {model.architecture} cannot be given"
        raise RequestError("method", method.name, allowed)
    if method.linear_head:
        head_of(model)
    if mask is not None:
        mask.check(model.network)
    return replace(model, data=learnt), forget_retain(recipe.data, split, rows)


def _check_data(model: Classifier, data: Mapping[str, Any]) -> None:
    """Refuse other training images than those that the classifier remembers to have learnt from."""
    known = model.data or data
    if known["name"] != data["name"]:
        raise RequestError("data.source", data["name"], f"the classifier learnt from {known['name']}")
    for name in SPLIT:
        if known.get(name) != data[name]:
            allowed = f"the classifier learnt from {known['name']} with {name} {known.get(name)}"
            raise RequestError(f"data.{name}", data[name], allowed)


def _claimed(recipe: UnlearnRecipe, out: Path) -> bool:
    return claimed(out, lambda file: make_unlearn_recipe(read_recipe(file)) == recipe)


def _stages(
    recipe: UnlearnRecipe, model: Classifier, data: ForgetRetainImages, out: Path
) -> Iterator[Record | TargetProgress | str]:
    """Carry out the stages of a run in its folder."""
    if from_main(lambda: _claimed(recipe, out) and complete(out, RUN_FILE)):  # another process has done it since
        return
    base, before, state = out / "base-network.safetensors", model.sha256(), processes()
    images = data.sha256()
    same_for_all("classifier", recipe.classifier, before)
    same_for_all("data.source", recipe.data.source, images)

    def begin() -> None:
        recipe.save(out / "recipe.yaml")
        if not keep_base(model.network, base, images):
            what = f"it, or the images of {recipe.data.source}, have changed since the run in {out} began"
            raise RequestError("classifier", recipe.classifier, f"{what}; choose another folder")
        with atomic_write(out / "forget.txt") as partial:
            partial.write_text("".join(f"{row}\n" for row in data.forget.tolist()), encoding="utf-8")

    from_main(begin)
    checkpoint = checkpoint_file(out)
    resumed = from_main(lambda: steps_done(checkpoint))
    times = [time.perf_counter()]
    yield "mask"
    mask = _cached_mask(recipe, model, data, out / "mask.safetensors")
    times.append(time.perf_counter())
    yield "unlearn"
    run = UNLEARNERS.find(recipe.method).run
    seed = stage_seed(recipe.seed, "method")
    events = run(model, data, mask, recipe.settings, seed=seed, checkpoint=checkpoint)
    if isinstance(recipe.settings, ClassifierTraining):  # others change the weights once
        events = watched_losses(events, recipe.settings.max_loss_growth, from_main(lambda: logged_losses(out)))
    yield from logged(out, events) if state.is_main_process else events
    times.append(time.perf_counter())
    yield "save"

    def save_all() -> None:
        seconds = [round(after - before, 3) for before, after in pairwise(times)]
        run_info = _describe(recipe, data) | {
            "base": {"source": model.source, "architecture": model.architecture, "sha256": before},
            "unlearned": {"sha256": model.sha256()},
            "mask": mask and {"kind": recipe.mask.kind, "sha256": mask.sha256(), "density": mask.density},
            "checks": check_frozen(base, model.network, mask),
            "seconds": dict(zip(("mask", "unlearn"), seconds, strict=True)),
            "resumed_at_step": resumed,
            "versions": versions(),
            **({"processes": state.num_processes} if state.num_processes > 1 else {}),
        }
        model.save(out / "classifier")
        base.unlink()
        run_info["files"] = weights_files(out / "classifier")
        write_json(out / RUN_FILE, run_info)  # last: it says that the run is complete

    from_main(save_all)


def _describe(recipe: UnlearnRecipe, data: ForgetRetainImages) -> dict[str, Any]:
    """Return what ``unlearn.json`` says of the recipe."""
    return {
        "schema": 1,
        "method": recipe.method,
        "forget": recipe.forget,
        "images": {"forget": len(data.forget), "retain": len(data.retain)},
        "seed": recipe.seed,
        "recipe": recipe.fingerprint(),
        "settings": asdict(recipe.settings),
    }


def _cached_mask(recipe: UnlearnRecipe, model: Classifier, data: ForgetRetainImages, file: Path) -> Mask | None:
    """Return the recipe's mask from a file; if there is none yet, make it and keep it there."""
    if not from_main(file.exists):
        made = make_mask(recipe.mask, model, data, recipe.seed)
        if made is None:
            return None
        if processes().is_main_process:
            made.save(file)
    return from_main(lambda: Mask.load(file))
