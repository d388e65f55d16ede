"""A run: data, mask, training and export in one folder. The same recipe on the same folder resumes a killed run.

The folder holds ``recipe.yaml``, ``run.json`` (versions, hashes, seeds, times, checks), ``data.safetensors``,
``mask.safetensors``, ``log.jsonl``, ``checkpoints/`` and ``pipeline/``, which diffusers opens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from erase_concept import masks
from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.exports import Exported, export
from erase_concept.frozen import check_frozen, keep_base
from erase_concept.image_folders import image_folders
from erase_concept.make_data import cached_data, check_data
from erase_concept.masks.make import cached_mask, check_mask, needs_mask, source_and_model
from erase_concept.masks.mask import Mask
from erase_concept.methods import METHODS
from erase_concept.model_card import write_card
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.image_set import shortened
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.pictures import hidden_pictures
from erase_concept.pipelines.processes import from_main, held, processes, same_for_all
from erase_concept.pipelines.progress import bar
from erase_concept.pipelines.sample import cut_note
from erase_concept.prompts.find import ConceptSource
from erase_concept.recipe import (
    Recipe,
    check_shards,
    check_weights,
    earlier_runs,
    in_low_precision,
    make_recipe,
    read_recipe,
    recipe_for,
)
from erase_concept.run_folder import claimed, complete, read_run, versions, weights_files, write_json
from erase_concept.run_log import checkpoint_file, logged, logged_losses
from erase_concept.tokens import own_tokens
from erase_concept.training.bf16 import in_bf16
from erase_concept.training.health import watched
from erase_concept.training.loop import Record, TargetProgress, Training, check_shares
from erase_concept.training.offload import offload_to_disk


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A complete run: its folder, which it can stand for as a path. Raises RequestError when the folder holds none."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        read_run(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def run_info(self) -> dict[str, Any]:
        """What ``run.json`` says: versions, hashes, seeds, times, checks."""
        return read_run(self.path)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was followed."""
        return make_recipe(read_recipe(self.path / "recipe.yaml"))

    def pipeline(self) -> Any:
        """Return the erased model as an ordinary diffusers pipeline."""
        return load(str(self.path / "pipeline")).pipeline()

    def export(self, file: str | Path, format: str = "unet", **options: Any) -> Exported:
        """Write the erased model as a folder or a file; see ``export`` for the formats and options."""
        return export(self, file, format, **options)


def erase(
    model: Any,
    concept: ConceptSource,
    *,
    out: str | Path,
    method: str | None = None,
    preset: str = "default",
    memory: str = "fast",
    seed: int = 0,
    **values: Any,
) -> Run:
    """Erase concepts from a model, with a progress bar, and return the run.

    ``model`` is a name, a path, a hub id, a loaded diffusers pipeline, or a loaded ``Diffusion``, which is then changed
    in place.
    ``concept`` is whatever ``recipe_for`` takes, and ``values`` are other fields of a recipe, such as
    ``settings={"lr": 1e-5}``. Raises as ``iter_erase`` does.
    """
    source, loaded = source_and_model(model)
    named: dict[str, Any] = {} if method is None else {"method": method}
    recipe = recipe_for(source, concept, preset_name=preset, memory=memory, seed=seed, **named, **values)
    return run_recipe(recipe, Path(out), model=loaded)


def run_recipe(recipe: Recipe, out: Path, *, model: Diffusion | None = None) -> Run:
    """Run a recipe to its end, with a progress bar, and return the run; see ``iter_erase``."""
    with bar() as shown:
        task = shown.add_task("start", total=None)
        for event in iter_erase(recipe, out, model=model):
            if event in ("data", "mask"):
                shown.stop()  # they show bars of their own
            elif isinstance(event, str):
                shown.start()
                shown.remove_task(task)
                task = shown.add_task(event, total=None)
            else:
                text = f"erase  loss {event.loss:.4f}" if isinstance(event, Record) else "targets of the base model"
                shown.update(task, description=text, completed=event.step, total=event.steps)
    return Run(out)


def iter_erase(
    recipe: Recipe, out: str | Path, *, model: Diffusion | None = None
) -> Iterator[Record | TargetProgress | str]:
    """Run a recipe in a folder, yielding the name of each stage as it begins and a record after each step.

    When it is exhausted, ``out/pipeline`` holds the erased model and ``out/run.json`` says how it was made. A run that
    is already complete yields nothing. ``model`` may give the loaded base model, which is then changed in place.

    Where Accelerate has started several processes, they share the sampling, the saliency and the training, and the main
    one alone writes into the folder, which all must see.

    Raises RequestError when the folder holds another run or the recipe cannot be followed, EraseError when the work
    fails or a weight changed that should not have.
    """
    out = Path(out)
    given = check(recipe)
    if from_main(lambda: _claimed(recipe, out) and complete(out)):
        return
    if model is None:
        yield "load"
        model = load(recipe.model, ema=recipe.ema, keep_unet=in_low_precision(recipe))
    if given is not None:
        given.check(model.unet)
    part = "text_encoder" if recipe.mask.scope == masks.TEXT_ENCODER else "unet"
    if part == "text_encoder":
        own_tokens(model, recipe.concept)  # refuses a concept without any
    trained: nn.Module = getattr(model, part)
    # From here on the request is known to be sound: only now does the folder become the run's.
    with held(out):
        yield from _stages(recipe, model, trained, part, out)


