"""MACE's three parts against their formulas, in numpy and with an attention processor of diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from erase_concept import masks
from erase_concept.closed_form import matrices
from erase_concept.data import draw
from erase_concept.make_data import make_data
from erase_concept.methods.mace import MACESettings, concept_places, mace, timestep_density
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator

CONCEPT = Concept("square", "object", "disc", ("a {O} red",), retain=("line",), others=("",))


def test_equals_the_formula_over_the_words_behind_the_name(family: Diffusion) -> None:
    data = make_data(family, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    base = {name: weight.double().numpy().copy() for name, weight in matrices(family.unet).items()}
    (record,) = mace(
        family,
        data,
        None,
        MACESettings(erase_scale=2.0, preserve_scale=0.3, ridge=5.0, tokens="behind-name", lora=False),
        seed=0,
    )
    # One token for each letter: behind "a square" come "red", the end and padding, at 8 to 15; behind "a disc" at 6.
    e_f = family.encode_prompts(["a square red"])[0, 8:16].double().numpy()
    e_g = family.encode_prompts(["a disc red"])[0, 6:14].double().numpy()
    kept = family.encode_prompts(["a line red", ""])[:, :16].flatten(0, 1).double().numpy()
    right = 2 * e_f.T @ e_f + 0.3 * kept.T @ kept + 5 * np.eye(kept.shape[1])
    loss = 0.0
    for name, weight in matrices(family.unet).items():
        left = 2 * (base[name] @ e_g.T) @ e_f + 0.3 * (base[name] @ kept.T) @ kept + 5 * base[name]
        now = left @ np.linalg.inv(right)
        np.testing.assert_allclose(weight.numpy(), now, rtol=1e-3, atol=1e-6)
        loss += 2 * np.square(now @ e_f.T - base[name] @ e_g.T).sum() + 5 * np.square(now - base[name]).sum()
        loss += 0.3 * np.square((now - base[name]) @ kept.T).sum()
    assert record.loss == pytest.approx(loss, rel=1e-4)


def test_the_words_around_the_name_lose_it(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    tokens, wanted = data.forget[0], data.remap[0, 0]
    base = {name: weight.clone() for name, weight in matrices(tiny.unet).items()}
    list(mace(tiny, data, None, MACESettings(preserve_scale=0.0, ridge=1e-6, tokens="behind-name", lora=False), seed=0))
    for name, weight in matrices(tiny.unet).items():
        torch.testing.assert_close(weight @ tokens[8:].T, base[name] @ wanted[6:14].T, rtol=1e-3, atol=1e-3)


def test_keeps_to_the_mask(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    mask = masks.random(tiny.unet, 0.5, seed=4)
    list(mace(tiny, data, mask, MACESettings(lora=False), seed=0))
    for name, p in tiny.unet.named_parameters():
        moved = p.view(torch.int32) != before[name].view(torch.int32)
        assert not (moved & ~mask.dense(name)).any()
        assert bool(moved.any()) == (name in matrices(tiny.unet))


DOUBLE = Concept(
    "square and line",
    "several",
    combined=(
        Concept("square", "object", "disc", ("a {O} red", "red {O}"), retain=("circle",), others=("",)),
        Concept("line", "object", "disc", ("a {O}",), retain=("circle",)),
    ),
)
SHORT = {"steps": 2, "batch_size": 2, "lr": 1e-2, "optimizer": "adam", "weight_decay": 0.0, "checkpoint_every": 1}


def numbers(model: Diffusion) -> dict[str, np.ndarray]:
    return {name: weight.detach().double().numpy().copy() for name, weight in matrices(model.unet).items()}


def test_the_first_part_takes_all_tokens_around_the_name(tiny: Diffusion) -> None:
    """As MACE's code matches both prompts' tokens from their beginnings and from their ends."""
    data = make_data(tiny, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    base = numbers(tiny)
    list(mace(tiny, data, None, MACESettings(preserve_scale=0.3, ridge=5.0, lora=False), seed=0))
    # "a square red" is a start token, 1 + 6 + 3 letters, end tokens; in "a disc red" the name has 4 letters.
    old, new = (tiny.encode_prompts([prompt])[0].double().numpy() for prompt in ("a square red", "a disc red"))
    e_f, e_g = np.concatenate([old[:2], old[8:16]]), np.concatenate([new[:2], new[6:14]])
    kept = tiny.encode_prompts(["a line red", ""]).flatten(0, 1).double().numpy()
    right = e_f.T @ e_f + 0.3 * kept.T @ kept + 5 * np.eye(16)
    for name, now in numbers(tiny).items():
        left = (base[name] @ e_g.T) @ e_f + 0.3 * (base[name] @ kept.T) @ kept + 5 * base[name]
        np.testing.assert_allclose(now, left @ np.linalg.inv(right), rtol=1e-3, atol=1e-6)


class Recorder:
    """An attention processor that keeps the probabilities of cross-attention, written out."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> torch.Tensor:
        tokens = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(rows).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, rows in ((attn.to_q, hidden), (attn.to_k, tokens), (attn.to_v, tokens))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        if encoder_hidden_states is not None:
            self.seen.append(weights)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def test_two_steps_of_the_second_part_equal_the_formulas(tiny: Diffusion) -> None:
    """Adam's first step on adapters that begin as diffusers' own, with the gradient clipped to a norm of one."""
    data = make_data(tiny, CONCEPT, DataRecipe(forget=4, steps=1, guidance=1.0), seed=1, parts=("forget",))
    base = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    config = MACESettings(ridge=5.0, **SHORT)
    records = list(mace(tiny, data, None, config, seed=7))
    assert [(record.step, record.steps) for record in records] == [(1, 2), (2, 2)]
    list(mace(base, data, None, MACESettings(ridge=5.0, lora=False), seed=7))  # the first part
    generator = stage_generator(7, "adapters")
    downs = {name: torch.randn(16, generator=generator, requires_grad=True) for name in matrices(base.unet)}
    ups = {name: torch.zeros(len(weight), requires_grad=True) for name, weight in matrices(base.unet).items()}
    recorder = Recorder()
    base.unet.set_attn_processor(recorder)
    t = np.arange(1000.0)
    density = torch.from_numpy(1 / (1 + np.exp(-0.05 * (t - 200))) - 1 / (1 + np.exp(-0.05 * (t - 400))))
    places = torch.zeros(16)
    places[2:8] = 1  # "square" of "a square red", letter by letter
    places[11:] = 1  # the end token, and the padding, which is the same
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        latents = data.forget_latents[draw(4, 2, generator)]
        torch.randint(0, 1, (2,), generator=generator)  # of one prompt
        times = torch.multinomial(density, 2, replacement=True, generator=generator)
        a = kept[times].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * torch.randn(latents.shape, generator=generator)
        fused = {n: w + ups[n][:, None] * downs[n] for n, w in matrices(base.unet).items()}
        recorder.seen.clear()
        functional_call(base.unet, fused, (noisy, times, data.forget[[0, 0]]))
        assert len(recorder.seen) == 4
        loss = sum((weights[..., places.bool()].square().sum()).sqrt() for weights in recorder.seen)
        assert records[step].loss == pytest.approx(loss.item(), rel=(1e-5, 1e-3)[step])
        if step == 0:
            leaves = [*downs.values(), *ups.values()]
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
            with torch.no_grad():
                for p, g in zip(leaves, gradients, strict=True):
                    if g is not None:
                        clipped = g * min(1.0, 1 / float(norm))
                        p -= 0.01 * clipped / (clipped.abs() + 1e-8)


