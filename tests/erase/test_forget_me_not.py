"""Forget-Me-Not's loss and update against a plain transcription of its formula and of attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.make_data import make_data
from erase_concept.methods.forget_me_not import ForgetMeNotSettings, forget_me_not
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.training.attention import attention_maps, cross_attentions


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    return make_data(tiny, square, DataRecipe(forget=4, steps=2, guidance=2.0), seed=1, parts=("forget",))


@pytest.mark.parametrize(("norm", "end_token"), [("squared", False), ("frobenius", True)])
def test_two_steps_equal_the_formula(tiny: Diffusion, data: ForgetRetain, norm: str, end_token: bool) -> None:
    config = ForgetMeNotSettings(
        steps=2,
        batch_size=3,
        lr=1e-2,
        optimizer="adam",
        weight_decay=0.0,
        max_grad_norm=None,
        norm=norm,
        end_token=end_token,
    )
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(forget_me_not(tiny, data, mask, config, seed=7))

    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    outputs: dict[str, torch.Tensor] = {}
    layers = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    assert len(layers) == 4
    for name in layers:
        for part in ("to_q", "to_k"):
            key = f"{name}.{part}"
            unet.get_submodule(key).register_forward_hook(lambda m, i, out, key=key: outputs.__setitem__(key, out))
    # One token for each letter: the start's, "a" or "one", and "square".
    named = [[*range(2, 8), *([8] * end_token)], [*range(4, 10), *([10] * end_token)]]
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        noise, t = torch.randn(3, 4, 8, 8, generator=generator), torch.randint(0, 1000, (3,), generator=generator)
        a = kept[t].view(-1, 1, 1, 1)
        which = data.forget_which[rows].tolist()
        prompts = tiny.encode_prompts([["a square", "one square"][i] for i in which])
        unet(a.sqrt() * data.forget_latents[rows] + (1 - a).sqrt() * noise, t, prompts)
        total = torch.zeros(())
        for name in layers:
            heads = unet.get_submodule(name).heads
            q, k = (outputs[f"{name}.{part}"].unflatten(-1, (heads, -1)) for part in ("to_q", "to_k"))
            scores = torch.einsum("nphd,nthd->nhpt", q, k) / q.shape[-1] ** 0.5
            maps = scores.exp() / scores.exp().sum(-1, keepdim=True)
            total = total + sum(maps[row, ..., named[prompt]].square().sum() for row, prompt in enumerate(which)) / 3
        total = total.sqrt() if norm == "frobenius" else total
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(total.item(), rel=near)
        if step == 0:
            names, parameters = zip(*unet.named_parameters(), strict=True)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            assert any(g is None for g in gradients)  # the last layers come after all attention, and do not learn
            with torch.no_grad():
                for name, p, g in zip(names, parameters, gradients, strict=True):
                    if g is not None:
                        p -= 0.01 * g / (g.abs() + 1e-8) * mask.dense(name)


def test_looking_at_attention_changes_nothing(family: Diffusion) -> None:
    noisy, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    prompts = family.encode_prompts(["a square", "one circle"])
    before = family.predict(noisy, t, prompts)
    processors = dict(family.unet.attn_processors)
    with cross_attentions(family.unet) as seen:
        assert torch.equal(family.predict(noisy, t, prompts), before)
    assert len(seen) == 4
    for layer, pixels, tokens in seen:
        maps = attention_maps(layer, pixels, tokens)
        assert maps.shape == (2, layer.heads, pixels.shape[1], 16)
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    family.predict(noisy, t, prompts)
    assert len(seen) == 4  # no hook is left behind
    assert family.unet.attn_processors == processors
    with pytest.raises(RuntimeError, match="stop"), cross_attentions(family.unet):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in family.unet.modules())


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain) -> None:
    config = ForgetMeNotSettings(steps=3, batch_size=2, lr=1e-3)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(forget_me_not(tiny, data, None, config, seed=7))
    list(forget_me_not(other, data, None, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())


def test_attention_goes_away_from_the_name(tiny: Diffusion, data: ForgetRetain) -> None:
    records = list(forget_me_not(tiny, data, None, ForgetMeNotSettings(steps=20, batch_size=4, lr=1e-2), seed=7))
    assert records[-1].loss < 0.5 * records[0].loss


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(forget_me_not, data, ForgetMeNotSettings())
