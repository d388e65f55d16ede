"""Prompts to images: one random generator per image, so neither batch size nor resuming changes its noise."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from pydantic import InstanceOf
from torch import Tensor

from erase_concept.errors import EraseError, RequestError, out_of_memory
from erase_concept.files import atomic_write, read_json
from erase_concept.pipelines.formats.prediction import prediction_of
from erase_concept.pipelines.formats.scheduler import knows_zero_snr
from erase_concept.pipelines.guards.guard import AppliedGuard, classifier_free
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.image_set import (
    SETTINGS,
    ImageSet,
    check_drawn,
    image_name,
    manifest_line,
    manifest_name,
    merge_manifests,
    read_images,
    read_manifest,
)
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.processes import held, processes, same_for_all
from erase_concept.pipelines.progress import progress
from erase_concept.pipelines.signals import finish_first
from erase_concept.prompts.find_prompts import find_prompts
from erase_concept.prompts.minors import DROPPED
from erase_concept.prompts.promptset import PromptRow, PromptSet
from erase_concept.settings import check_settings, described, settings

SAMPLER = "DPM-Solver++ 2M"  # where no scheduler is named
# The schedulers that diffusers lists for Stable Diffusion, and the two of its distilled models. Two are left out: one
# draws its noise for a whole batch at once, so an image would depend on the others; one does not use the model's own
# noise schedule.
SCHEDULERS = tuple(
    sorted(
        {scheduler.name for scheduler in KarrasDiffusionSchedulers} - {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
        | {"LCMScheduler", "TCDScheduler"}
    )
)


@settings
class Sampling:
    """How images are sampled from prompts."""

    steps: Annotated[int, described("Sampling steps.", ge=1)] = 25
    guidance: Annotated[
        float, described("Guidance scale of prompts that name none; up to 1 there is no guidance.", ge=0)
    ] = 7.5
    scheduler: Annotated[str | None, described("A scheduler of diffusers; by default DPM-Solver++ 2M.")] = None
    eta: Annotated[float, described("Noise that DDIM adds in a step, from none to its full variance.", ge=0, le=1)] = (
        0.0
    )
    batch_size: Annotated[int, described("Images that are sampled together.", ge=1)] = 16
    guard: Annotated[InstanceOf[AppliedGuard] | None, described("What keeps a concept out of the images.")] = None


DEFAULT = Sampling()


def make_scheduler(model: Diffusion, name: str | None, steps: int) -> Any:
    """Return one of diffusers' schedulers for the model's noise schedule, set to so many steps.

    ``None`` is DPM-Solver++ (arXiv 2211.01095) of second order. Raises RequestError when there is none of that name,
    when it needs a package that is not installed, or when it cannot take that many steps.
    """
    if name is not None and name not in SCHEDULERS:
        raise RequestError("scheduler", name, f"allowed: {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, name or "DPMSolverMultistepScheduler")
    if prediction_of(model.scheduler).zero_snr and not knows_zero_snr(kind):
        able = ", ".join(one for one in SCHEDULERS if knows_zero_snr(getattr(diffusers, one)))
        raise RequestError("scheduler", str(name), f"has no zero terminal SNR, which this model needs; allowed: {able}")
    options = {} if name else {"algorithm_type": "dpmsolver++"}
    try:
        with silence_hub_logs():
            scheduler = kind.from_config(model.scheduler.config, **options)
            scheduler.set_timesteps(steps)
    except ImportError as problem:
        raise RequestError("scheduler", str(name), str(problem)) from None
    except ValueError as problem:
        raise RequestError("scheduler", name or SAMPLER, f"cannot take {steps} steps: {problem}") from None
    return scheduler


@torch.no_grad()
def sample_latents(
    model: Diffusion,
    embeddings: Tensor,
    uncond: Tensor,
    seeds: Sequence[int],
    guidance: Sequence[float],
    sampling: Sampling = DEFAULT,
    *,
    size: tuple[int | None, int | None] = (None, None),
    stop: int | None = None,
) -> Tensor:
    """Sample scaled latents [n, 4, h/f, w/f], with one seed and one guidance scale each.

    Up to the scale 1 there is no guidance.
    ``embeddings`` [n, tokens, width] and ``uncond`` [1, tokens, width] are encoded prompts, the former as the guard of
    ``sampling`` encodes them. The noise of an image depends on its own seed alone, at the start and, with some
    schedulers, in every step. ``size`` is height and width in pixels, by default the model's. ``stop`` ends the
    sampling before the step of that number; the latents are then as noisy as this step takes them.
    """
    scheduler = make_scheduler(model, sampling.scheduler, sampling.steps)
    sides = ((side or model.size) // model.factor for side in size)
    shape = (model.unet.config.in_channels, *sides)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    latents = torch.stack(noise).to(embeddings) * scheduler.init_noise_sigma
    # As in diffusers a scale below 1 is no guidance, too: by the formula, 0 would not see the prompt.
    scale = torch.tensor(guidance, dtype=embeddings.dtype, device=embeddings.device).clamp(min=1).view(-1, 1, 1, 1)
    taken = inspect.signature(scheduler.step).parameters
    # As in diffusers' own pipelines, noise comes from the image's seed.
    options = {key: value for key, value in (("generator", generators), ("eta", sampling.eta)) if key in taken}
    steps, guard = len(scheduler.timesteps), sampling.guard
    if guard is None:
        predict = classifier_free(model, (), None, embeddings, uncond, scale, steps)
    else:
        predict = guard.guide(model, embeddings, uncond, scale, steps)
    for step, timestep in enumerate(scheduler.timesteps[:stop]):
        noisy = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(predict(noisy, timestep, step), timestep, latents, **options).prev_sample
    if not bool(latents.isfinite().all()):
        raise EraseError(f"{model.source}: the model gives NaN or infinity in the place of an image")
    return latents


def sample_images(
    model: Diffusion,
    rows: Sequence[PromptRow],
    sampling: Sampling = DEFAULT,
    *,
    places: Collection[int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place in rows, uint8 image [h, w, 3]) for every row; batches mix prompts but not sizes.

    Each prompt is encoded once. ``places`` are those that are asked for, where it is not every row. ``share`` (k, n)
    samples only every n-th batch from the k-th on. Batches stay whole, so an image is the same to the bit however many
    processes share the work, and whatever was sampled before a kill. Ctrl-C and SIGTERM wait for the end of a batch.
    Raises EraseError when there is too little memory for a batch.
    """
    wanted = range(len(rows)) if places is None else frozenset(places)
    every = _batches(rows, sampling.batch_size)
    batches = [batch for batch in every if any(i in wanted for i in batch)][share[0] :: share[1]]
    if not batches:
        return
    uncond = model.encode_uncond()
    encoder = _Encoder(
        model,
        sampling.guard,
        _encoded_together([[rows[i].prompt for i in batch] for batch in every]),
        Counter(rows[i].prompt for batch in batches for i in batch),
    )
    for batch in batches:
        with finish_first():
            images = _batch_images(model, [rows[i] for i in batch], sampling, encoder, uncond)
            yield from ((i, image) for i, image in zip(batch, images, strict=True) if i in wanted)


