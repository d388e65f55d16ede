"""What a method learns from: latents of the concept and of what is retained, and embedded prompts, in batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.model import Diffusion

Remap = Literal["anchor", "random", "empty"]  # what a concept's prompt becomes


@dataclass(frozen=True, eq=False)
class Batch:
    """Noisy rows for one step: clean latents, noise and ``noisy`` [n, 4, h, w], time steps [n], embeddings."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    embeddings: Tensor
    remapped: Tensor  # the embeddings of what the forget prompts become; for retain rows their own


@dataclass(frozen=True, eq=False)
class ForgetRetain:
    """Latents [n, 4, h, w] of what is forgotten and retained, the prompt of each, and all prompts embedded.

    ``*_which`` int64 [n] are the numbers of the rows' prompts. ``anchor_latents`` show the anchor, and their prompts
    are the forget prompts that were said of it; there may be none. With them the concept's prompt is remapped also
    where a picture is already on its way to the anchor.
    Embeddings are [prompts, tokens, width]. ``remap`` [names, prompts, tokens, width] holds the forget prompts said of
    the anchor (first) and of each retained name. ``uncond`` [1, tokens, width] is the empty prompt.
    ``forget_spans`` and ``anchor_spans`` int64 [prompts, 2] say where a prompt names the concept, or the anchor: the
    first token, and the one behind the last.
    ``forget_parts`` int64 [prompts] numbers the concept of a forget prompt, where several are erased together.
    ``forget_ids``, ``anchor_ids`` and ``retain_ids`` int64 [prompts, tokens] are the tokens of the forget prompts, of
    what they become, and of the retained prompts, for the (first) text encoder.
    ``flip`` bool [] says that each row of a batch is mirrored or not, at random.
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
    anchor_spans: Tensor
    forget_parts: Tensor
    forget_ids: Tensor
    anchor_ids: Tensor
    retain_ids: Tensor
    flip: Tensor = field(default_factory=lambda: torch.tensor(False))

    def draw_forget(
        self, size: int, generator: torch.Generator, of: Literal["both", "forget", "anchor"] = "both"
    ) -> Tensor:
        """Draw ``size`` row numbers, evenly per concept. Anchor rows are numbered on behind the forget rows."""
        rows = torch.arange(len(self.forget_latents) + len(self.anchor_latents))
        first = len(self.forget_latents)
        rows = {"both": rows, "forget": rows[:first], "anchor": rows[first:]}[of]
        return rows[draw_evenly(self.parts_of_rows[rows], size, generator)]

    @property
    def parts_of_rows(self) -> Tensor:
        """The number of the concept of each forget row, and then of each anchor row."""
        return self.forget_parts[self.prompts_of_rows]

    @property
    def prompts_of_rows(self) -> Tensor:
        """The number of the prompt of each forget row, and then of each anchor row."""
        return torch.cat([self.forget_which, self.anchor_which])

    def forget_batch(
        self, model: Diffusion, rows: Tensor, generator: torch.Generator, *, remap: Remap = "anchor"
    ) -> Batch:
        """Noise the forget rows of these numbers, as ``draw_forget`` returns them.

        ``remap`` says what their prompts become: the anchor, the empty prompt, or for each row a random retained name.
        """
        which = self.prompts_of_rows[rows]
        names = torch.zeros_like(which)
        if remap == "random":
            names = torch.randint(0, len(self.remap), which.shape, generator=generator)
        latents = torch.cat([self.forget_latents, self.anchor_latents])[rows]
        remapped = self.uncond.expand(len(rows), -1, -1) if remap == "empty" else self.remap[names, which]
        return _noised(model, self._mirrored(latents, generator), self.forget[which], remapped, generator)

    def retain_batch(
        self, model: Diffusion, rows: Tensor, generator: torch.Generator, *, timesteps: Tensor | None = None
    ) -> Batch:
        """Noise the retain rows of these numbers, at random time steps unless some are given."""
        embeddings = self.retain[self.retain_which[rows]]
        latents = self._mirrored(self.retain_latents[rows], generator)
        return _noised(model, latents, embeddings, embeddings, generator, timesteps)

    def _mirrored(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror half of the rows from left to right, where ``flip`` says so. Mirrored latents show mirrored images."""
        if not self.flip:
            return latents
        mirrored = torch.rand(len(latents), generator=generator) < 0.5
        return torch.where(mirrored.view(-1, 1, 1, 1), latents.flip(-1), latents)

    def save(self, file: Path, fingerprint: str) -> None:
        """Write everything as safetensors, with a fingerprint of what it was made from."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        with atomic_write(file) as partial:
            save_tensors(tensors, partial, {"fingerprint": fingerprint})

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
    """Draw ``size`` row numbers below ``count``; a row repeats only when all have been drawn."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:size]


def draw_evenly(parts: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sample row numbers evenly per concept; leftover draws go to random concepts.

    ``parts`` int64 [rows] are the numbers of the rows' concepts. For a single concept this is ``draw``.
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
    model: Diffusion,
    latents: Tensor,
    embeddings: Tensor,
    remapped: Tensor,
    generator: torch.Generator,
    timesteps: Tensor | None = None,
) -> Batch:
    """Draw noise and time steps on the CPU, so that they do not depend on the device, and move all to the model."""
    noise = torch.randn(latents.shape, generator=generator)
    last = model.scheduler.config.num_train_timesteps
    if timesteps is None:
        timesteps = torch.randint(0, last, (len(latents),), generator=generator)
    latents, noise, timesteps = (t.to(model.device) for t in (latents, noise, timesteps))
    noisy = model.add_noise(latents, noise, timesteps)
    return Batch(latents, noise, noisy, timesteps, embeddings.to(model.device), remapped.to(model.device))


def training_loss(model: Diffusion, batch: Batch) -> Tensor:
    """Return the mean squared error of the model's prediction for noisy rows: the loss that it was trained with."""
    predicted = model.predict(batch.noisy, batch.timesteps, batch.embeddings)
    return mse_loss(predicted, model.target(batch.latents, batch.noise, batch.timesteps))
