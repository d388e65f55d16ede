"""Gradients taken on salient weights, projected, and handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from erase_concept import masks
from erase_concept.training.gradients import dot, onto_half_space, salient_gradient, with_gradient


def random_gradient(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (5,)))}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradient.values()])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [0.0, 3.0])
def test_projection_is_the_nearest_point_of_the_half_space(seed: int, least: float) -> None:
    """A point is nearest in a convex set when no other one lies at an acute angle behind it."""
    gradient, normal = random_gradient(seed), random_gradient(seed + 10)
    projected, factor = onto_half_space(gradient, normal, least)
    g, n, x = flat(gradient), flat(normal), flat(projected)
    assert factor >= 0
    assert x @ n >= least - 1e-4
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        other = torch.randn(x.shape, generator=generator)
        other += max(0.0, float(least - other @ n) / float(n @ n)) * n  # now in the half-space
        assert (g - x) @ (other - x) <= 1e-4


def test_a_gradient_inside_stays_as_it_is() -> None:
    gradient = random_gradient(0)
    projected, factor = onto_half_space(gradient, gradient, 0.5)
    assert factor == 0
    assert all(torch.equal(projected[name], g) for name, g in gradient.items())


def test_a_constraint_without_gradient_changes_nothing() -> None:
    gradient = random_gradient(0)
    projected, factor = onto_half_space(gradient, {name: torch.zeros_like(g) for name, g in gradient.items()}, 1.0)
    assert factor == 0
    assert all(torch.equal(projected[name], g) for name, g in gradient.items())


def test_dot_is_over_all_parameters() -> None:
    one, other = random_gradient(1), random_gradient(2)
    assert dot(one, other) == pytest.approx(float(flat(one) @ flat(other)), rel=1e-5)


def test_backward_gives_the_gradient_and_the_value_is_the_losss() -> None:
    module = nn.Linear(3, 2)
    loss = module(torch.ones(1, 3)).square().sum()
    wanted = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    value = with_gradient(loss, module, wanted)
    value.backward()
    assert torch.equal(value, loss.detach())
    assert torch.equal(module.weight.grad, wanted["weight"])
    assert torch.equal(module.bias.grad, wanted["bias"])


def test_salient_gradient_is_zero_where_weights_are_frozen() -> None:
    module = nn.Linear(3, 2)
    mask = masks.random(module, 0.5, seed=1)
    module.bias.requires_grad_(False)
    found = salient_gradient(module(torch.ones(1, 3)).square().sum(), module, mask)
    whole = torch.autograd.grad(module(torch.ones(1, 3)).square().sum(), module.weight)[0]
    assert found.keys() == {"weight"}
    assert torch.equal(found["weight"], whole * mask.dense("weight"))
    assert module.weight.grad is None
