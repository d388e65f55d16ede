"""SalUn's loss and update against a plain transcription of its formulas."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import EraseError
from erase_concept.make_data import make_data
from erase_concept.methods.random_label import random_label
from erase_concept.methods.salun import SalUnSettings, salun
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.training.loop import Record


@pytest.fixture
def data(tiny: Diffusion, square: Concept) -> ForgetRetain:
    return make_data(tiny, square, DataRecipe(forget=4, retain=6, steps=2, guidance=2.0), seed=1)


def alphas(timesteps: torch.Tensor) -> torch.Tensor:
    """The share of the signal's variance that is left, from the definition of the scaled linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)


@pytest.mark.parametrize("remap", ["anchor", "random", "empty"])
def test_two_steps_equal_the_formulas(tiny: Diffusion, square: Concept, data: ForgetRetain, remap: str) -> None:
    config = SalUnSettings(steps=2, batch_size=3, lr=1e-2, alpha=0.25, remap=remap)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet)
    records = [event for event in salun(tiny, data, mask, config, seed=7) if isinstance(event, Record)]

    # The same in plain PyTorch: rows, noise and time steps come from the step's generator in the documented order.
    unet.requires_grad_(True)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    forget_prompts, names = ["a square", "one square"], ["circle", "line"]
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        which = data.forget_which[rows]
        chosen = torch.randint(0, 2, (3,), generator=generator) if remap == "random" else torch.zeros(3, dtype=int)
        noise_f, t_f = torch.randn(3, 4, 8, 8, generator=generator), torch.randint(0, 1000, (3,), generator=generator)
        retain_rows = draw(6, 3, generator)
        noise_r, t_r = torch.randn(3, 4, 8, 8, generator=generator), torch.randint(0, 1000, (3,), generator=generator)
        c_f = tiny.encode_prompts([forget_prompts[i] for i in which])
        becomes = [forget_prompts[i].replace("square", names[j]) for i, j in zip(which, chosen, strict=True)]
        c_new = tiny.encode_prompts([""] * 3 if remap == "empty" else becomes)
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[retain_rows]])
        x_f = alphas(t_f).sqrt() * data.forget_latents[rows] + (1 - alphas(t_f)).sqrt() * noise_f
        x_r = alphas(t_r).sqrt() * data.retain_latents[retain_rows] + (1 - alphas(t_r)).sqrt() * noise_r
        with torch.no_grad():
            wanted = unet(x_f, t_f, c_new).sample
        forget = (unet(x_f, t_f, c_f).sample - wanted).square().mean()
        retain = (unet(x_r, t_r, c_r).sample - noise_r).square().mean()
        loss = forget + 0.25 * retain
        # After a step of Adam, which divides by the gradient's own size, rounding shows where a gradient is next to 0.
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        assert records[step].terms == pytest.approx({"forget": forget.item(), "retain": retain.item()}, rel=near)
        gradients = torch.autograd.grad(loss, list(unet.parameters()))
        with torch.no_grad():
            for (name, p), g, (m, v) in zip(unet.named_parameters(), gradients, moments, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                p -= 0.01 * update * mask.dense(name)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        close = torch.isclose(p, q, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99, name


def test_anchor_is_the_first_remapping(tiny: Diffusion, square: Concept, data: ForgetRetain) -> None:
    torch.testing.assert_close(data.remap[0], tiny.encode_prompts(["a circle", "one circle"]))
    torch.testing.assert_close(data.remap[1], tiny.encode_prompts(["a line", "one line"]))


def test_runs_twice_to_the_same_bits_and_resumes_to_them(tiny: Diffusion, data: ForgetRetain, tmp_path: Path) -> None:
    config = SalUnSettings(steps=6, batch_size=2, lr=1e-3, checkpoint_every=2, accumulation=2, warmup=2)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    models = [tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(3)]
    for model in models[:2]:
        list(salun(model, data, mask, config, seed=7))
    file = tmp_path / "checkpoints" / "last.safetensors"
    interrupted = salun(
        tiny.with_components(unet=copy.deepcopy(tiny.unet)), data, mask, config, seed=7, checkpoint=file
    )
    assert [next(interrupted).step for _ in range(5)] == [1, 2, 3, 4, 5]
    interrupted.close()
    records = list(salun(models[2], data, mask, config, seed=7, checkpoint=file))
    assert [record.step for record in records] == [5, 6]
    first = models[0].unet.state_dict()
    for model in models[1:]:
        assert all(torch.equal(first[name], value) for name, value in model.unet.state_dict().items())


def test_stops_at_a_loss_that_is_no_number_with_the_last_good_weights(
    tiny: Diffusion, data: ForgetRetain, tmp_path: Path
) -> None:
    tensors = {f.name: getattr(data, f.name).clone() for f in fields(data)}
    tensors["forget_latents"][:] = float("inf")
    broken = ForgetRetain(**tensors)
    config = SalUnSettings(steps=3, batch_size=2, lr=1e-3, checkpoint_every=1)
    before = copy.deepcopy(tiny.unet.state_dict())
    file = tmp_path / "last.safetensors"
    copied = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(salun(copied, data, None, replace(config, steps=1), seed=7, checkpoint=file))
    kept = file.read_bytes()
    with pytest.raises(EraseError, match=r"loss is (nan|inf) at step 1: lower lr or set max_grad_norm$"):
        list(salun(tiny, broken, None, config, seed=7))
    assert all(torch.equal(before[name], value) for name, value in tiny.unet.state_dict().items())
    clipped = replace(config, max_grad_norm=1.0)
    with pytest.raises(EraseError, match=r"at step 2: lower lr or max_grad_norm, and choose another folder$"):
        list(salun(tiny, broken, None, clipped, seed=7, checkpoint=file))
    assert file.read_bytes() == kept


def test_accumulated_halves_are_one_whole_batch(tiny: Diffusion, data: ForgetRetain) -> None:
    """Two batches accumulated give the mean of their gradients, so one step of SGD-like size follows it."""
    config = SalUnSettings(steps=1, batch_size=2, lr=1e-3, accumulation=2)
    record = next(salun(tiny, data, None, config, seed=7))
    assert record.loss == pytest.approx(record.terms["forget"] + 0.5 * record.terms["retain"], rel=1e-5)


def test_bf16_is_for_the_arithmetic_alone(tiny: Diffusion, data: ForgetRetain) -> None:
    config = SalUnSettings(steps=2, batch_size=2, lr=1e-3)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    exact = list(salun(tiny, data, None, config, seed=7))
    rough = list(salun(other, data, None, replace(config, precision="bf16"), seed=7))
    assert rough[0].loss != exact[0].loss
    assert rough[0].loss == pytest.approx(exact[0].loss, rel=0.02)
    assert {p.dtype for p in other.unet.parameters()} == {torch.float32}
    batch = data.retain_batch(tiny, torch.arange(2), torch.Generator().manual_seed(0))
    tiny.unet.load_state_dict(other.unet.state_dict())
    predictions = [m.predict(batch.noisy, batch.timesteps, batch.embeddings) for m in (tiny, other)]
    assert torch.equal(*predictions)  # no autocast is left behind


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain) -> None:
    config = SalUnSettings(steps=3, batch_size=2, lr=1e-3)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(salun(tiny, data, mask, config, seed=7))
    list(salun(other, data, mask, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())
    assert not other.unet.is_gradient_checkpointing


def test_clipping_far_above_the_norm_changes_no_bit(tiny: Diffusion, data: ForgetRetain) -> None:
    """With a clip all gradients are kept until the backward pass is over: the plain path, beside the lean one."""
    config = SalUnSettings(steps=3, batch_size=2, lr=1e-3)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(salun(tiny, data, mask, config, seed=7))
    list(salun(other, data, mask, replace(config, max_grad_norm=1e9), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())


def test_random_label_is_salun_with_random_names(tiny: Diffusion, data: ForgetRetain) -> None:
    config = SalUnSettings(steps=2, batch_size=2, lr=1e-3, remap="random")
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(salun(tiny, data, None, config, seed=7))
    list(random_label(other, data, None, config, seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())


def test_learning_rate_warms_up_and_decays() -> None:
    config = SalUnSettings(steps=100, lr=1.0, warmup=4, decay=True)
    assert [config.lr_at(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert config.lr_at(4) == 1
    assert config.lr_at(52) == pytest.approx(0.5)
    assert 0 < config.lr_at(99) < 0.001


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("batch_size", 0), ("lr", -1.0), ("lr", float("nan")), ("max_grad_norm", 0.0)),
        *(("alpha", -1.0), ("alpha", float("inf"))),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        SalUnSettings(**{name: value})
