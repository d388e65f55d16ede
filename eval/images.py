"""The images of an evaluation: sampled, or read from a folder. The base model's images are kept and used again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import RequestError
from erase_concept.eval.request import is_images
from erase_concept.files import LOCK, PARTIAL, only_process
from erase_concept.prompts.promptset import PromptRow, PromptSet

if TYPE_CHECKING:
    from erase_concept.eval.plan import EvalPlan
    from erase_concept.pipelines.image_set import ImageSet
    from erase_concept.pipelines.model import Diffusion
    from erase_concept.pipelines.sample import Sampling

# Of what an image depends on: what the models differ in, and what is compared elsewhere.
_MAY_DIFFER = ("unet", "prompts", "sampler", "steps", "guidance", "eta", "guard", "matched")
_FULL = 512  # pixels; the sizes that prompts name are meant for models of this size and above


@dataclass(frozen=True, eq=False)
class EvalImages:
    """The images of the erased model and of its base.

    ``made`` counts the newly sampled images of each, and ``seconds`` is the time that it took to get all images.
    """

    erased: ImageSet
    base: ImageSet | None
    made: Mapping[str, int]
    seconds: float

    @property
    def notes(self) -> dict[str, list[str]]:
        """What is odd about the images of either model."""
        sides = {"erased": self.erased, "base": self.base}
        return {who: list(some.notes) for who, some in sides.items() if some is not None and some.notes}


def gather(plan: EvalPlan) -> Generator[tuple[str, int, int], None, EvalImages]:
    """Get the images of both models, from the same prompts and seeds, and yield the progress of the sampling.

    Raises RequestError when there are none, or when the two sets differ in more than the model.
    """
    from erase_concept.pipelines.image_set import check_drawn

    began = time.perf_counter()
    made: dict[str, int] = {}
    _check_base_model(plan)
    erased = yield from _images("erased", plan, plan.prompts.asked, made)
    base = None
    if plan.baseline is not None:
        # Both folders are matched with all prompts: with fewer, file order would match the base's images wrongly.
        folders = is_images(Path(plan.request.model)) and is_images(Path(plan.baseline))
        asked = plan.prompts.asked
        base = yield from _images("base", plan, asked if folders else replace(asked, rows=erased.rows), made)
        _check_base_images(plan, base)
        erased, base = _in_common(erased, base)
        check_same(erased, base)
        base = _with_differences(plan, erased, base)
    for images in (erased, base):
        if images is not None:
            check_drawn(images.files)
    return EvalImages(erased, base, made, time.perf_counter() - began)


def sampling_of(plan: EvalPlan, *, guarded: bool) -> Sampling:
    """Return how a plan's images are sampled, with its guard or without."""
    from erase_concept.pipelines.sample import Sampling

    settings = plan.settings
    return Sampling(
        steps=settings.steps,
        guidance=settings.guidance,
        scheduler=settings.scheduler,
        batch_size=plan.request.batch_size,
        guard=plan.guard if guarded else None,
    )


def _check_base_model(plan: EvalPlan) -> None:
    """Raise RequestError, before anything is sampled, when the base is not the model that the run erased from."""
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.model import weights_hash

    if plan.baseline is None or plan.run.base_unet is None or is_images(Path(plan.baseline)):
        return
    if weights_hash(load(plan.baseline, ema=_base_ema(plan)).unet) != plan.run.base_unet:
        raise RequestError("baseline", plan.baseline, "is not the model that this run erased from")


def _base_ema(plan: EvalPlan) -> bool | None:
    """Return which weights of the base model's file are taken: those that the run was told, or that are asked for."""
    return plan.request.ema if plan.run.ema is None else plan.run.ema


def _check_base_images(plan: EvalPlan, base: ImageSet) -> None:
    """Raise RequestError when images that are there already are not those of the model that the run erased from."""
    known = base.settings.get("unet")
    if plan.run.base_unet is not None and known is not None and known != plan.run.base_unet:
        raise RequestError("baseline", str(plan.baseline), "is not the model that this run erased from")


def _images(
    who: str, plan: EvalPlan, prompts: PromptSet, made: dict[str, int]
) -> Generator[tuple[str, int, int], None, ImageSet]:
    """Read the images when the source is a folder of them, otherwise sample them and count in ``made`` how many.

    Several processes share the sampling, and each reads all images.
    """
    from erase_concept.pipelines.image_set import read_images
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.match_images import match_images
    from erase_concept.pipelines.processes import processes, total
    from erase_concept.pipelines.sample import cut_note, iter_sample

    source = str(plan.request.model if who == "erased" else plan.baseline)
    folder, setting, size = Path(source), "images" if who == "erased" else "baseline", plan.benchmark.size
    if is_images(folder):
        images = match_images(folder, prompts, setting=setting)
        if size is not None:
            _check_size(images, size, setting)
        return images
    model = load(source, ema=_base_ema(plan) if who == "base" else plan.request.ema)
    check_model(plan, model)
    prompts = fitting(prompts, model)
    sampling = sampling_of(plan, guarded=who == "erased")
    samples, count, state = plan.request.out / "samples" / who, len(prompts.rows), processes()
    kept = plan.cache / _key(model, prompts, sampling) if who == "base" else None
    if kept is not None and kept.is_dir() and not samples.exists() and state.is_main_process:
        _copy(kept, samples)
    state.wait_for_everyone()  # ``iter_sample`` waits again before anybody makes an image that is counted here
    done, new = len(list(samples.glob("*.png"))), 0
    yield who, done, count
    for _ in iter_sample(model, prompts, samples, sampling):
        done, new = min(done + state.num_processes, count), new + 1  # the others are about as far
        yield who, done, count
    made[who] = total(new)
    if kept is not None and not kept.exists() and state.is_main_process:
        _copy(samples, kept)
    found = read_images(samples)
    note = cut_note(model, [row.prompt for row in prompts.rows])
    return replace(found, notes=(*found.notes, note)) if note else found


