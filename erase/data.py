"""What an erasure learns from: latents of the concept and of everything to be retained, and embedded prompts.

Latents come from the model itself, sampled from the concept's prompts, or from a folder of images; either way they
are made once, and the VAE and the text encoder are not needed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import Sampling, sample_latents
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator, stage_seed

Remap = Literal["anchor", "random", "empty"]  # what a concept's prompt becomes
_BATCH = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Batch:
    """Noisy rows for one step: clean latents, noise and ``noisy`` [n, 4, h, w], time steps [n], embeddings."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    embeddings: Tensor
    remapped: Tensor  # what the forget prompts are remapped to; for retain rows the embeddings themselves


@dataclass(frozen=True, eq=False)
class ForgetRetain:
    """Forget and retain latents [n, 4, h, w], which prompt each was made from, and all prompts embedded.

    ``anchor_latents`` show the anchor and ``anchor_which`` are the places of the forget prompts that became theirs:
    with them the concept's prompt is remapped too where a picture is already on its way to the anchor. There may be
    none.
    Embeddings are [prompts, tokens, width]; ``remap`` is [names, prompts, tokens, width]: the forget prompts said of
    the anchor (first) and of each retained name. ``uncond`` is [1, tokens, width].
    ``forget_spans`` [prompts, 2] and ``remap_spans`` [names, prompts, 2] tell where in its tokens a prompt names what
    it is about: the first token, and the one behind the last. ``retain_lengths`` [prompts] counts tokens up to the end
    of each retain prompt, start and end included, padding not.
    ``forget_parts`` [prompts] numbers the concept that a forget prompt is of, where several are erased together.
    ``forget_ids`` int64 [prompts, tokens] are the forget prompts as the text encoder takes them, XL's first one.
    """

    forget_latents: Tensor
    forget_which: Tensor
    anchor_latents: Tensor
    anchor_which: Tensor
    retain_latents: Tensor
    retain_which: Tensor
    forget: Tensor
    remap: Tensor
    retain: Tensor
    uncond: Tensor
    forget_spans: Tensor
    remap_spans: Tensor
    retain_lengths: Tensor
    forget_parts: Tensor
    forget_ids: Tensor

    def draw_forget(
        self, size: int, generator: torch.Generator, of: Literal["both", "forget", "anchor"] = "both"
    ) -> Tensor:
        """Draw ``size`` numbers of forget rows, behind which the anchor rows are counted on, evenly of each concept."""
        rows = torch.arange(len(self.forget_latents) + len(self.anchor_latents))
        first = len(self.forget_latents)
        rows = {"both": rows, "forget": rows[:first], "anchor": rows[first:]}[of]
        return rows[draw_evenly(self.parts_of_rows[rows], size, generator)]

    @property
    def parts_of_rows(self) -> Tensor:
        """The number of the concept that each forget row is of, and behind these each anchor row."""
        return self.forget_parts[self.prompts_of_rows]

    @property
    def prompts_of_rows(self) -> Tensor:
        """The number of the prompt that each forget row is of, and behind these each anchor row."""
        return torch.cat([self.forget_which, self.anchor_which])

    def forget_batch(
        self, model: Diffusion, rows: Tensor, generator: torch.Generator, *, remap: Remap = "anchor"
    ) -> Batch:
        """Noise the given forget rows, numbered as ``draw_forget`` does.

        Remaps to the anchor, to the empty prompt, or each row to a random one of the retained names.
        """
        which = self.prompts_of_rows[rows]
        names = torch.zeros_like(which)
        if remap == "random":
            names = torch.randint(0, len(self.remap), which.shape, generator=generator)
        latents = torch.cat([self.forget_latents, self.anchor_latents])[rows]
        remapped = self.uncond.expand(len(rows), -1, -1) if remap == "empty" else self.remap[names, which]
        return _noised(model, latents, self.forget[which], remapped, generator)

    def retain_batch(self, model: Diffusion, rows: Tensor, generator: torch.Generator) -> Batch:
        """Noise the given retain rows."""
        embeddings = self.retain[self.retain_which[rows]]
        return _noised(model, self.retain_latents[rows], embeddings, embeddings, generator)

    def save(self, file: Path, fingerprint: str) -> None:
        """Write everything as safetensors, with a fingerprint of what it was made from."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        with atomic_write(file) as partial:
            save_file(tensors, partial, {"fingerprint": fingerprint})

    @classmethod
    def load(cls, file: Path, fingerprint: str) -> ForgetRetain | None:
        """Read what ``save`` wrote; None when there is no file or it was made from something else."""
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as tensors:
                if tensors.metadata().get("fingerprint") != fingerprint:
                    return None
                return cls(**{f.name: tensors.get_tensor(f.name) for f in fields(cls)})
        except (SafetensorError, OSError) as problem:
            raise RequestError("data", file, f"is damaged; delete it to make it again: {problem}") from None


def draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` row numbers below ``count``: without repetition as far as there are enough rows."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:size]


def draw_evenly(parts: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` row numbers, equally many of each part, and of random parts one more where that does not go up.

    ``parts`` [rows] are the numbers of the parts that the rows are of. Of a single part this is ``draw``.
    """
    present = parts.unique()
    if len(present) <= 1:
        return draw(len(parts), size, generator)
    share, more = divmod(size, len(present))
    counts = torch.full((len(present),), share)
    counts[draw(len(present), more, generator)] += 1
    drawn = []
    for part, count in zip(present, counts.tolist(), strict=True):
        own = (parts == part).nonzero().squeeze(1)
        drawn.append(own[draw(len(own), count, generator)])
    return torch.cat(drawn)


