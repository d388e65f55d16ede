"""Make what a method learns from, once: sample latents from the model itself, or encode folders of images.

The VAE and the text encoders are not needed again afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.image_folders import check_images, hashes_of_images, image_files
from erase_concept.latents_cache import LatentsCache, cache_folder
from erase_concept.methods import METHODS
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.pictures import read_picture
from erase_concept.pipelines.processes import from_main, gathered, processes, same_for_all
from erase_concept.pipelines.progress import progress
from erase_concept.pipelines.sample import SCHEDULERS, Sampling, in_halves, sample_latents
from erase_concept.pipelines.signals import finish_first
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.minors import sexual_with_minors
from erase_concept.recipe import DataRecipe, Recipe, in_low_precision
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.tokens import name_spans
from erase_concept.training.loop import Training

PARTS = ("forget", "anchor", "retain")
BATCH = 16  # rows at once, where there is the memory

Rows = tuple[Tensor, Tensor]  # latents [n, 4, h, w], and the numbers of their prompts int64 [n]


def cached_data(recipe: Recipe, model: Diffusion, base_hash: str, file: Path) -> ForgetRetain:
    """Return the recipe's data from a file; if there is none yet, make them and keep them there.

    ``base_hash`` is that of the model's UNet. Raises RequestError when the file was made from something else.
    """
    concept = recipe.concept
    besides = model.besides_unet((*concept.forget_prompts, *concept.anchor_prompts, *concept.retain_prompts))
    key = data_key(recipe, base_hash, besides)
    same_for_all("model", recipe.model, key)

    def read() -> ForgetRetain | None:
        found = ForgetRetain.load(file, key)
        if found is None and file.exists():
            allowed = f"has changed since {file} was made from it; choose another folder"
            raise RequestError("model", recipe.model, allowed)
        return found

    data = from_main(read)
    if data is None:
        data = make_data_for(recipe, model, base_hash)
        if processes().is_main_process:
            data.save(file, key)
    return data


def data_key(recipe: Recipe, base_hash: str, besides: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 over all that the recipe's data depend on, the images in its folders included.

    ``base_hash`` is that of the model's UNet, and ``besides`` what ``Diffusion.besides_unet`` returns.
    """
    counted = asdict(recipe.data) | dict.fromkeys({*PARTS} - {*recipe.data_parts}, 0) | hashes_of_images(recipe)
    parts: list[Any] = [base_hash, besides or {}, recipe.concept.to_dict(), counted, recipe.seed]
    if in_low_precision(recipe):
        parts.append("bf16")
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def check_data(recipe: Recipe) -> None:
    """Raise RequestError for data that cannot be made, or from which the recipe's method cannot learn."""
    METHODS.find(recipe.method).check(recipe)
    _check_minors(recipe)
    if recipe.data.scheduler not in (None, *SCHEDULERS):
        raise RequestError("data.scheduler", recipe.data.scheduler, f"allowed: {', '.join(SCHEDULERS)}")
    if recipe.data.eta and recipe.data.scheduler != "DDIMScheduler":
        raise RequestError("data.eta", recipe.data.eta, "is a setting of DDIM: data.scheduler must be DDIMScheduler")
    check_images(recipe)


def _check_minors(recipe: Recipe) -> None:
    """Raise RequestError for a sexual concept that mentions minors where pictures would be made or learnt from.

    A closed form needs none: with it such a concept can be erased.
    """
    trained = isinstance(recipe.settings, Training) and METHODS.find(recipe.method).memory(recipe.settings)
    if not recipe.data_parts and not trained:
        return
    for one in recipe.concept.parts:
        prompts = (*one.forget_prompts, *one.anchor_prompts, *one.retain_prompts)
        if any(sexual_with_minors(prompt) for prompt in prompts) or sexual_with_minors(one.name, (one.kind,)):
            what = "is sexual and mentions minors, of which no picture is ever made"
            raise RequestError("concept", one.name, f"{what}: take a method that needs no pictures, such as uce")


def make_data_for(recipe: Recipe, model: Diffusion, base_hash: str | None = None) -> ForgetRetain:
    """Make the recipe's data with the recipe's seed. Several processes share the sampling, and all get all of it.

    With the hash of the model's UNet, latents are taken from those that were sampled before, and kept for later.
    """
    seed, folder = stage_seed(recipe.seed, "data"), cache_folder()
    cache = LatentsCache(folder, base_hash) if folder and base_hash else None
    return make_data(model, recipe.concept, recipe.data, seed=seed, parts=recipe.data_parts, cache=cache)


