"""The masked optimizer: torch's updates where the mask allows, not a bit changed elsewhere."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from erase_concept import mask as masks
from erase_concept.errors import RequestError
from erase_concept.mask import Mask, top_k
from erase_concept.optim import MaskedOptimizer


def module() -> nn.Module:
    """A small network with parameters of every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    """A loss that differs from step to step."""
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean() * (1 + step)


SETTINGS = list(itertools.product(["adam", "adamw"], [0.0, 0.1], [None, 0.5]))


@pytest.mark.parametrize(("name", "weight_decay", "max_grad_norm"), SETTINGS)
def test_frozen_weights_keep_every_bit_and_salient_ones_move(
    name: str, weight_decay: float, max_grad_norm: float | None
) -> None:
    net = module()
    before = copy.deepcopy(net)
    mask = masks.random(net, 0.3, seed=1)
    masked = MaskedOptimizer(net, mask, name, lr=0.1, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    for step in range(5):
        loss_of(net, step).backward()
        masked.step()
        for key, p in net.named_parameters():
            old = before.get_parameter(key)
            assert torch.equal(p[~mask.dense(key)].view(torch.int32), old[~mask.dense(key)].view(torch.int32))
            assert p.grad is None
    for key, p in net.named_parameters():
        assert bool((p != before.get_parameter(key))[mask.dense(key)].all())


@pytest.mark.parametrize(("name", "weight_decay", "max_grad_norm"), SETTINGS)
def test_without_a_mask_it_is_torchs_optimizer(name: str, weight_decay: float, max_grad_norm: float | None) -> None:
    net = module()
    other = copy.deepcopy(net)
    masked = MaskedOptimizer(net, None, name, lr=0.05, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    plain_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    plain = plain_class(other.parameters(), lr=0.05, weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(4):
        loss_of(net, step).backward()
        masked.step()
        loss_of(other, step).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
        plain.step()
        plain.zero_grad()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_salient_weight_moves_as_in_a_plain_transcription_of_adam() -> None:
    net = module()
    start = [p.detach().double().clone() for p in net.parameters()]
    mask = masks.random(net, 0.5, seed=2)
    gradient = [torch.autograd.grad(loss_of(net, 0), p)[0].double() for p in net.parameters()]
    masked = MaskedOptimizer(net, mask, "adam", lr=0.01)
    loss_of(net, 0).backward()
    masked.step()
    for (key, p), old, g in zip(net.named_parameters(), start, gradient, strict=True):
        # Adam's first step: both moments are debiased to g and g^2.
        expected = torch.where(mask.dense(key), old - 0.01 * g / (g.square().sqrt() + 1e-8), old)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_keeps_state_for_salient_weights_only() -> None:
    net = module()
    mask = masks.random(net, 0.25, seed=1)
    masked = MaskedOptimizer(net, mask, lr=0.1)
    loss_of(net, 0).backward()
    masked.step()
    for moment in ("mean.", "square."):
        assert sum(value.numel() for key, value in masked.state().items() if key.startswith(moment)) == mask.count


def test_goes_on_from_its_state_bit_for_bit() -> None:
    straight, stopped = module(), module()
    mask = masks.random(straight, 0.4, seed=1)
    whole = MaskedOptimizer(straight, mask, lr=0.1)
    first = MaskedOptimizer(stopped, mask, lr=0.1)
    for step in range(3):
        loss_of(straight, step).backward()
        whole.step()
    loss_of(stopped, 0).backward()
    first.step()
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = module()
    second = MaskedOptimizer(resumed, mask, lr=0.1)
    second.restore(state)
    for step in (1, 2):
        loss_of(resumed, step).backward()
        second.step()
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameters_without_salient_weights_ask_for_no_gradient() -> None:
    net = module()
    scores = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    scores["2.weight"] += 1
    MaskedOptimizer(net, top_k(scores, 10), lr=0.1)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"2.weight"}


def test_refuses_an_empty_mask_and_one_of_another_model() -> None:
    with pytest.raises(ValueError, match="no weight"):
        MaskedOptimizer(module(), masks.random(module(), 0.0, seed=0), lr=0.1)
    with pytest.raises(RequestError, match="does not fit"):
        MaskedOptimizer(nn.Linear(2, 2), masks.random(nn.Linear(2, 3), 0.5, seed=0), lr=0.1)
    with pytest.raises(RequestError, match="does not fit"):
        MaskedOptimizer(nn.Linear(2, 2), Mask({}, {}), lr=0.1)