def _noised(
    model: Diffusion, latents: Tensor, embeddings: Tensor, remapped: Tensor, generator: torch.Generator
) -> Batch:
    """Draw noise and time steps on the CPU, so that they do not depend on the device, and move all to the model's."""
    noise = torch.randn(latents.shape, generator=generator)
    last = model.scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, last, (len(latents),), generator=generator)
    latents, noise, timesteps = (t.to(model.device) for t in (latents, noise, timesteps))
    noisy = model.add_noise(latents, noise, timesteps)
    return Batch(latents, noise, noisy, timesteps, embeddings.to(model.device), remapped.to(model.device))


def training_loss(model: Diffusion, batch: Batch) -> Tensor:
    """Return the mean squared error of the model's prediction for noisy rows: the loss that it was trained with."""
    predicted = model.predict(batch.noisy, batch.timesteps, batch.embeddings)
    return mse_loss(predicted, model.target(batch.latents, batch.noise, batch.timesteps))


def make_data(
    model: Diffusion,
    concept: Concept,
    *,
    forget: int,
    retain: int,
    anchor: int = 0,
    steps: int,
    guidance: float,
    seed: int,
    size: int | None = None,
    forget_images: Path | None = None,
    retain_images: Path | None = None,
) -> ForgetRetain:
    """Make the data: rows sampled in ``steps`` steps, or all images of the given folders, ``size`` pixels a side.

    The prompts take turns in an order drawn from the seed; an image gets prompts about what it shows. Of several
    concepts each has so many forget and anchor rows of its own, made as if it were erased alone but for its seed, and
    retains its share of the retain rows. Raises RequestError when a folder has no images or not in the order that
    ``image_files`` asks for, or the UNet cannot halve images of that size as often as it must.
    """
    size = size or model.size
    unit = model.factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if size % unit:
        raise RequestError("data.size", size, f"must be a multiple of {unit}")
    parts = concept.parts
    seeds = [stage_seed(seed, "concept", part.name) for part in parts] if concept.combined else [seed]
    empty = model.encode_uncond().cpu()
    retained = {prompt: place for place, prompt in enumerate(concept.retain_prompts)}
    kept = _embed(model, tuple(retained))

    def sampled(what: str, embeddings: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return latents, and of which of the embeddings each was made."""
        which = draw(len(embeddings), count, stage_generator(seed, what, "prompts"))
        row_seeds = [stage_seed(seed, what, row) for row in range(count)]
        return _sample(model, embeddings[which], empty, row_seeds, guidance, steps, size), which

    def encoded(
        what: str, files: Mapping[Path, str], captions: Mapping[str, list[int]], seed: int
    ) -> tuple[Tensor, ...]:
        """Return latents of images, and which prompt each gets, of those that are captions of what it shows."""
        order, which = stage_generator(seed, what, "prompts"), torch.empty(len(files), dtype=torch.int64)
        for name in dict.fromkeys(files.values()):
            rows = [row for row, other in enumerate(files.values()) if other == name]
            own = torch.tensor(captions[name])
            which[rows] = own[draw(len(own), len(rows), order)]
        return _encode(model, list(files), stage_generator(seed, what, "posterior"), size), which

    shown = {} if forget_images is None else image_files(forget_images, concept, part="forget")
    forgotten = [_Forgotten(model, part) for part in parts]
    rows: dict[str, list[tuple[Tensor, ...]]] = {"forget": [], "anchor": [], "retain": []}
    for number, (part, own, prompts) in enumerate(zip(parts, seeds, forgotten, strict=True)):
        files = {file: name for file, name in shown.items() if name == part.name}
        if forget_images is None and part.images:
            files = image_files(Path(part.images), part, part="forget", argument="--concept")
        if not files:
            rows["forget"].append(sampled("forget", prompts.embedded, forget, own))
        else:
            captions = {part.name: [part.forget_prompts.index(prompt) for prompt in part.prompts_for(part.name)]}
            rows["forget"].append(encoded("forget", files, captions, own))
        rows["anchor"].append(sampled("anchor", prompts.remapped[0], anchor, own))
        if retain_images is None:
            places = torch.tensor([retained[prompt] for prompt in part.retain_prompts])
            share = retain // len(parts) + (number < retain % len(parts))
            latents, which = sampled("retain", kept[places], share, own)
            rows["retain"].append((latents, places[which]))
    if retain_images is not None:
        captions = {name: [retained[p] for p in part.prompts_for(name)] for part in parts for name in part.retain}
        files = image_files(retain_images, concept, part="retain")
        rows["retain"].append(encoded("retain", files, captions, seed))
    # The prompts of each concept are counted on behind those of the one before it.
    starts = [sum(len(other.embedded) for other in forgotten[:number]) for number in range(len(parts))]
    for what in ("forget", "anchor"):
        rows[what] = [(latents, which + start) for (latents, which), start in zip(rows[what], starts, strict=True)]
    names = min(len(prompts.remapped) for prompts in forgotten)  # that the prompts of all concepts can become
    return ForgetRetain(
        **{f"{what}_latents": torch.cat([latents for latents, _ in some]) for what, some in rows.items()},
        **{f"{what}_which": torch.cat([which for _, which in some]) for what, some in rows.items()},
        forget=torch.cat([prompts.embedded for prompts in forgotten]),
        remap=torch.cat([prompts.remapped[:names] for prompts in forgotten], dim=1),
        retain=kept,
        uncond=empty,
        forget_spans=torch.cat([prompts.spans for prompts in forgotten]),
        remap_spans=torch.cat([prompts.remapped_spans[:names] for prompts in forgotten], dim=1),
        retain_lengths=torch.tensor([len(_ids(model, prompt)) for prompt in retained]),
        forget_parts=torch.cat([torch.full((len(prompts.embedded),), i) for i, prompts in enumerate(forgotten)]),
        forget_ids=model.token_ids(concept.forget_prompts)[0].cpu(),
    )


def own_tokens(model: Diffusion, concept: Concept) -> Tensor:
    """Return the tokens of a concept's prompts that no prompt of its anchor or to be retained has, int64 [n].

    Raises RequestError where there is none, and for a model with two text encoders.
    """
    if model.text_encoder_2 is not None:
        raise RequestError("--scope", "text-encoder", f"{model.source} has two text encoders; choose another scope")
    others = [*concept.retain_prompts, *(prompt for part in concept.parts for prompt in part.remapped_to(part.anchor))]
    own, shared = ({n for prompt in some for n in _ids(model, prompt)} for some in (concept.forget_prompts, others))
    own -= shared | {*_ids(model, "")}
    if not own:
        names = ", ".join(concept.names)
        raise RequestError("--concept", names, "has no word that is not in prompts of its anchor or to be retained")
    return torch.tensor(sorted(own))


class _Forgotten:
    """A simple concept's forget prompts and what they become, embedded, with the places of what they are about."""

    def __init__(self, model: Diffusion, concept: Concept) -> None:
        # Prompts that stand as they are name nothing: all of their words are what they are about.
        names = [""] * len(concept.prompts) or [name for name in concept.names for _ in concept.templates]
        becomes = tuple(dict.fromkeys((concept.anchor, *concept.retain)))
        remapped = [(concept.remapped_to(name), [name] * len(names)) for name in becomes]
        self.embedded = _embed(model, concept.forget_prompts)
        self.spans = _spans(model, concept.forget_prompts, names)
        self.remapped = torch.stack([_embed(model, prompts) for prompts, _ in remapped])
        self.remapped_spans = torch.stack([_spans(model, *both) for both in remapped])


def _embed(model: Diffusion, prompts: Sequence[str]) -> Tensor:
    return torch.cat([model.encode_prompts(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]).cpu()


def _ids(model: Diffusion, prompt: str) -> list[int]:
    """Return a prompt's tokens, from the start token to the end token."""
    ids: list[int] = model.tokenizer(prompt, truncation=True, max_length=model.tokenizer.model_max_length).input_ids
    return ids


def _spans(model: Diffusion, prompts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return [prompts, 2]: where the name's tokens begin in each prompt, for the last time, and where they end.

    Where it is not found, as when the name is empty or a word joins on to it, all words are what it is about.
    """
    spans = []
    for prompt, name in zip(prompts, names, strict=True):
        ids, wanted = _ids(model, prompt), _ids(model, name)[1:-1]
        found = [i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
        spans.append((found[-1], found[-1] + len(wanted)) if found else (1, max(len(ids) - 1, 2)))
    return torch.tensor(spans)


def _sample(
    model: Diffusion, embeddings: Tensor, empty: Tensor, seeds: list[int], guidance: float, steps: int, size: int
) -> Tensor:
    """Sample latents, which are the data as they are: decoding them to images and back would only blur them."""
    side = size // model.factor
    parts = [torch.empty(0, model.unet.config.in_channels, side, side)]
    for i in range(0, len(seeds), _BATCH):
        batch = seeds[i : i + _BATCH]
        rows = (embeddings[i : i + _BATCH].to(model.device), empty.to(model.device))
        scales = [guidance] * len(batch)
        parts.append(sample_latents(model, *rows, batch, scales, Sampling(steps=steps), size=(size, size)).cpu())
    return torch.cat(parts)


def image_files(folder: Path, concept: Concept, *, part: str, argument: str = "") -> dict[Path, str]:
    """Return the images of a folder, in the order of their names, with the name of what each shows.

    Images to forget lie in the folder itself and show the concept; of several concepts, in a folder named after each.
    Images to retain lie in folders named after what is retained (``dog/1.png``), or in the folder itself where the
    concept retains one name alone. Raises RequestError when there are none, of some concept to forget none, or a
    folder's name is not retained.
    """
    argument = argument or f"--{part}-images"
    if not folder.is_dir():
        raise RequestError(argument, folder, "no such folder")
    retained = tuple(dict.fromkeys(name for one in concept.parts for name in one.retain))
    names = tuple(one.name for one in concept.parts) if part == "forget" else retained
    if not names:
        raise RequestError(argument, folder, "cannot be used: the concept retains no name that an image could show")
    if len(names) == 1:
        found = dict.fromkeys(_images_in(folder), names[0])
    else:
        inside = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        strange = [entry.name for entry in inside if entry.name not in names]
        if strange or _images_in(folder):
            what = f"folder {strange[0]!r}" if strange else "images that say not what they show"
            raise RequestError(argument, folder, f"has a {what}; needed: a folder each for {', '.join(names)}")
        found = {file: entry.name for entry in inside for file in _images_in(entry)}
        if part == "forget" and (missing := sorted({*names} - {*found.values()})):
            raise RequestError(argument, folder, f"has no image of {', '.join(missing)}, in a folder of that name")
    if not found:
        raise RequestError(argument, folder, f"holds no image ({', '.join(_SUFFIXES)})")
    return found


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)


def _encode(model: Diffusion, files: list[Path], generator: torch.Generator, size: int) -> Tensor:
    """Encode image files to latents, a batch in memory at a time."""
    parts = []
    for i in range(0, len(files), _BATCH):
        images = torch.stack([_read(file, size) for file in files[i : i + _BATCH]])
        parts.append(model.encode_images(images, generator).cpu())
    return torch.cat(parts)


def _read(file: Path, size: int) -> Tensor:
    """Read an image as [3, size, size] in [-1, 1], its middle square."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as problem:
        raise RequestError("image", file, f"not readable: {problem}") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1