def make_data(
    model: Diffusion,
    concept: Concept,
    settings: DataRecipe,
    *,
    seed: int,
    parts: Collection[str] = PARTS,
    cache: LatentsCache | None = None,
) -> ForgetRetain:
    """Make the named parts of the data; of the others there are no rows.

    The prompts take turns in an order drawn from the seed; an image gets prompts about what it shows. When several
    concepts are erased together, each has as many forget and anchor rows as one alone, and its share of the retain
    rows. Raises RequestError when a folder has no images, or not in the order that ``image_files`` asks for, or the
    UNet cannot halve images of that size as often as it must.
    """
    maker = _Maker(model, concept, settings, seed, parts, cache)
    forgotten = maker.forgotten
    rows = {part: _joined(maker.rows(part)) for part in PARTS}
    names = min(len(prompts.remapped) for prompts in forgotten)  # that the prompts of all concepts can become
    return ForgetRetain(
        **{f"{part}_latents": latents for part, (latents, _) in rows.items()},
        **{f"{part}_which": which for part, (_, which) in rows.items()},
        forget=torch.cat([prompts.embedded for prompts in forgotten]),
        remap=torch.cat([prompts.remapped[:names] for prompts in forgotten], dim=1),
        retain=maker.retain,
        uncond=maker.uncond,
        forget_spans=torch.cat([prompts.spans for prompts in forgotten]),
        anchor_spans=torch.cat([prompts.anchor_spans for prompts in forgotten]),
        forget_parts=torch.cat([torch.full((len(prompts.embedded),), i) for i, prompts in enumerate(forgotten)]),
        forget_ids=model.token_ids(concept.forget_prompts)[0].cpu(),
        anchor_ids=torch.cat([prompts.anchor_ids for prompts in forgotten]),
        retain_ids=model.token_ids(concept.retain_prompts)[0].cpu(),
        flip=torch.tensor(settings.flip),
    )


def _joined(rows: Sequence[Rows]) -> Rows:
    latents, which = zip(*rows, strict=True)
    return torch.cat(latents), torch.cat(which)


class _Forgotten:
    """The forget prompts of one concept and what they become, embedded, and where they name it."""

    def __init__(self, model: Diffusion, concept: Concept) -> None:
        # Prompts that stand as they are name nothing: their spans are all of their words.
        names = [""] * len(concept.prompts) or [name for name in concept.names for _ in concept.templates]
        others = (name for name in dict.fromkeys(concept.retain) if name != concept.anchor)
        becomes = [concept.anchor_prompts, *map(concept.remapped_to, others)]
        self.embedded = _embed(model, concept.forget_prompts)
        self.spans = name_spans(model, concept.forget_prompts, names)
        self.remapped = torch.stack([_embed(model, prompts) for prompts in becomes])
        self.anchor_spans = name_spans(model, concept.anchor_prompts, [concept.anchor] * len(names))
        self.anchor_ids = model.token_ids(concept.anchor_prompts)[0].cpu()


