"""EraseDiff's direction against a plain transcription of its formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.methods.erasediff import EraseDiffSettings, erasediff, pass_length
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import recipe_for
from erase_concept.run import check
from erase_concept.seed import stage_generator

PAPER = {"constraint": "projection", "target": "noise"}


@pytest.mark.parametrize("eta", [0.0, 0.5, 5.0])
def test_two_steps_equal_the_papers_formulas(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any, eta: float
) -> None:
    config = EraseDiffSettings(steps=2, batch_size=3, lr=1e-2, eta=eta, inner_steps=3, inner_lr=1e-3, **PAPER)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(erasediff(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    dense = torch.cat([mask.dense(name).view(-1) for name, _ in unet.named_parameters()]).float()
    for step, near in enumerate((1e-4, 1e-2)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        x_f, t_f, _ = noised(data.forget_latents[rows], generator)
        c_f = tiny.encode_prompts([("a square", "one square")[i] for i in data.forget_which[rows]])
        rows = draw(6, 3, generator)
        x_r, t_r, noise_r = noised(data.retain_latents[rows], generator)
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        uniform = torch.rand(3, 4, 8, 8, generator=generator)

        def flat_gradient(loss: torch.Tensor, module: Any) -> torch.Tensor:
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]) * dense

        inner = copy.deepcopy(unet)
        for _ in range(3):
            loss = (inner(x_f, t_f, c_f).sample - uniform).square().mean()
            change = 1e-3 * flat_gradient(loss, inner)
            with torch.no_grad():
                for p, d in zip(inner.parameters(), change.split([p.numel() for p in inner.parameters()]), strict=True):
                    p -= d.view_as(p)
        forget = (unet(x_f, t_f, c_f).sample - uniform).square().mean()
        retain = (unet(x_r, t_r, c_r).sample - noise_r).square().mean()
        gap = forget - (inner(x_f, t_f, c_f).sample - uniform).square().mean()
        assert gap > 0
        g, d = flat_gradient(retain, unet), flat_gradient(forget, unet)
        multiplier = max(0.0, float((eta * (d @ d) - g @ d) / (d @ d)))
        terms = {"forget": forget.item(), "retain": retain.item(), "gap": gap.item(), "multiplier": multiplier}
        assert records[step].terms == pytest.approx(terms, rel=near, abs=1e-3 if step else 1e-5)
        assert records[step].loss == pytest.approx((retain + multiplier * forget).item(), rel=near)
        sizes = [p.numel() for p in unet.parameters()]
        parts = (g + multiplier * d).split(sizes)
        adam(
            unet, [part.view_as(p) for part, p in zip(parts, unet.parameters(), strict=True)], moments, step, 0.01, mask
        )
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-3).float().mean() > 0.99, name


def test_passes_equal_the_authors_algorithm(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any
) -> None:
    """Four rows and batches of two make passes of two steps; K = 2 makes an epoch of eight. Two epochs are taken."""
    config = EraseDiffSettings(epochs=2, batch_size=2, lr=1e-3, passes=2, forget_weight=0.5).resolved(4)
    assert config.steps == 16
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(erasediff(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    prompts, anchor = (tiny.encode_prompts([f"a {name}", f"one {name}"]) for name in ("square", "circle"))
    step = 0

    def forget_loss(generator: torch.Generator) -> torch.Tensor:
        rows = draw(4, 2, generator)
        x, t, _ = noised(data.forget_latents[rows], generator)
        which = data.forget_which[rows]
        return (unet(x, t, prompts[which]).sample - unet(x, t, anchor[which]).sample.detach()).square().mean()

    def update(loss: torch.Tensor) -> None:
        nonlocal step
        assert records[step].loss == pytest.approx(loss.item(), rel=2e-3, abs=1e-5)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 1e-3, mask)
        step += 1

    for _ in range(2):  # epochs
        theta = copy.deepcopy(unet.state_dict())
        for _ in range(2):  # K
            inner = []
            for _ in range(2):
                loss = forget_loss(stage_generator(7, "step", step, 0, 0))
                inner.append(loss.item())
                update(loss)
            unet.load_state_dict(theta)
            for _ in range(2):
                generator = stage_generator(7, "step", step, 0, 0)
                forget = forget_loss(generator)
                rows = draw(6, 2, generator)
                x, t, noise = noised(data.retain_latents[rows], generator)
                c = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
                retain = (unet(x, t, c).sample - noise).square().mean()
                update(retain + 0.5 * (forget - sum(inner) / 2))
    assert step == len(records) == 16
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_a_killed_run_goes_on_from_the_last_whole_epoch(tiny: Diffusion, data: ForgetRetain, tmp_path: Path) -> None:
    config = EraseDiffSettings(steps=9, batch_size=2, lr=1e-3)  # rounded down to two epochs of four steps
    file = tmp_path / "last.safetensors"
    whole, killed, again = (tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(3))
    list(erasediff(whole, data, None, config, seed=7))
    running = erasediff(killed, data, None, config, seed=7, checkpoint=file)
    assert [next(running).step for _ in range(7)][-1] == 7
    running.close()
    assert [record.step for record in erasediff(again, data, None, config, seed=7, checkpoint=file)] == [5, 6, 7, 8]
    state = again.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.unet.state_dict().items())


@pytest.mark.parametrize(
    ("steps", "passes", "rows", "expected"),
    [(120, 1, 960, (60, 1)), (7, 1, 64, (3, 1)), (2, 1, 64, (1, 1)), (300, 2, 512, (32, 2)), (4, 2, 1, (1, 1))],
)
def test_steps_make_whole_epochs(steps: int, passes: int, rows: int, expected: tuple[int, int]) -> None:
    assert pass_length(EraseDiffSettings(steps=steps, passes=passes), rows) == expected


def test_too_few_steps_for_an_epoch_are_refused() -> None:
    recipe = recipe_for("emojinette", "church", method="erasediff", preset_name="paper", settings={"steps": 1})
    with pytest.raises(RequestError, match=r"settings\.steps 1: must be at least"):
        check(recipe)


def test_the_inner_steps_leave_no_trace_when_nothing_is_learnt(tiny: Diffusion, data: ForgetRetain) -> None:
    before = copy.deepcopy(tiny.unet.state_dict())
    list(erasediff(tiny, data, None, EraseDiffSettings(steps=2, batch_size=2, lr=0.0, inner_lr=1e-2, **PAPER), seed=7))
    assert all(torch.equal(before[name], value) for name, value in tiny.unet.state_dict().items())


def test_draws_the_concept_to_uniform_noise(tiny: Diffusion, data: ForgetRetain) -> None:
    config = EraseDiffSettings(steps=30, batch_size=4, lr=1e-3, eta=1.0, **PAPER)
    records = list(erasediff(tiny, data, None, config, seed=7))
    assert records[-1].terms["forget"] < 0.8 * records[0].terms["forget"]


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(erasediff, data, EraseDiffSettings(**PAPER))


@pytest.mark.parametrize("form", [{}, PAPER])
def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain, form: dict[str, Any]) -> None:
    config = EraseDiffSettings(steps=2, batch_size=2, lr=1e-3, **form)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(erasediff(tiny, data, None, config, seed=7))
    list(erasediff(other, data, None, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("eta", -1.0), ("inner_steps", 0), ("inner_lr", 0.0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        EraseDiffSettings(**{name: value})
