"""ESD's loss and update against a plain transcription of its formula and of DDIM."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.make_data import make_data
from erase_concept.methods import METHODS
from erase_concept.methods.esd import ESDSettings, esd, partway
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.training.loop import Record


def prompts_alone(model: Diffusion, concept: Concept) -> ForgetRetain:
    return make_data(model, concept, DataRecipe(steps=2, guidance=2.0), seed=1, parts=())


@pytest.mark.parametrize(("eta", "sampled_by"), [(0.0, "current"), (1.5, "current"), (1.5, "base")])
def test_two_steps_equal_the_formula(tiny: Diffusion, square: Concept, eta: float, sampled_by: str) -> None:
    sampling = {"start_guidance": 2.0, "sampling_steps": 5, "sampled_by": sampled_by}
    config = ESDSettings(steps=2, batch_size=3, lr=1e-2, eta=eta, **sampling)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet, base = copy.deepcopy(tiny.unet), copy.deepcopy(tiny.unet)
    data = prompts_alone(tiny, square)
    records = [event for event in esd(tiny, data, mask, config, seed=7) if isinstance(event, Record)]

    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    empty = tiny.encode_prompts([""]).expand(3, -1, -1)
    unet.requires_grad_(True)
    stops = []
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        concept = tiny.encode_prompts([["a square", "one square"][i] for i in draw(2, 3, generator)])
        stops.append(int(torch.randint(0, 5, (1,), generator=generator)))
        seeds = torch.randint(0, 2**62, (3,), generator=generator).tolist()
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        with torch.no_grad():
            for t in range(800, 800 - 200 * stops[-1], -200):
                sampler = unet if sampled_by == "current" else base
                without = sampler(x, t, empty).sample
                e = without + 2 * (sampler(x, t, concept).sample - without)
                clean = (x - (1 - kept[t]).sqrt() * e) / kept[t].sqrt()
                x = kept[t - 200].sqrt() * clean + (1 - kept[t - 200]).sqrt() * e
            t = 800 - 200 * stops[-1]
            without = base(x, t, empty).sample
            wanted = without - eta * (base(x, t, concept).sample - without)
        loss = (unet(x, t, concept).sample - wanted).square().mean()
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        assert records[step].terms == pytest.approx({"forget": loss.item()}, rel=near)
        if step == 0:
            gradients = torch.autograd.grad(loss, list(unet.parameters()))
            with torch.no_grad():
                for (name, p), g in zip(unet.named_parameters(), gradients, strict=True):
                    p -= 0.01 * g / (g.abs() + 1e-8) * mask.dense(name)  # Adam's first step
    assert max(stops) > 0  # some of it was sampled


@torch.no_grad()
def test_the_later_codes_latents_are_those_of_diffusers_own_pndm(tiny: Diffusion, square: Concept) -> None:
    data, config = prompts_alone(tiny, square), ESDSettings(sampling_steps=8, start_guidance=2.0)
    stops = set()
    for seed in range(4):
        x, times = partway(
            tiny, data, data.forget, config, torch.Generator().manual_seed(seed), scheduler="PNDMScheduler"
        )
        generator = torch.Generator().manual_seed(seed)
        stop = int(torch.randint(0, 8, (1,), generator=generator))
        seeds = torch.randint(0, 2**62, (2,), generator=generator).tolist()
        wanted = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(one)) for one in seeds])
        solver = PNDMScheduler.from_config(tiny.scheduler.config, skip_prk_steps=True)
        solver.set_timesteps(8)
        empty = tiny.encode_prompts([""]).expand(2, -1, -1)
        for t in solver.timesteps[:stop]:
            without = tiny.unet(wanted, t, empty).sample
            e = without + 2 * (tiny.unet(wanted, t, data.forget).sample - without)
            wanted = solver.step(e, t, wanted).prev_sample
        torch.testing.assert_close(x, wanted)
        assert times.tolist() == [int(solver.timesteps[stop])] * 2
        stops.add(stop)
    assert len(stops) > 1


def test_before_the_first_of_the_sampling_steps_there_is_noise_alone(tiny: Diffusion, square: Concept) -> None:
    data = prompts_alone(tiny, square)
    config = ESDSettings(sampling_steps=1)
    x, t = partway(tiny, data, data.forget, config, torch.Generator().manual_seed(0))
    assert x.shape == (2, 4, 8, 8)
    assert t.tolist() == [0, 0]
    assert float(x.std()) == pytest.approx(1, abs=0.15)


def test_works_on_every_family(family: Diffusion, square: Concept) -> None:
    config = ESDSettings(steps=2, batch_size=2, lr=1e-3, sampling_steps=3)
    losses = [event.loss for event in esd(family, prompts_alone(family, square), None, config, seed=7)]
    assert all(loss > 0 for loss in losses)


def test_frozen_weights_stay_and_a_killed_run_goes_on(tiny: Diffusion, square: Concept, check_method: Any) -> None:
    check_method(esd, prompts_alone(tiny, square), ESDSettings(sampling_steps=4))


def test_three_names_three_scopes() -> None:
    found = {name: entry.scope for name, entry in METHODS.all().items() if name.startswith("esd-")}
    assert found == {"esd-x": "cross-attention", "esd-u": "noxattn", "esd-full": "full"}


@pytest.mark.parametrize(
    ("name", "value"), [("eta", -1.0), ("start_guidance", float("nan")), ("sampling_steps", 0), ("steps", 0)]
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        ESDSettings(**{name: value})