def _stages(
    recipe: Recipe, model: Diffusion, trained: nn.Module, part: str, out: Path
) -> Iterator[Record | TargetProgress | str]:
    """Carry out the stages of a run in its folder."""
    state = processes()
    if from_main(lambda: _claimed(recipe, out) and complete(out)):  # another process has done it since
        return
    times = [time.perf_counter()]
    about, notes = model.describe(), _notes(recipe, model)
    same_for_all("model", recipe.model, about)
    from_main(lambda: recipe.save(out / "recipe.yaml"))
    for note in notes:
        logging.getLogger("erase_concept").warning("erase-concept: %s", note)
    base = out / f"base-{part.replace('_', '-')}.safetensors"
    if not from_main(lambda: keep_base(trained, base)):
        raise RequestError("model", recipe.model, f"has changed since the run in {out} began; choose another folder")
    device = next(model.vae.parameters()).device  # a UNet that becomes bf16 is not there yet
    with in_bf16(trained, base, device) if in_low_precision(recipe) else nullcontext():
        yield "data"
        data = cached_data(recipe, model, about["unet"], out / "data.safetensors")
        times.append(time.perf_counter())
        # Everything is encoded: only the UNet and what is trained are needed until the pipeline is written.
        unused = [one for one in (model.vae, *model.text_encoders.values()) if one is not trained]
        with offload_to_disk(unused, out / "offloaded"):
            if needs_mask(recipe):
                yield "mask"
            mask = cached_mask(recipe, model, data, about["unet"], out / "mask.safetensors")
            times.append(time.perf_counter())
            yield "erase"
            yield from _train(recipe, model, data, mask, out)
            times.append(time.perf_counter())

    yield "export"

    def export_all() -> None:
        seconds = [round(after - before, 2) for before, after in pairwise(times)]
        run_info = _describe(recipe, data) | {
            "base": about | _where(about["source"]),
            "erased": {"unet": weights_hash(model.unet), part: weights_hash(trained)},
            "mask": mask and {"kind": recipe.mask.kind, "sha256": mask.sha256(), "density": mask.density},
            "checks": check_frozen(base, trained, mask),
            "seconds": dict(zip(("data", "mask", "erase"), seconds, strict=True)),
            "versions": versions(),
            **({"notes": notes} if notes else {}),
            **({"processes": state.num_processes} if state.num_processes > 1 else {}),
        }
        save_pipeline(model, out / "pipeline")
        run_info["files"] = weights_files(out / "pipeline")
        write_card(out, run_info)
        base.unlink()
        write_json(out / "run.json", run_info)  # last: it says that the run is complete

    from_main(export_all)


def check(recipe: Recipe) -> Mask | None:
    """Refuse what cannot be followed before anything is written; return the mask of a file, where one is named."""
    if isinstance(settings := recipe.settings, Training):
        # So that all have found each other before one of them ends.
        from_main(lambda: check_shares(settings, processes().num_processes))
    check_data(recipe)
    check_weights(recipe)
    check_shards(recipe)
    return check_mask(recipe)


def _claimed(recipe: Recipe, out: Path) -> bool:
    """Tell whether the folder is this recipe's run; refuse one that holds another run or other files."""
    return claimed(out, lambda file: make_recipe(read_recipe(file)) == recipe)


def _notes(recipe: Recipe, model: Diffusion) -> list[str]:
    """Say what of the recipe's prompts and folders of images is not used: words that are cut off, and hidden files."""
    concept = recipe.concept
    notes = [cut_note(model, (*concept.forget_prompts, *concept.anchor_prompts, *concept.retain_prompts))]
    for folder in image_folders(recipe):
        if hidden := [file.name for file in hidden_pictures(folder, deep=True)]:
            which = "file is" if len(hidden) == 1 else "files are"
            notes.append(f"{folder.name}: {len(hidden)} {which} hidden and left out: {shortened(hidden)}")
    return [note for note in notes if note]


def _where(source: str) -> dict[str, str]:
    """Return the folder from which a base model's relative path starts; nothing for any other name of a model."""
    relative = source not in builtin_models() and not Path(source).is_absolute() and Path(source).exists()
    return {"folder": str(Path.cwd())} if relative else {}


def _train(
    recipe: Recipe, model: Diffusion, data: ForgetRetain, mask: Mask | None, out: Path
) -> Iterator[Record | TargetProgress]:
    """Run the method, and write each record to the log."""
    checkpoint = checkpoint_file(out)
    method = METHODS.find(recipe.method)
    events = method.start(model, data, mask, recipe.settings, seed=recipe.seed, checkpoint=checkpoint)
    events = watched(events, model, data, mask, recipe.settings, from_main(lambda: logged_losses(out)))
    return logged(out, events) if processes().is_main_process else events


def _describe(recipe: Recipe, data: ForgetRetain) -> dict[str, Any]:
    """Return what ``run.json`` says of the recipe."""
    concept, earlier = recipe.concept, earlier_runs(recipe.model)
    parts = [{"concept": one.name, "kind": one.kind, "anchor": one.replacement} for one in concept.combined]
    return {
        "schema": 1,
        "method": recipe.method,
        "concept": concept.name,
        "kind": concept.kind,
        "anchor": concept.replacement,
        **({"parts": parts} if parts else {}),
        # What earlier runs erased is retained like anything else: retain rows are sampled from the model as it is, in
        # which those prompts show something else already, so that retaining them keeps the erasure.
        **({"earlier": earlier} if earlier else {}),
        "seed": recipe.seed,
        "recipe": recipe.fingerprint(),
        "settings": asdict(METHODS.find(recipe.method).resolved(recipe.settings, data)),
    }