def _batch_images(
    model: Diffusion, rows: Sequence[PromptRow], sampling: Sampling, encoder: _Encoder, uncond: Tensor
) -> np.ndarray:
    """Return the images uint8 [n, h, w, 3] of rows of one size."""
    size = (rows[0].height, rows[0].width)
    try:
        latents = sample_latents(
            model,
            encoder.next([row.prompt for row in rows]).to(uncond.device),
            uncond,
            [row.seed for row in rows],
            [sampling.guidance if row.guidance is None else row.guidance for row in rows],
            sampling,
            size=size,
        )
        return model.decode(latents).numpy()
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        height, width = (side or model.size for side in size)
        raise EraseError(_too_little_memory(len(rows), f"{width} x {height} pixels")) from problem


def in_halves(make: Callable[[slice], Tensor], first: int, last: int) -> Tensor:
    """Return what is made of these rows: of all at once, or where memory is too short for that, of each half in turn.

    ``make`` gets the rows' places. Raises what it raises for a single row.
    """
    try:
        return make(slice(first, last))
    except (RuntimeError, MemoryError) as problem:
        if last - first == 1 or not out_of_memory(problem):
            raise
    middle = (first + last) // 2  # outside of the handler, whose error holds what there was no memory for
    return torch.cat([in_halves(make, first, middle), in_halves(make, middle, last)])


