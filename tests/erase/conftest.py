"""What the tests of methods share: data for the tiny model, formulas transcribed, and what holds for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain
from erase_concept.make_data import make_data
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.training.loop import Record


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    return make_data(tiny, square, DataRecipe(forget=4, retain=6, steps=2, guidance=2.0), seed=1)


@pytest.fixture
def noised() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Draw noise and time steps as a batch does, and return x_t from the scaled linear schedule's definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2

    def draw(latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        kept = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise, timesteps, noise

    return draw


@pytest.fixture
def adam() -> Callable[..., None]:
    """Take a step of Adam, numbered from 0, on weights of a mask; ``moments`` are a pair for each parameter."""

    @torch.no_grad()
    def update(unet: Any, gradients: Any, moments: Any, step: int, lr: float, mask: Mask) -> None:
        for (name, p), g, (m, v) in zip(unet.named_parameters(), gradients, moments, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            change = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p -= lr * change * mask.dense(name)

    return update


@pytest.fixture
def check_method(tiny: Diffusion, tmp_path: Path) -> Callable[..., None]:
    """Check what holds for every trained method: frozen weights stay, and a killed run goes on to the same bits."""

    def check(run: Any, data: ForgetRetain, config: Any, *, steps: int = 6, checkpoint_every: int = 2) -> None:
        """Expects six records in all, of which a checkpoint holds the first four when the fifth is there."""
        config = replace(config, steps=steps, batch_size=2, lr=1e-3, checkpoint_every=checkpoint_every)
        mask = masks.random(tiny.unet, 0.5, seed=4)
        whole, killed, again = (tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(3))
        list(run(whole, data, mask, config, seed=7))
        moved = 0
        for (name, before), after in zip(tiny.unet.named_parameters(), whole.unet.parameters(), strict=True):
            differs = before.view(torch.int32) != after.view(torch.int32)
            moved += int(differs.sum())
            assert not (differs & ~mask.dense(name)).any(), name
        assert moved
        file = tmp_path / "last.safetensors"
        running = run(killed, data, mask, config, seed=7, checkpoint=file)
        for event in running:
            if isinstance(event, Record) and event.step == 5:
                break
        running.close()
        records = [e for e in run(again, data, mask, config, seed=7, checkpoint=file) if isinstance(e, Record)]
        assert [record.step for record in records] == [5, 6]
        state = again.unet.state_dict()
        assert all(torch.equal(state[name], value) for name, value in whole.unet.state_dict().items())

    return check
