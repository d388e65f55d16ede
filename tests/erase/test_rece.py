"""RECE: UCE, then rounds against the tokens that would bring the concept back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from erase_concept import masks
from erase_concept.closed_form import concept_tokens, matrices
from erase_concept.data import ForgetRetain
from erase_concept.make_data import make_data
from erase_concept.methods.rece import RECESettings, rece, regained
from erase_concept.methods.uce import UCESettings, uce
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    return make_data(tiny, square, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())


@pytest.mark.parametrize("round_tokens", ["all", "name-to-end"])
def test_equals_a_transcription_in_numpy(tiny: Diffusion, data: ForgetRetain, round_tokens: str) -> None:
    model = tiny.with_components(unet=tiny.unet.double())
    rounds = {"round_preserve_scale": 0.7, "round_ridge": 0.4, "round_tokens": round_tokens}
    config = RECESettings(epochs=2, regular_scale=0.05, ridge=0.2, erase_scale=1.5, preserve_scale=0.3, **rounds)
    base = {name: weight.numpy().copy() for name, weight in matrices(model.unet).items()}
    kept = data.retain.flatten(0, 1).double().numpy()
    # "a square" and "a circle" have their last letter at 7, "one square" and "one circle" at 9.
    spans = {"all": (0, 0), "name-to-end": (7, 9)}

    def paired(prompts: Tensor, first: tuple[int, int]) -> np.ndarray:
        return torch.cat([prompts[0, first[0] :], prompts[1, first[1] :]]).double().numpy()

    now = {name: value.copy() for name, value in base.items()}
    for turn in range(3):
        places = spans[round_tokens if turn else "name-to-end"]
        preserve, ridge = (0.7, 0.4) if turn else (0.3, 0.2)
        tokens, u = paired(data.forget, places), paired(data.remap[0], places)
        if turn:
            inverse = np.linalg.inv(0.05 * np.eye(16) + sum(w.T @ w for w in now.values()))
            tokens = (inverse @ sum(now[name].T @ base[name] for name in base) @ tokens.T).T
        right = 1.5 * tokens.T @ tokens + preserve * kept.T @ kept + ridge * np.eye(16)
        for name, w in now.items():
            left = 1.5 * (w @ u.T) @ tokens + preserve * (w @ kept.T) @ kept + ridge * w
            now[name] = left @ np.linalg.inv(right)
    records = list(rece(model, data, None, config, seed=0))
    assert [(record.step, record.steps) for record in records] == [(1, 3), (2, 3), (3, 3)]
    for name, weight in matrices(model.unet).items():
        np.testing.assert_allclose(weight.numpy(), now[name], rtol=1e-6, atol=1e-9)


def test_regained_tokens_are_the_minimiser_and_bring_the_concept_back(tiny: Diffusion, data: ForgetRetain) -> None:
    model = tiny.with_components(unet=copy.deepcopy(tiny.unet).double())
    base = {name: weight.detach().clone() for name, weight in matrices(model.unet).items()}
    concept, _ = concept_tokens(model, data, "name-to-end")
    list(uce(model, data, None, UCESettings(), seed=0))
    now = matrices(model.unet)

    def missed(tokens: torch.Tensor, regular_scale: float = 0.0) -> torch.Tensor:
        differences = [(now[name] @ tokens.T - base[name] @ concept.double().T).square().sum() for name in base]
        return torch.stack(differences).sum() + regular_scale * tokens.square().sum()

    found = regained(model, base, concept, 1e-3).requires_grad_()
    missed(found, 1e-3).backward()
    start = torch.zeros_like(found).requires_grad_()
    missed(start, 1e-3).backward()
    assert found.grad is not None
    assert start.grad is not None
    assert found.grad.norm() < 1e-8 * start.grad.norm()
    assert missed(found.detach()) < 0.1 * missed(concept.double())


def test_without_an_edit_nothing_has_to_be_regained(tiny: Diffusion, data: ForgetRetain) -> None:
    concept, _ = concept_tokens(tiny, data, "name-to-end")
    base = {name: weight.detach().double() for name, weight in matrices(tiny.unet).items()}
    torch.testing.assert_close(regained(tiny, base, concept, 1e-12), concept.double(), rtol=1e-4, atol=1e-4)


def test_every_round_keeps_to_the_mask(family: Diffusion, square: Concept) -> None:
    data = make_data(family, square, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    before = {name: p.clone() for name, p in family.unet.named_parameters()}
    mask = masks.random(family.unet, 0.5, seed=4)
    losses = [record.loss for record in rece(family, data, mask, RECESettings(epochs=2), seed=0)]
    assert all(np.isfinite(losses))
    for name, p in family.unet.named_parameters():
        moved = p.view(torch.int32) != before[name].view(torch.int32)
        assert not (moved & ~mask.dense(name)).any()
        assert bool(moved.any()) == (name in matrices(family.unet))


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("regular_scale", 0.0), ("ridge", -1.0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        RECESettings(**{name: value})
