"""The images that a benchmark judges: sampled, or read from a folder; the base model's are kept for the next time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Report
from erase_concept.eval.thresholds import Gate
from erase_concept.prompts.promptset import PromptRow, PromptSet

if TYPE_CHECKING:
    from erase_concept.pipelines.image_set import ImageSet
    from erase_concept.pipelines.model import Diffusion
    from erase_concept.prompts.concept import Concept

_FULL = 512  # pixels; the sizes that prompts name are meant for models of this size and above


@dataclass(frozen=True)
class Plan:
    """What every benchmark is told: whose images, where to, and what they may not be."""

    model: str
    baseline: str | None
    out: Path
    run: dict[str, Any]
    batch_size: int
    fail_if: Sequence[str]
    guard: str | None = None

    def guarded(self, concept: Concept) -> dict[str, Any]:
        """Return the guard, if any, as an option of ``Sampling``; raises RequestError when there is no such one."""
        from erase_concept.pipelines.guards import find_guard

        return {} if self.guard is None else {"guard": find_guard(self.guard, concept)}

    @property
    def source(self) -> str:
        """The base model's name."""
        return self.run["base"]["source"] if self.run else str(self.baseline or self.model)

    @property
    def shelf(self) -> Path:
        """Where the images of base models are kept, and what was seen in any: beside the results, or in them."""
        beside = self.out.resolve().parent
        return (beside if os.access(beside, os.W_OK) or not beside.exists() else self.out) / ".baselines"

    def find_base(self) -> None:
        """Raise RequestError where there is no base model, before hours go into the erased one's images."""
        from erase_concept.pipelines.load import configs

        if self.baseline is not None and not is_images(Path(self.baseline)):
            try:
                configs(self.baseline)
            except RequestError as problem:
                raise RequestError("--baseline", self.baseline, problem.allowed) from problem

    def check_base(self, base: ImageSet) -> None:
        """Raise RequestError when the images are not those of the model that the run erased from."""
        told = base.settings.get("unet")
        if self.run and told is not None and told != self.run["base"]["unet"]:
            raise RequestError("--baseline", str(self.baseline), "is not the model that this run erased from")


@dataclass(frozen=True, eq=False)
class Gathered:
    """The images of the erased model and of the base; ``made`` counts the new ones, in so many ``seconds``."""

    erased: ImageSet
    base: ImageSet | None
    made: dict[str, int]
    seconds: float

    @property
    def notes(self) -> dict[str, list[str]]:
        """What is odd about the images of either model."""
        sides = {"erased": self.erased, "base": self.base}
        return {who: list(some.notes) for who, some in sides.items() if some is not None and some.notes}


@dataclass(frozen=True, eq=False)
class Asked:
    """The images that a benchmark asks for, and what becomes of them.

    ``options`` are those of ``Sampling``, ``guarded`` more of them for the erased model alone. Only images of ``size``
    pixels will do, where it is given.
    """

    prompts: PromptSet
    options: Mapping[str, Any]
    guarded: Mapping[str, Any]
    gates: Sequence[Gate]
    measure: Callable[[Gathered], Report]
    size: int | None = None


def gather(plan: Plan, asked: Asked) -> Generator[tuple[str, int, int], None, Gathered]:
    """Get the images of both models, of the same prompts and seeds, and yield how far it is.

    Raises RequestError when there are none, or when they differ in more than the model.
    """
    begun = time.perf_counter()
    made: dict[str, int] = {}
    guarded = replace(asked, options={**asked.options, **asked.guarded})
    erased = yield from _images("erased", plan.model, asked.prompts, plan, guarded, made)
    base = None
    if plan.baseline is not None:
        # A folder that lacks images would shift those of another folder, were only its own prompts asked for again.
        folders = is_images(Path(plan.model)) and is_images(Path(plan.baseline))
        again = asked.prompts if folders else PromptSet(asked.prompts.name, erased.rows)
        base = yield from _images("base", plan.baseline, again, plan, asked, made)
        plan.check_base(base)
        erased, base = _in_common(erased, base)
        check_same(erased, base)
    return Gathered(erased, base, made, time.perf_counter() - begun)


def is_images(folder: Path) -> bool:
    """Tell a folder of images from a model's and from a run's."""
    from erase_concept.pipelines.image_set import IMAGE_SUFFIXES

    if not folder.is_dir() or any((folder / name).is_file() for name in ("run.json", "model_index.json")):
        return False
    return any(file.name == "manifest.jsonl" or file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())