def check_model(plan: EvalPlan, model: Diffusion) -> None:
    """Raise RequestError when a model draws images of a size that the benchmark's judges do not take."""
    if plan.benchmark.size not in (None, model.size):
        allowed = f"makes images of {model.size} pixels; this benchmark judges {plan.benchmark.size}"
        raise RequestError("model", model.source, allowed)


def fitting(prompts: PromptSet, model: Diffusion) -> PromptSet:
    """Return the prompts, without their sizes where the model is too small to draw them."""
    if model.size >= _FULL:
        return prompts
    return replace(prompts, rows=tuple(replace(row, width=None, height=None) for row in prompts.rows))


def _check_size(images: ImageSet, size: int, setting: str) -> None:
    """Raise RequestError naming images of another size."""
    from erase_concept.pipelines.pictures import picture_size

    for file in images.files:
        wide, high = picture_size(file, setting=setting)
        if (wide, high) != (size, size):
            allowed = f"{file.name} has {wide} x {high} pixels; this benchmark judges {size} x {size}"
            raise RequestError(setting, file.parent, allowed)


def _key(model: Diffusion, prompts: PromptSet, sampling: Sampling) -> str:
    """Return the SHA-256 over all that the images of a model depend on."""
    from erase_concept.pipelines.sample import made_from

    parts_of_key = {
        "made from": made_from(model, prompts, sampling),
        "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "diffusers")},
        "device": model.device.type,
    }
    return hashlib.sha256(json.dumps(parts_of_key, sort_keys=True).encode()).hexdigest()


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder of samples, whole or not at all. Images become hard links where the file system allows."""
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_process(target.parent, wait=True):
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
            partial.mkdir()
            for file in folder.iterdir():
                if file.name == LOCK:
                    continue
                try:
                    # A manifest is written to again, so each folder gets a copy of its own.
                    (os.link if file.suffix == ".png" else shutil.copy2)(file, partial / file.name)
                except OSError:  # two file systems, or one without links
                    shutil.copy2(file, partial / file.name)
            partial.replace(target)
    except OSError:  # a full disk, or another process was first: then it is sampled, or stays where it is
        shutil.rmtree(partial, ignore_errors=True)


def _in_common(erased: ImageSet, base: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images of the prompts that both have; notes say how many have no counterpart."""
    if erased.rows == base.rows:
        return erased, base
    places: dict[PromptRow, deque[int]] = defaultdict(deque)
    for place, row in enumerate(base.rows):
        places[row].append(place)
    pairs = [(place, places[row].popleft()) for place, row in enumerate(erased.rows) if places[row]]
    if not pairs:
        raise RequestError("baseline", folder_of(base), f"no prompt and seed of it is one of {folder_of(erased)}")
    both = []
    for images, kept in zip((erased, base), zip(*pairs, strict=True), strict=True):
        left = len(images.rows) - len(kept)
        notes = (f"{left:,} images left out, for the other model has none of their prompt and seed",) if left else ()
        files, rows = tuple(images.files[place] for place in kept), tuple(images.rows[place] for place in kept)
        both.append(replace(images, files=files, rows=rows, notes=(*images.notes, *notes)))
    return both[0], both[1]


def check_same(erased: ImageSet, base: ImageSet) -> None:
    """Raise RequestError unless only the models differ: same rows, same sampler, steps and guidance.

    A setting that one of the two does not record, such as that of images made elsewhere, is not compared.
    """
    if erased.rows != base.rows:
        raise RequestError("baseline", folder_of(base), f"its prompts or seeds are not those of {folder_of(erased)}")
    for name in ("sampler", "steps", "guidance"):
        ours, theirs = erased.settings.get(name), base.settings.get(name)
        if ours != theirs and None not in (ours, theirs):
            raise RequestError(
                "baseline", folder_of(base), f"sampled with {name} {theirs}, the erased model with {ours}"
            )


def _with_differences(plan: EvalPlan, erased: ImageSet, base: ImageSet) -> ImageSet:
    """Return the base model's images with a note, where the models differ in more than what was erased."""
    ours, theirs = erased.settings, base.settings
    meant = {*_MAY_DIFFER, *plan.run.run_info.get("erased", ())}
    if ours.get("prompts") != theirs.get("prompts"):
        meant.add("tokens")
    found = [name for name in ours if name in theirs and name not in meant and ours[name] != theirs[name]]
    if not found:
        return base
    note = f"differs from the erased model in more than what was erased: {', '.join(found)}"
    return replace(base, notes=(*base.notes, note))


def sampling(settings: Mapping[str, Any], rows: Sequence[PromptRow]) -> str:
    """Return how images were made, in words for the protocol of a score."""
    if "sampler" not in settings:
        return f"images made elsewhere, matched by {settings.get('matched', 'manifest')}"
    text = f"{settings.get('steps', '?')} steps of {settings['sampler']}"
    if "guard" in settings:
        text = f"{text}, guard {settings['guard']} (no weights changed)"
    asked = {settings.get("guidance") if row.guidance is None else row.guidance for row in rows}
    scales = sorted(float(scale) for scale in asked if scale is not None)
    if len(scales) > 4:
        return f"{text}, guidance {scales[0]:g} to {scales[-1]:g}"
    return f"{text}, guidance {', '.join(f'{scale:g}' for scale in scales)}" if scales else text


def folder_of(images: ImageSet) -> Path | str:
    """Return where the images lie, as an error names it."""
    return images.files[0].parent if images.files else "(empty)"