@dataclass(frozen=True)
class _Encoder:
    """Encodes each prompt once, and keeps it in main memory until it has come for the last time.

    ``together`` are the prompts that each one is encoded with: always the same ones, for the same bits. ``left`` says
    how often each is still to come.
    """

    model: Diffusion
    guard: AppliedGuard | None
    together: Mapping[str, tuple[str, ...]]
    left: Counter[str]
    encoded: dict[str, Tensor] = field(default_factory=dict)

    def next(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, tokens, width] of a batch of prompts."""
        for new in dict.fromkeys(self.together[prompt] for prompt in prompts if prompt not in self.encoded):
            guard = self.guard
            rows = (self.model.encode_prompts(new) if guard is None else guard.encode(self.model, new)).cpu().split(1)
            self.encoded.update((one, row.clone()) for one, row in zip(new, rows, strict=True) if self.left[one])
        embeddings = torch.cat([self.encoded[prompt] for prompt in prompts])
        self.left.subtract(prompts)
        for prompt in set(prompts):
            if not self.left[prompt]:
                del self.encoded[prompt]
        return embeddings


def _encoded_together(batches: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return for each prompt those that come with it in the batch in which it comes for the first time."""
    found: dict[str, tuple[str, ...]] = {}
    for prompts in batches:
        new = tuple(dict.fromkeys(prompt for prompt in prompts if prompt not in found))
        found |= dict.fromkeys(new, new)
    return found


def _too_little_memory(images: int, size: str) -> str:
    if images == 1:
        return f"too little memory to sample an image of {size}"
    return f"too little memory to sample {images} images of {size} at once: choose a smaller batch size"


