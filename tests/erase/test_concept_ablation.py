"""Concept Ablation's losses and updates against a plain transcription of its formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.make_data import make_data
from erase_concept.methods.concept_ablation import (
    ConceptAblationSettings,
    concept_ablation,
    concept_ablation_noise,
    start_token_detached,
)
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.tokens import own_tokens

BOTH = pytest.mark.parametrize("ablate", [concept_ablation, concept_ablation_noise])


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    # Forget rows are made for salient masks; the method must not learn from them.
    settings = DataRecipe(forget=2, anchor=4, steps=2, guidance=2.0)
    return make_data(
        tiny,
        square,
        settings,
        seed=1,
        parts=(
            "forget",
            "anchor",
        ),
    )


def drawn(data: ForgetRetain, step: int) -> list[tuple[Tensor, ...]]:
    """Return a step's two batches of three anchor rows: noisy latents, time steps, noise, and which prompt each has."""
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    generator, batches = stage_generator(7, "step", step, 0, 0), []
    for _ in range(2):
        rows = draw(4, 3, generator)
        noise = torch.randn(3, 4, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (3,), generator=generator)
        a = kept[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * data.anchor_latents[rows] + (1 - a).sqrt() * noise
        batches.append((noisy, t, noise, data.anchor_which[rows]))
    return batches


class DetachedStart:
    """Cross-attention as its definition says, with the start token's keys and values taken as constants."""

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        learns = torch.ones(encoder_hidden_states.shape[1])
        learns[0] = 0.0
        q, k, v = attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        k, v = (learns[:, None] * y + (1 - learns[:, None]) * y.detach() for y in (k, v))
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in (q, k, v))
        weights = (torch.einsum("nphd,nthd->nhpt", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("nhpt,nthd->nphd", weights, v).flatten(-2))


def detach_start(unet: Any) -> None:
    for name, layer in unet.named_modules():
        if name.endswith(".attn2"):
            layer.set_processor(DetachedStart())


@BOTH
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_two_steps_equal_the_formulas(
    tiny: Diffusion, data: ForgetRetain, ablate: Callable[..., Any], alpha: float, detach: bool
) -> None:
    config = ConceptAblationSettings(steps=2, batch_size=3, lr=1e-2, alpha=alpha, detach_start_token=detach)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    if detach:
        detach_start(unet)
    records = list(ablate(tiny, data, mask, config, seed=7))

    concept, anchor = tiny.encode_prompts(["a square", "one square"]), tiny.encode_prompts(["a circle", "one circle"])
    for step in range(2):
        (x, t, noise, which), (x2, t2, noise2, which2) = drawn(data, step)
        wanted = noise if ablate is concept_ablation_noise else unet(x, t, anchor[which]).sample.detach()
        forget = (unet(x, t, concept[which]).sample - wanted).square().mean()
        regular = (unet(x2, t2, anchor[which2]).sample - noise2).square().mean()
        loss = forget + alpha * regular
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        terms = {"forget": forget.item()} | ({"anchor": regular.item()} if alpha else {})
        assert records[step].terms == pytest.approx(terms, rel=near)
        if step == 0:
            gradients = torch.autograd.grad(loss, list(unet.parameters()))
            with torch.no_grad():
                for (name, p), g in zip(unet.named_parameters(), gradients, strict=True):
                    # AdamW's first step, decay of 0.01 included.
                    p -= (0.01 * 0.01 * p + 0.01 * g / (g.abs() + 1e-8)) * mask.dense(name)


def test_the_start_token_gives_keys_and_values_no_gradient(family: Diffusion) -> None:
    """With the start token alone nothing of them learns; the other tokens' gradient is as without it."""
    noisy, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    prompts = family.encode_prompts(["a square", "one circle"])
    start = prompts[:, :1] if family.family.extra_tokens == 0 else prompts[:, [0, -1]]
    matrices = masks.in_scope(family.unet, "keys-and-values")
    assert len(matrices) == 8
    weights = [p.requires_grad_(True) for name, p in family.unet.named_parameters() if name in matrices]
    with start_token_detached(family.unet):
        for embeddings, moves in ((start, False), (prompts, True)):
            loss = family.predict(noisy, t, embeddings).square().mean()
            if moves:
                assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, weights))
            else:
                assert not any(g.any() for g in torch.autograd.grad(loss, weights))
    assert not any(module._forward_hooks for module in family.unet.modules())