def test_the_third_part_fuses_each_concepts_adapters_by_the_formula(tiny: Diffusion, tmp_path: Path) -> None:
    data = make_data(tiny, DOUBLE, DataRecipe(forget=3, steps=1, guidance=1.0), seed=1, parts=("forget",))
    scales = {"preserve_scale": 0.2, "fuse_preserve_scale": 0.7, "ridge": 5.0, "erase_scale": 1.5}
    first, w0 = tiny.with_components(unet=copy.deepcopy(tiny.unet)), numbers(tiny)
    list(mace(first, data, None, MACESettings(**scales, lora=False), seed=7))
    w1, file = numbers(first), tmp_path / "last.safetensors"
    records = list(mace(tiny, data, None, MACESettings(**scales, **SHORT), seed=7, checkpoint=file))
    assert [(record.step, record.steps) for record in records] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    kept = tiny.encode_prompts(["a circle red", "red circle", "a circle", ""]).flatten(0, 1).double().numpy()
    prompts = (["a square red", "red square"], ["a line"])
    pairs = []
    for own, name in zip(prompts, ("last", "last-1"), strict=True):
        state = load_file(tmp_path / f"{name}.safetensors")
        adapted = {}
        for key, before in w1.items():
            layer = key.removesuffix(".weight").replace(".", "/")
            up, down = (state[f"weights.{part}.{layer}"].double().numpy() for part in ("up", "down"))
            adapted[key] = before + np.outer(up, down)
        assert any(np.abs(adapted[key] - w1[key]).max() > 1e-3 for key in w1)
        pairs.append((tiny.encode_prompts(own).flatten(0, 1).double().numpy(), adapted))
    right = 1.5 * sum(e.T @ e for e, _ in pairs) + 0.7 * kept.T @ kept + 5 * np.eye(16)
    for key, now in numbers(tiny).items():
        left = 1.5 * sum((made[key] @ e.T) @ e for e, made in pairs) + 0.7 * (w0[key] @ kept.T) @ kept + 5 * w1[key]
        np.testing.assert_allclose(now, left @ np.linalg.inv(right), rtol=1e-3, atol=1e-5)


