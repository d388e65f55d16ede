"""Selective Amnesia's Fisher information, loss and update against plain transcriptions of its formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.make_data import make_data
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
        held = 0.5e-6 * torch.stack([(f * (p - q).square()).sum() for f, p, q in parts]).sum()
        assert (held > 0) == (step > 0)
        loss = forget + retain + held
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        terms = {"forget": forget.item(), "retain": retain.item(), "penalty": held.item()}
        assert records[step].terms == pytest.approx(terms, rel=10 * near)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


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
        config = SelectiveAmnesiaSettings(steps=10, batch_size=2, lr=1e-3, penalty=penalty, fisher_rows=4)
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
