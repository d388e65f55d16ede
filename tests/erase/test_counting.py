"""What is counted of passes through a model, against other ways to count it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from erase_concept.counting import LivingBytes, Passes, count_passes, count_vae, empty_model
from erase_concept.pipelines.load import ModelConfigs, configs


@pytest.fixture(scope="module")
def make() -> ModelConfigs:
    """Emojinette's configurations."""
    return configs("emojinette")


@pytest.fixture(scope="module")
def unet(make: ModelConfigs) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(make.components["unet"])


def rows(unet: UNet2DConditionModel, n: int) -> tuple[Tensor, Tensor, Tensor]:
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    return torch.randn(n, 4, side, side), torch.zeros(n, dtype=torch.int64), torch.randn(n, 77, width)


def count(make: ModelConfigs, *passes: Any, **more: Any) -> Any:
    with FakeTensorMode():
        model = empty_model(make)
        model.unet.requires_grad_(True)
        return count_passes(model, Passes(*passes, None, **more))


def by_hand(module: nn.Module, run: Any) -> dict[str, int]:
    """Count a forward pass by textbook formulas of its layers, 2 for each multiplication and addition."""
    found = {"layers": 0, "attention": 0}

    def layer(one: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        each = one.in_features if isinstance(one, nn.Linear) else one.weight[0].numel()
        found["layers"] += 2 * out.numel() * each

    def attention(one: Attention, given: tuple[Tensor, ...], named: dict[str, Any], out: Tensor) -> None:
        queries = out.shape[1] if out.ndim == 3 else out.shape[2] * out.shape[3]
        other = named.get("encoder_hidden_states")
        keys = queries if other is None else other.shape[1]
        found["attention"] += 2 * 2 * len(out) * queries * keys * one.inner_dim

    for one in module.modules():
        if isinstance(one, nn.Linear | nn.Conv2d):
            one.register_forward_hook(layer)
        elif isinstance(one, Attention):
            one.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        run()
    return found


def test_operations_are_those_of_the_layers(make: ModelConfigs) -> None:
    unet = UNet2DConditionModel.from_config(make.components["unet"])
    assert count(make, 2, 0).operations == sum(by_hand(unet, lambda: unet(*rows(unet, 2))).values())


def test_operations_are_those_of_a_real_step(make: ModelConfigs, unet: UNet2DConditionModel) -> None:
    hooked = UNet2DConditionModel.from_config(make.components["unet"])
    attention = by_hand(hooked, lambda: hooked(*rows(unet, 1)))["attention"]
    with FlopCounterMode(display=False) as counter:  # which knows no attention on CPUs
        with torch.no_grad():
            unet(*rows(unet, 2))
        unet(*rows(unet, 4)).sample.square().mean().backward()
    # Backward, attention multiplies five matrices, and forward two.
    assert count(make, 2, 4).operations == counter.get_total_flops() + attention * (2 + 4 + 4 * 5 // 2)


def test_operations_of_the_vae_are_those_of_its_layers(make: ModelConfigs) -> None:
    for encode in (True, False):
        with FakeTensorMode():
            model = empty_model(make)
            counted = count_vae(model, model.size, encode=encode)
            found = by_hand(model.vae, partial(count_vae, model, model.size, encode=encode))
        assert counted.operations == sum(found.values()) > 0


def test_activations_are_what_autograd_saves(make: ModelConfigs, unet: UNet2DConditionModel) -> None:
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(*rows(unet, 4)).sample
    assert out.requires_grad
    # Beside what is saved, something is always being worked on.
    assert sum(saved.values()) < count(make, 2, 4).activations < 1.3 * sum(saved.values())


def test_recomputed_activations_are_gone_after_each_block(make: ModelConfigs, unet: UNet2DConditionModel) -> None:
    """What is counted without data is what lives in a real step in which activations are recomputed."""
    unet.enable_gradient_checkpointing()
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in unet.parameters()]
    with LivingBytes(unet) as living:
        unet(*rows(unet, 4)).sample.square().mean().backward()
    for hook in hooks:
        hook.remove()
    unet.disable_gradient_checkpointing()
    counted = count(make, 0, 4, recompute=True)
    assert living.now < 0.01 * living.peak
    assert counted.activations + counted.gradients == pytest.approx(living.peak, rel=0.02)
    assert counted.activations < 0.5 * count(make, 0, 4).activations