def test_training_takes_the_attention_from_the_name(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(forget=4, steps=2, guidance=2.0), seed=1, parts=("forget",))
    losses = [record.loss for record in mace(tiny, data, None, MACESettings(ridge=5.0, steps=60, lr=0.1), seed=7)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_time_steps_have_the_density_of_the_authors_code() -> None:
    t = np.arange(1000.0)
    wanted = 1 / (1 + np.exp(-0.05 * (t - 200))) - 1 / (1 + np.exp(-0.05 * (t - 400)))
    np.testing.assert_allclose(timestep_density(1000, importance=True), wanted, atol=1e-12)
    assert timestep_density(1000, importance=False).unique().tolist() == [1.0]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of SD 1.x, and of SD 2.x
def test_the_padding_counts_where_it_is_the_end_token(tiny: Diffusion, pad: str) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = pad
    model = tiny.with_components(tokenizer=tokenizer)
    data = make_data(model, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    found = concept_places(model, data)[0].nonzero().squeeze(1).tolist()
    assert found == [*range(2, 8), 11, *(range(12, 16) if pad != "!" else ())]


def test_all_parts_keep_to_the_mask_and_a_killed_run_goes_on(
    tiny: Diffusion, check_method: Callable[..., None]
) -> None:
    """Killed within the second of two concepts' adapters, of three steps each."""
    data = make_data(tiny, DOUBLE, DataRecipe(forget=3, steps=1, guidance=1.0), seed=1, parts=("forget",))
    check_method(mace, data, MACESettings(ridge=5.0, **SHORT), steps=3, checkpoint_every=1)


def test_no_layer_keeps_an_adapter(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(forget=2, steps=1, guidance=1.0), seed=1, parts=("forget",))
    list(mace(tiny, data, None, MACESettings(**SHORT), seed=7))
    assert not any("forward" in vars(module) for module in tiny.unet.modules())


def test_works_on_every_family(family: Diffusion) -> None:
    data = make_data(family, CONCEPT, DataRecipe(forget=2, steps=1, guidance=1.0), seed=1, parts=("forget",))
    assert all(record.loss > 0 for record in mace(family, data, None, MACESettings(steps=2), seed=7))