@BOTH
def test_two_steps_on_the_names_own_tokens_equal_the_formulas(
    tiny: Diffusion, data: ForgetRetain, square: Concept, ablate: Callable[..., Any]
) -> None:
    config = ConceptAblationSettings(steps=2, batch_size=3, lr=1e-2, alpha=0.25)
    own = own_tokens(tiny, square)
    encoder = copy.deepcopy(tiny.text_encoder).requires_grad_(True)
    table = encoder.get_input_embeddings().weight
    before = {part: weights_hash(getattr(tiny, part)) for part in ("unet", "vae")}
    anchor = tiny.encode_prompts(["a circle", "one circle"])
    records = list(ablate(tiny, data, masks.token_rows(tiny.text_encoder, own), config, seed=7))

    ids = tiny.tokenizer(["a square", "one square"], padding="max_length", return_tensors="pt").input_ids
    for step in range(2):
        (x, t, noise, which), (x2, t2, noise2, which2) = drawn(data, step)
        wanted = noise if ablate is concept_ablation_noise else tiny.unet(x, t, anchor[which]).sample
        forget = (tiny.unet(x, t, encoder(ids[which])[0]).sample - wanted).square().mean()
        regular = (tiny.unet(x2, t2, anchor[which2]).sample - noise2).square().mean()
        near = (1e-5, 1e-3)[step]
        assert records[step].terms == pytest.approx({"forget": forget.item(), "anchor": regular.item()}, rel=near)
        if step == 0:
            (gradient,) = torch.autograd.grad(forget, [table])
            assert gradient[own].abs().amin() > 1e-6, "a row without a gradient would move by its decay alone"
            with torch.no_grad():
                table[own] -= 0.01 * 0.01 * table[own] + 0.01 * gradient[own] / (gradient[own].abs() + 1e-8)
    assert {part: weights_hash(getattr(tiny, part)) for part in before} == before
    found = dict(tiny.text_encoder.named_parameters())
    for name, value in encoder.named_parameters():
        moved = (found[name] != value).nonzero()[:, 0].unique() if value is table else torch.empty(0)
        assert set(moved.tolist()) <= set(own.tolist()), name
        assert value is table or torch.equal(found[name], value), name


@BOTH
def test_frozen_weights_stay_and_a_killed_run_goes_on(
    data: ForgetRetain, ablate: Callable[..., Any], check_method: Any
) -> None:
    check_method(ablate, data, ConceptAblationSettings())


def test_works_on_every_family(family: Diffusion, square: Concept) -> None:
    rows = make_data(family, square, DataRecipe(anchor=2, steps=2, guidance=2.0), seed=1, parts=("anchor",))
    config = ConceptAblationSettings(steps=1, batch_size=2, lr=1e-3)
    assert next(concept_ablation(family, rows, None, config, seed=7)).loss > 0


def test_needs_pictures_of_the_anchor(tiny: Diffusion, square: Concept) -> None:
    rows = make_data(tiny, square, DataRecipe(forget=1, steps=2, guidance=2.0), seed=1, parts=("forget",))
    with pytest.raises(RequestError, match=r"data\.anchor 0: must be at least 1"):
        next(concept_ablation(tiny, rows, None, ConceptAblationSettings(), seed=7))


@pytest.mark.parametrize(("name", "value"), [("alpha", -1.0), ("alpha", float("inf")), ("batch_size", 0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        ConceptAblationSettings(**{name: value})