def _batches(rows: Sequence[PromptRow], batch_size: int) -> list[list[int]]:
    """Return the places of the rows in batches of one image size each."""
    sizes: dict[tuple[int | None, int | None], list[int]] = {}
    for place, row in enumerate(rows):
        sizes.setdefault((row.height, row.width), []).append(place)
    groups = [sizes[size] for size in sorted(sizes, key=str)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def sample(
    model: Diffusion | DiffusionPipeline | str | Path,
    prompts: PromptSet | str | Path,
    out: str | Path,
    *,
    ema: bool | None = None,
    **settings: Any,
) -> ImageSet:
    """Sample a prompt set into a folder, with a progress bar, and return all images of the folder.

    Run again, it samples only the missing images; see ``iter_sample``. ``model`` may be anything that ``load`` takes,
    with ``ema`` as there; a loaded pipeline is used as it is. ``prompts`` may be the name of a set or a file.
    ``settings`` are those of ``Sampling``: steps, guidance, scheduler, eta, batch_size, and a guard that ``find_guard``
    returns. Raises RequestError when a setting is out of range or unknown.
    """
    sampling = check_settings(Sampling, settings)
    found = prompts if isinstance(prompts, PromptSet) else find_prompts(str(prompts))
    if isinstance(model, DiffusionPipeline):
        model = Diffusion.from_pipeline(model)
    loaded = model if isinstance(model, Diffusion) else load(model, ema=ema)
    for _ in progress(iter_sample(loaded, found, out, sampling), f"sampling {found.name}", len(found.rows)):
        pass
    return read_images(out, setting="out")


def iter_sample(model: Diffusion, prompts: PromptSet, out: str | Path, sampling: Sampling = DEFAULT) -> Iterator[Path]:
    """Sample a prompt set into a folder, yielding each image's file as soon as it is written.

    Images are named by their place in the set; ``manifest.jsonl`` gets a line for each, with its row and SHA-256.
    Run again with the same model, prompts and settings, it samples only what is missing or has changed since. Raises
    RequestError when the folder holds images of another model, prompt set or setting, and for a sexual prompt that
    mentions minors, and where another process samples into it. Raises EraseError at the end when every image is of one
    colour.

    Where Accelerate has started several processes, they share the batches, and each yields the images that it makes.
    When all have finished, the folder is as one process would have made it.
    """
    out = Path(out)
    if any(row.sexual_with_minors for row in prompts.rows):
        raise RequestError("prompts", prompts.name, DROPPED)
    make_scheduler(model, sampling.scheduler, sampling.steps)
    with held(out):
        yield from _sample_missing(model, prompts, out, sampling)


def _sample_missing(model: Diffusion, prompts: PromptSet, out: Path, sampling: Sampling) -> Iterator[Path]:
    """Sample what is missing in a folder, yielding each image's file."""
    _start(model, prompts, out, sampling)
    state = processes()
    done = {line["image"] for line in read_manifest(out, setting="out")}
    state.wait_for_everyone()  # before anybody writes a line that somebody has not read yet
    missing = [place for place in range(len(prompts.rows)) if image_name(place) not in done]
    share = (state.process_index, state.num_processes)
    with (out / manifest_name(*share)).open("a", encoding="utf-8") as stream:
        for place, image in sample_images(model, prompts.rows, sampling, places=missing, share=share):
            file = out / image_name(place)
            with atomic_write(file, sync=False) as partial:  # the manifest has its checksum
                Image.fromarray(image).save(partial, format="PNG")
            stream.write(manifest_line(file, prompts.rows[place]))
            stream.flush()
            yield file
    state.wait_for_everyone()
    if state.num_processes > 1 and state.is_main_process:
        merge_manifests(out, prompts.rows)
    state.wait_for_everyone()
    check_drawn([out / image_name(place) for place in range(len(prompts.rows))])


def _start(model: Diffusion, prompts: PromptSet, out: Path, sampling: Sampling) -> None:
    """Write the settings into the folder, or check that they are the same; merge what killed processes left."""
    told = made_from(model, prompts, sampling)
    same_for_all("model", model.source, told)
    about = out / SETTINGS
    if about.exists() and _known(about) != told:
        raise RequestError("out", out, "holds images of another model, prompt set or setting; choose another folder")
    state = processes()
    if state.is_main_process:
        with atomic_write(about) as partial:
            partial.write_text(json.dumps(told, indent=1), encoding="utf-8")
        merge_manifests(out, prompts.rows)
    state.wait_for_everyone()


def _known(file: Path) -> Any:
    """Return the settings in a folder; None, which no settings are, for a file that is damaged."""
    try:
        return read_json(file)
    except ValueError:
        return None


def cut_note(model: Diffusion, prompts: Sequence[str]) -> str:
    """Say how many prompts are longer than the model reads; where none is, an empty text."""
    count = model.cut_prompts(prompts)
    if not count:
        return ""
    which = "prompt has" if count == 1 else "prompts have"
    return f"{count:,} {which} more than {model.tokenizer.model_max_length} tokens: what is behind them is cut off"


def made_from(model: Diffusion, prompts: PromptSet, sampling: Sampling) -> dict[str, Any]:
    """Return all that the images of a prompt set depend on, as it is read back from JSON."""
    told = {
        "unet": weights_hash(model.unet),
        **model.besides_unet(row.prompt for row in prompts.rows),
        "prompts": _rows_hash(prompts.rows),
        "sampler": sampling.scheduler or SAMPLER,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "eta": sampling.eta,
        **({} if sampling.guard is None else {"guard": str(sampling.guard)}),
    }
    found: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return found


def _rows_hash(rows: Sequence[PromptRow]) -> str:
    """Return the SHA-256 over what makes the images and over their labels."""
    names = ("prompt", "seed", "guidance", "width", "height", "object", "style")
    told = (f"PromptRow({', '.join(f'{name}={getattr(row, name)!r}' for name in names)})" for row in rows)
    return hashlib.sha256(f"({', '.join(told)}{',' * (len(rows) == 1)})".encode()).hexdigest()