@dataclass(frozen=True)
class _Maker:
    """Makes the rows of each part of the data."""

    model: Diffusion
    concept: Concept
    settings: DataRecipe
    seed: int
    parts: Collection[str]
    cache: LatentsCache | None

    def rows(self, part: str) -> list[Rows]:
        """Return the rows of a part, of one concept after the other."""
        return {"forget": self._forget, "anchor": self._anchor, "retain": self._retain}[part]()

    @cached_property
    def forgotten(self) -> list[_Forgotten]:
        """The forget prompts of each concept."""
        return [_Forgotten(self.model, part) for part in self.concept.parts]

    @cached_property
    def retain(self) -> Tensor:
        """The embeddings of the retain prompts, of all concepts together."""
        return _embed(self.model, tuple(self._retain_places))

    @cached_property
    def uncond(self) -> Tensor:
        """The embedding of the empty prompt."""
        return self.model.encode_uncond().cpu()

    @cached_property
    def size(self) -> int:
        """The side of the images in pixels."""
        size = self.settings.size or self.model.size
        unit = self.model.factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        if size % unit:
            raise RequestError("data.size", size, f"must be a multiple of {unit}")
        return size

    @cached_property
    def _retain_places(self) -> dict[str, int]:
        return {prompt: place for place, prompt in enumerate(self.concept.retain_prompts)}

    @cached_property
    def _seeds(self) -> list[int]:
        """The seed of each concept's rows."""
        if not self.concept.combined:
            return [self.seed]
        return [stage_seed(self.seed, "concept", part.name) for part in self.concept.parts]

    @cached_property
    def _starts(self) -> list[int]:
        """The number of each concept's first prompt: they are numbered on behind those of the one before."""
        return [sum(len(other.embedded) for other in self.forgotten[:i]) for i in range(len(self.forgotten))]

    def _count(self, part: str) -> int:
        count: int = getattr(self.settings, part)
        return count if part in self.parts else 0

    def _forget(self) -> list[Rows]:
        folder = self.settings.forget_images
        shown = {} if folder is None else image_files(folder, self.concept, part="forget")
        found = []
        for concept, prompts, seed, start in self._each():
            files = {file: name for file, name in shown.items() if name == concept.name}
            if folder is None and concept.images:
                files = image_files(Path(concept.images), concept, part="forget", setting="concept")
            if files:
                own = [concept.forget_prompts.index(prompt) for prompt in concept.prompts_for(concept.name)]
                latents, which = self._encoded("forget", files, {concept.name: own}, seed)
            else:
                latents, which = self._sampled("forget", prompts.embedded, self._count("forget"), seed)
            found.append((latents, which + start))
        return found

    def _anchor(self) -> list[Rows]:
        found = []
        for _, prompts, seed, start in self._each():
            latents, which = self._sampled("anchor", prompts.remapped[0], self._count("anchor"), seed)
            found.append((latents, which + start))
        return found

    def _retain(self) -> list[Rows]:
        concepts, places = self.concept.parts, self._retain_places
        if (folder := self.settings.retain_images) is not None:
            captions = {name: [places[p] for p in one.prompts_for(name)] for one in concepts for name in one.retain}
            files = image_files(folder, self.concept, part="retain")
            return [self._encoded("retain", files, captions, self.seed)]
        found = []
        total = self._count("retain")
        for number, (concept, seed) in enumerate(zip(concepts, self._seeds, strict=True)):
            own = torch.tensor([places[prompt] for prompt in concept.retain_prompts])
            share = total // len(concepts) + (number < total % len(concepts))
            latents, which = self._sampled("retain", self.retain[own], share, seed)
            found.append((latents, own[which]))
        return found

    def _each(self) -> list[tuple[Concept, _Forgotten, int, int]]:
        return list(zip(self.concept.parts, self.forgotten, self._seeds, self._starts, strict=True))

    def _sampled(self, part: str, embeddings: Tensor, count: int, seed: int) -> Rows:
        """Sample latents, which are the data as they are: decoding and encoding them would only blur them."""
        which = draw(len(embeddings), count, stage_generator(seed, part, "prompts"))
        seeds = [stage_seed(seed, part, row) for row in range(count)]
        side = self.size // self.model.factor
        starts, own = range(0, count, BATCH), dict[int, Tensor]()
        mine = starts[processes().process_index :: processes().num_processes]
        for i in progress(mine, f"sampling: {part}", len(mine)):
            with finish_first():
                own[i] = self._batch(embeddings[which[i : i + BATCH]], seeds[i : i + BATCH])
        found = {i: latents for one in gathered(own) for i, latents in one.items()}
        none = torch.empty(0, self.model.unet.config.in_channels, side, side)
        return torch.cat([none, *(found[i] for i in starts)]), which

    def _batch(self, embeddings: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample the latents of some rows, or take them from those that were sampled before."""
        model, settings = self.model, self.settings
        sampling = Sampling(steps=settings.steps, scheduler=settings.scheduler, eta=settings.eta)

        def make(rows: slice) -> Tensor:
            own, uncond = (tensor.to(model.device) for tensor in (embeddings[rows], self.uncond))
            scales = [settings.guidance] * len(own)
            return sample_latents(model, own, uncond, seeds[rows], scales, sampling, size=(self.size, self.size)).cpu()

        if self.cache is None:
            return in_halves(make, 0, len(seeds))
        asked = {"embeddings": embeddings, "uncond": self.uncond, "seeds": seeds, "size": self.size}
        how = {name: getattr(settings, name) for name in ("steps", "scheduler", "eta", "guidance")}
        return self.cache.find_or_make(model, asked | how, lambda: in_halves(make, 0, len(seeds)))

    def _encoded(self, part: str, files: Mapping[Path, str], captions: Mapping[str, Sequence[int]], seed: int) -> Rows:
        """Encode images. Each gets one of the prompts that are captions of what it shows."""
        order, which = stage_generator(seed, part, "prompts"), torch.empty(len(files), dtype=torch.int64)
        for name in dict.fromkeys(files.values()):
            rows = [row for row, other in enumerate(files.values()) if other == name]
            own = torch.tensor(captions[name])
            which[rows] = own[draw(len(own), len(rows), order)]
        return _encode(self.model, list(files), stage_generator(seed, part, "posterior"), self.size), which


def _embed(model: Diffusion, prompts: Sequence[str]) -> Tensor:
    return torch.cat([model.encode_prompts(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]).cpu()


def _encode(model: Diffusion, files: list[Path], generator: torch.Generator, size: int) -> Tensor:
    """Encode image files to latents, a batch in memory at a time."""
    parts = []
    for i in range(0, len(files), BATCH):
        images = torch.stack([_read(file, size) for file in files[i : i + BATCH]])

        def make(rows: slice, images: Tensor = images) -> Tensor:
            return model.encode_images(images[rows], generator).cpu()

        parts.append(in_halves(make, 0, len(images)))
    return torch.cat(parts)


def _read(file: Path, size: int) -> Tensor:
    """Read an image as [3, size, size] in [-1, 1], its middle square."""
    fitted = ImageOps.fit(read_picture(file, setting="image"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1