def _images(
    who: str, source: str, prompts: PromptSet, plan: Plan, asked: Asked, made: dict[str, int]
) -> Generator[tuple[str, int, int], None, ImageSet]:
    """Read the images when the source is a folder of them, otherwise sample them and count in ``made`` how many.

    Several processes share the sampling, and each reads all images.
    """
    from erase_concept.pipelines.image_set import read_images
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.match_images import match_images
    from erase_concept.pipelines.processes import processes, total
    from erase_concept.pipelines.sample import Sampling, iter_sample

    folder, setting = Path(source), "images" if who == "erased" else "baseline"
    if is_images(folder):
        images = match_images(folder, prompts, setting=setting)
        if asked.size is not None:
            _check_size(images, asked.size, setting)
        return images
    model = load(source)
    if asked.size not in (None, model.size):
        raise RequestError("MODEL", source, f"makes images of {model.size} pixels; this benchmark judges {asked.size}")
    prompts = fitting(prompts, model)
    samples, count, state = plan.out / "samples" / who, len(prompts.rows), processes()
    kept = plan.shelf / _key(model, prompts, asked.options) if who == "base" else None
    if kept is not None and kept.is_dir() and not samples.exists() and state.is_main_process:
        _copy(kept, samples)
    state.wait_for_everyone()  # ``iter_sample`` waits again before anybody makes an image that is counted here
    done, new = len(list(samples.glob("*.png"))), 0
    yield who, done, count
    sampling = Sampling(batch_size=plan.batch_size, **asked.options)
    for _ in iter_sample(model, prompts, samples, sampling):
        done, new = min(done + state.num_processes, count), new + 1  # the others are about as far
        yield who, done, count
    made[who] = total(new)
    if kept is not None and not kept.exists() and state.is_main_process:
        _copy(samples, kept)
    return read_images(samples)


def fitting(prompts: PromptSet, model: Diffusion) -> PromptSet:
    """Return the prompts, without their sizes where the model cannot draw them, such as Emojinette 512 x 512 pixels."""
    if model.size >= _FULL:
        return prompts
    return replace(prompts, rows=tuple(replace(row, width=None, height=None) for row in prompts.rows))


def _check_size(images: ImageSet, size: int, setting: str) -> None:
    """Raise RequestError naming images of another size."""
    from PIL import Image

    for file in images.files:
        with Image.open(file) as image:  # reads no more than the head
            if image.size != (size, size):
                wide, high = image.size
                allowed = f"{file.name} has {wide} x {high} pixels; this benchmark judges {size} x {size}"
                raise RequestError(setting, file.parent, allowed)


def _key(model: Diffusion, prompts: PromptSet, options: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all that the images of a model depend on."""
    from erase_concept.pipelines.model import weights_hash

    parts = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    told = {
        "weights": {part: weights_hash(module) for part, module in parts.items()},
        "scheduler": dict(model.scheduler.config),
        "rows": [asdict(row) for row in prompts.rows],
        "options": dict(options),
        "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "diffusers")},
        "device": model.device.type,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder of samples as a whole or not at all; images take no room twice where they can be shared."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for file in folder.iterdir():
            try:
                # Of a file that is written to again, each folder has its own.
                (os.link if file.suffix == ".png" else shutil.copy2)(file, partial / file.name)
            except OSError:  # two file systems, or one without links
                shutil.copy2(file, partial / file.name)
        partial.replace(target)
    except OSError:  # a full disk, or another process was first: then it is sampled, or stays where it is
        shutil.rmtree(partial, ignore_errors=True)


def _in_common(erased: ImageSet, base: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images of the prompts that both have; notes tell how many have no counterpart."""
    if erased.rows == base.rows:
        return erased, base
    places: dict[PromptRow, list[int]] = defaultdict(list)
    for place, row in enumerate(base.rows):
        places[row].append(place)
    pairs = [(place, places[row].pop(0)) for place, row in enumerate(erased.rows) if places[row]]
    if not pairs:
        raise RequestError("--baseline", folder_of(base), f"no prompt and seed of it is one of {folder_of(erased)}")
    both = []
    for images, kept in zip((erased, base), zip(*pairs, strict=True), strict=True):
        left = len(images.rows) - len(kept)
        notes = (f"{left:,} images left out, for the other model has none of their prompt and seed",) if left else ()
        files, rows = tuple(images.files[place] for place in kept), tuple(images.rows[place] for place in kept)
        both.append(replace(images, files=files, rows=rows, notes=(*images.notes, *notes)))
    return both[0], both[1]


def check_same(erased: ImageSet, base: ImageSet) -> None:
    """Raise RequestError unless only the models differ: same rows, same sampler, steps and guidance.

    What one of the two does not say, such as of images made elsewhere, may be the same.
    """
    if erased.rows != base.rows:
        raise RequestError("--baseline", folder_of(base), f"its prompts or seeds are not those of {folder_of(erased)}")
    for name in ("sampler", "steps", "guidance"):
        ours, theirs = erased.settings.get(name), base.settings.get(name)
        if ours != theirs and None not in (ours, theirs):
            raise RequestError(
                "--baseline", folder_of(base), f"sampled with {name} {theirs}, the erased model with {ours}"
            )


def sampling(settings: Mapping[str, Any], rows: Sequence[PromptRow]) -> str:
    """Say how images were made, as it stands in the protocol of a score."""
    if "sampler" not in settings:
        return f"images made elsewhere, matched by {settings.get('matched', 'manifest')}"
    told = f"{settings.get('steps', '?')} steps of {settings['sampler']}"
    if "guard" in settings:
        told = f"{told}, guard {settings['guard']} (no weights changed)"
    asked = {settings.get("guidance") if row.guidance is None else row.guidance for row in rows}
    scales = sorted(float(scale) for scale in asked if scale is not None)
    if len(scales) > 4:
        return f"{told}, guidance {scales[0]:g} to {scales[-1]:g}"
    return f"{told}, guidance {', '.join(f'{scale:g}' for scale in scales)}" if scales else told


def folder_of(images: ImageSet) -> Path | str:
    """Return where the images lie, as an error names it."""
    return images.files[0].parent if images.files else "(empty)"
