"""Selective Amnesia's Fisher information, loss and update against plain transcriptions of its formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import Batch, ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.make_data import make_data
from erase_concept.methods import selective_amnesia as selective_amnesia_module
from erase_concept.methods.selective_amnesia import SelectiveAmnesiaSettings, fisher, selective_amnesia
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    """With rows of the concept, as a salient mask needs them: the method is to leave them alone."""
    return make_data(tiny, square, DataRecipe(forget=3, anchor=4, retain=6, steps=2, guidance=2.0), seed=1)


@pytest.mark.parametrize("surrogate", ["anchor", "noise"])
def test_two_steps_equal_the_formulas(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any, surrogate: str
) -> None:
    config = SelectiveAmnesiaSettings(
        steps=2,
        batch_size=3,
        lr=1e-2,
        penalty=1e-6,
        fisher_rows=4,
        surrogate=surrogate,
        fisher_unbiased=False,
        optimizer="adam",
        weight_decay=0.0,
    )
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet, base = copy.deepcopy(tiny.unet).requires_grad_(True), copy.deepcopy(tiny.unet)
    records = list(selective_amnesia(tiny, data, mask, config, seed=7))

    def retain_loss(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x, t, noise = noised(data.retain_latents[rows], generator)
        c = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        return (unet(x, t, c).sample - noise).square().mean()

    generator = stage_generator(7, "fisher")
    information = [torch.zeros_like(p) for p in unet.parameters()]
    for row in draw(6, 4, generator):
        bound = 1000 * retain_loss(row.repeat(3), generator)
        for f, g in zip(information, torch.autograd.grad(bound, list(unet.parameters())), strict=True):
            f += g.square() / 4
    shown, which = data.anchor_latents, data.anchor_which
    if surrogate == "noise":
        shown = 2 * torch.rand(6, 4, 8, 8, generator=stage_generator(7, "surrogate")) - 1
        which = torch.tensor([0, 1, 0, 1, 0, 1])
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-5, 1e-3)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(len(shown), 3, generator)
        x, t, noise = noised(shown[rows], generator)
        c = tiny.encode_prompts([("a square", "one square")[i] for i in which[rows]])
        forget = (unet(x, t, c).sample - noise).square().mean()
        retain = retain_loss(draw(6, 3, generator), generator)
        parts = zip(information, unet.parameters(), base.parameters(), strict=True)
        held = 1e-6 * torch.stack([(f * (p - q).square()).sum() for f, p, q in parts]).sum()
        assert (held > 0) == (step > 0)
        loss = forget + retain + held
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        terms = {"forget": forget.item(), "retain": retain.item(), "penalty": held.item()}
        assert records[step].terms == pytest.approx(terms, rel=10 * near)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_fisher_information_of_every_subset_of_time_steps_has_the_exact_mean(
    tiny: Diffusion, data: ForgetRetain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four time steps with one noise each: the mean over all draws of 2, of 3 and of 4 is (sum g)^2."""
    one = replace(data, retain_latents=data.retain_latents[:1], retain_which=data.retain_which[:1])
    tiny.scheduler.register_to_config(num_train_timesteps=4)
    tiny.scheduler.alphas_cumprod = torch.tensor([0.9, 0.6, 0.3, 0.1])
    noise = torch.randn(4, *one.retain_latents.shape[1:], generator=torch.Generator().manual_seed(0))
    taken = [*range(4)]

    def batch(self: Any, model: Any, rows: Any, generator: Any, *, timesteps: torch.Tensor) -> Batch:
        t, latents, prompts = timesteps, one.retain_latents, one.retain[one.retain_which]
        return Batch(latents, noise[t], model.add_noise(latents, noise[t], t), t, prompts, prompts)

    def drawn(count: int, size: int, generator: Any) -> torch.Tensor:
        return torch.tensor(taken) if count == 4 else draw(count, size, generator)

    monkeypatch.setattr(ForgetRetain, "retain_batch", batch)
    monkeypatch.setattr(selective_amnesia_module, "draw", drawn)
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda self, **_: self)  # cut off at 0, no single draw is unbiased
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    with torch.enable_grad():
        prompts = one.retain[one.retain_which]
        bounds = []
        for t in range(4):
            a = tiny.scheduler.alphas_cumprod[t]
            x = a.sqrt() * one.retain_latents + (1 - a).sqrt() * noise[t]
            bounds.append((unet(x, t, prompts).sample - noise[t]).square().mean())
        exact = [g.square() for g in torch.autograd.grad(sum(bounds), list(unet.parameters()))]
    for size in (2, 3, 4):
        config = SelectiveAmnesiaSettings(fisher_rows=1, fisher_steps=size, batch_size=5)
        found = []
        for subset in combinations(range(4), size):
            taken = list(subset)
            found.append(fisher(tiny, one, config, torch.Generator().manual_seed(0)))
        for (name, _), wanted in zip(unet.named_parameters(), exact, strict=True):
            mean = sum(each[name] for each in found) / len(found)
            assert torch.allclose(mean, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max())), (size, name)


def test_fisher_information_does_not_depend_on_the_batch_size(tiny: Diffusion, data: ForgetRetain) -> None:
    found = [
        fisher(tiny, data, SelectiveAmnesiaSettings(batch_size=n, fisher_rows=3), torch.Generator().manual_seed(0))
        for n in (1, 8)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_fisher_information_leaves_the_weights_alone(tiny: Diffusion, data: ForgetRetain) -> None:
    before = copy.deepcopy(tiny.unet.state_dict())
    config = SelectiveAmnesiaSettings(batch_size=2, fisher_rows=2)
    information = fisher(tiny, data, config, torch.Generator().manual_seed(0))
    assert all((f >= 0).all() and f.shape == before[name].shape for name, f in information.items())
    assert all(torch.equal(before[name], value) for name, value in tiny.unet.state_dict().items())


def test_a_larger_penalty_holds_the_weights_back(tiny: Diffusion, data: ForgetRetain) -> None:
    base = [p.detach().clone() for p in tiny.unet.parameters()]
    drifts = []
    for penalty in (0.0, 100.0):
        model = tiny.with_components(unet=copy.deepcopy(tiny.unet))
        config = SelectiveAmnesiaSettings(
            steps=10, batch_size=2, lr=1e-3, penalty=penalty, fisher_rows=6, fisher_steps=64, weight_decay=0.0
        )
        list(selective_amnesia(model, data, None, config, seed=7))
        drifts.append(sum(float((p - q).square().sum()) for p, q in zip(base, model.unet.parameters(), strict=True)))
    assert drifts[1] < 0.5 * drifts[0]


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(selective_amnesia, data, SelectiveAmnesiaSettings(fisher_rows=2))


def test_without_the_anchor_it_says_what_is_missing(tiny: Diffusion, data: ForgetRetain) -> None:
    bare = replace(data, anchor_latents=data.anchor_latents[:0], anchor_which=data.anchor_which[:0])
    with pytest.raises(RequestError, match=r"data\.anchor"):
        next(selective_amnesia(tiny, bare, None, SelectiveAmnesiaSettings(), seed=7))


@pytest.mark.parametrize(("name", "value"), [("penalty", -1.0), ("fisher_rows", 0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        SelectiveAmnesiaSettings(**{name: value})
