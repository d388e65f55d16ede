"""Scissorhands' trimming and repair against plain transcriptions of its formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.methods.scissorhands import (
    ScissorhandsSettings,
    chosen,
    decoder_self_attention,
    scissorhands,
    trim,
)
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator

PAPER = {"guidance": 0.0, "reset": "all", "reset_to": "torch", "projection": True}


@pytest.mark.parametrize(
    "options",
    [
        {**PAPER, "forget_weight": 0.0},
        {**PAPER, "forget_weight": 0.5},
        {"guidance": 7.5, "reset_to": "normal", "forget_loss": "ascent", "forget_weight": 0.5},
        {"guidance": 0.0, "reset_to": "kaiming", "forget_loss": "anchor", "forget_weight": 0.5},
    ],
)
def test_trimming_and_two_steps_equal_the_formulas(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any, options: dict[str, Any]
) -> None:
    config = ScissorhandsSettings(steps=2, batch_size=3, lr=1e-2, trimmed=0.2, trim_batches=2, **options)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(scissorhands(tiny, data, mask, config, seed=7))
    dense = torch.cat([mask.dense(name).view(-1) for name, _ in unet.named_parameters()]).float()
    sizes = [p.numel() for p in unet.parameters()]
    concept, anchor = (tiny.encode_prompts([f"a {name}", f"one {name}"]) for name in ("square", "circle"))

    def batch(generator: torch.Generator, rows: Any = None) -> tuple[Any, ...]:
        rows = draw(4, 3, generator) if rows is None else rows
        return *noised(data.forget_latents[rows], generator), data.forget_which[rows], rows

    def flat_gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(unet.parameters()))])

    sums, rows = torch.zeros(len(dense)), None
    for number in range(2):  # the same rows, with other noise
        x, t, noise, which, rows = batch(stage_generator(7, "sensitivity", number), rows)
        predicted = (1 + config.guidance) * unet(x, t, concept[which]).sample
        if config.guidance:
            predicted = predicted - config.guidance * unet(x, t, tiny.encode_prompts([""] * 3)).sample
        sums += flat_gradient((predicted - noise).square().mean()).abs()
    sensitivity = sums * nn.utils.parameters_to_vector(unet.parameters()).detach().abs() * dense
    top = torch.zeros(len(sums), dtype=torch.bool)
    top[sensitivity.argsort(descending=True)[: round(0.2 * int(dense.sum()))]] = True
    generator, reset = stage_generator(7, "trim"), 0
    with torch.no_grad():
        for (name, p), chosen_here in zip(unet.named_parameters(), top.split(sizes), strict=True):
            inside = config.reset == "all" or ("up_blocks.1.attentions.1." in name and "attn1" in name)
            if p.dim() < 2:
                new = torch.full(p.shape, 1.0 if name.endswith("weight") else 0.0)
            elif config.reset_to == "normal":
                new = 0.02 * torch.randn(p.shape, generator=generator)
            else:
                bound = math.sqrt((6 if config.reset_to == "kaiming" else 1) / p[0].numel())
                new = (2 * torch.rand(p.shape, generator=generator) - 1) * bound
            p.copy_(torch.where(chosen_here.view_as(p) & inside, new, p))
            reset += int(chosen_here.sum()) if inside else 0
    assert reset > 0

    def forget_loss(generator: torch.Generator) -> torch.Tensor:
        x, t, noise, which, _ = batch(generator)
        target = noise if config.forget_loss == "ascent" else unet(x, t, anchor[which]).sample.detach()
        return (unet(x, t, concept[which]).sample - target).square().mean()

    memory = -flat_gradient(forget_loss(stage_generator(7, "memory"))) * dense
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-4, 1e-2)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(6, 3, generator)
        x, t, noise = noised(data.retain_latents[rows], generator)
        c = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        retain = (unet(x, t, c).sample - noise).square().mean()
        forget = forget_loss(generator)
        loss = retain + config.forget_weight * (forget if config.forget_loss == "anchor" else -forget)
        assert records[step].terms == pytest.approx({"forget": forget.item(), "retain": retain.item()}, rel=near)
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        g = flat_gradient(loss) * dense
        if config.projection and g @ memory < 0:
            g = g - (g @ memory) / (memory @ memory) * memory
        gradients = [part.view_as(p) for part, p in zip(g.split(sizes), unet.parameters(), strict=True)]
        adam(unet, gradients, moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-3).float().mean() > 0.98, name


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("sd1", ("up_blocks.1.attentions.1.", "up_blocks.2.attentions.1.")),
        ("sd2", ("up_blocks.1.attentions.1.", "up_blocks.2.attentions.1.")),
        ("sdxl", ("up_blocks.0.attentions.1.", "up_blocks.1.attentions.1.")),
    ],
)
def test_the_decoders_self_attention_is_that_of_the_two_compvis_blocks(name: str, layers: tuple[str, ...]) -> None:
    """At full size, without weights. The names in a single file tell which output_blocks these are."""
    record = FAMILIES.find(name)
    with FakeTensorMode():
        unet = record.components["unet"].make(record.single_file.configs({})["unet"])
        shapes = {key: tuple(p.shape) for key, p in unet.named_parameters()}
    small = nn.Module()
    small.named_parameters = lambda: ((key, torch.empty(1)) for key in shapes)
    found = {key for key, (ones, _) in decoder_self_attention(small).layers().items() if ones}
    assert found == {key for key in shapes if key.startswith(layers) and ".attn1." in key}
    assert len(found) == 5 * (2 if name != "sdxl" else 12)  # to_q, to_k, to_v, and to_out with its bias


def test_a_decoder_without_self_attention_is_refused() -> None:
    with pytest.raises(RequestError, match=r"settings\.reset decoder-self-attention: .*allowed: all"):
        decoder_self_attention(nn.Linear(2, 2))


def test_trims_exactly_the_share_of_the_mask_and_nothing_outside(tiny: Diffusion) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=4)
    scores = {name: torch.rand(p.shape) for name, p in tiny.unet.named_parameters()}
    trimmed = chosen(scores, 0.25, mask)
    assert trimmed.count == round(0.25 * mask.count)
    assert (trimmed - mask).count == 0
    before = {name: p.detach().clone() for name, p in tiny.unet.named_parameters()}
    trim(tiny.unet, trimmed, torch.Generator().manual_seed(0))
    for name, p in tiny.unet.named_parameters():
        assert not ((p != before[name]) & ~trimmed.dense(name)).any()
    assert chosen(scores, 1.0, mask).count == mask.count
    assert chosen(scores, 0.0, None).count == 0


@pytest.mark.parametrize("options", [{}, PAPER])
def test_frozen_weights_stay_and_a_killed_run_goes_on(
    data: ForgetRetain, check_method: Any, options: dict[str, Any]
) -> None:
    check_method(scissorhands, data, ScissorhandsSettings(**options))


@pytest.mark.parametrize("options", [{}, PAPER])
def test_recomputed_activations_give_the_same_bits(
    tiny: Diffusion, data: ForgetRetain, options: dict[str, Any]
) -> None:
    config = ScissorhandsSettings(steps=2, batch_size=2, lr=1e-3, **options)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(scissorhands(tiny, data, None, config, seed=7))
    list(scissorhands(other, data, None, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())
    assert not other.unet.is_gradient_checkpointing


@pytest.mark.parametrize(("name", "value"), [("trimmed", 1.5), ("trim_batches", 0), ("forget_weight", float("inf"))])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        ScissorhandsSettings(**{name: value})
