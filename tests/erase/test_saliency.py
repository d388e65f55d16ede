"""Saliency against analytic gradients."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from erase_concept.data import Batch
from erase_concept.masks.saliency import accumulate, forgetting_loss
from erase_concept.pipelines.model import Diffusion


def linear_problem() -> tuple[nn.Linear, list[torch.Tensor], list[torch.Tensor]]:
    """A linear model and three batches of its inputs and targets."""
    generator = torch.Generator().manual_seed(5)
    module = nn.Linear(4, 3).requires_grad_(False)
    inputs = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    targets = [torch.randn(6, 3, generator=generator) for _ in range(3)]
    return module, inputs, targets


@pytest.mark.parametrize("how", ["signed", "absolute", "squared"])
def test_linear_model_has_its_analytic_gradient(how: str) -> None:
    module, inputs, targets = linear_problem()
    losses = [lambda x=x, y=y: -nn.functional.mse_loss(module(x), y) for x, y in zip(inputs, targets, strict=True)]
    found = accumulate(module, losses, how)
    # d/dW of -mean((Wx + b - y)^2) over 6 x 3 entries is -2/18 (Wx + b - y)^T x; d/db its column sums.
    errors = [x @ module.weight.T + module.bias - y for x, y in zip(inputs, targets, strict=True)]
    weight = torch.stack([-2 / 18 * e.T @ x for e, x in zip(errors, inputs, strict=True)])
    bias = torch.stack([-2 / 18 * e.sum(0) for e in errors])
    for name, gradients in (("weight", weight), ("bias", bias)):
        sums = {"signed": gradients.sum(0).abs(), "absolute": gradients.abs().sum(0), "squared": (gradients**2).sum(0)}
        torch.testing.assert_close(found[name], sums[how])


def test_signed_batches_can_cancel_and_absolute_ones_cannot() -> None:
    module, inputs, targets = linear_problem()

    def loss(sign: float) -> torch.Tensor:
        return sign * nn.functional.mse_loss(module(inputs[0]), targets[0])

    losses = [lambda: loss(1.0), lambda: loss(-1.0)]
    assert float(accumulate(module, losses, "signed")["weight"].max()) == 0
    assert float(accumulate(module, losses, "absolute")["weight"].min()) > 0


def test_leaves_the_module_as_it_was_even_after_an_error() -> None:
    module, inputs, _ = linear_problem()
    module.bias.requires_grad_(True)
    before = {name: p.clone() for name, p in module.named_parameters()}

    def fail() -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        accumulate(module, [lambda: module(inputs[0]).sum(), fail])
    assert [p.requires_grad for p in module.parameters()] == [False, True]
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    module(inputs[0]).sum().backward()  # no hook is left to take the gradient away
    assert module.bias.grad is not None


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("w", [0.0, 7.5])
def test_forgetting_loss_is_the_formula(tiny: Diffusion, w: float, prediction: str, scheduler: str) -> None:
    """Whatever sampler a model was published with, its noise is that of its training."""
    tiny = tiny.with_components(scheduler=getattr(diffusers, scheduler).from_config(tiny.scheduler.config))
    tiny.scheduler.register_to_config(prediction_type=prediction)
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([3, 500, 999])
    given, empty = tiny.encode_prompts(["a", "b", "c"]), tiny.encode_prompts([""])
    batch = Batch(latents, noise, tiny.add_noise(latents, noise, timesteps), timesteps, given, given)
    found = forgetting_loss(tiny, batch, empty, w)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    with_prompt = tiny.unet(noisy, timesteps, given).sample
    without = tiny.unet(noisy, timesteps, empty.expand(3, -1, -1)).sample
    truth = noise if prediction == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    expected = -((with_prompt * (1 + w) - without * w - truth) ** 2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert tiny.target(latents, noise, timesteps).shape == noise.shape
