"""The built-in model's default method against a plain transcription of its formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.edit_then_train import EditThenTrainSettings, edit_then_train
from erase_concept.methods.mace import MACESettings, mace
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator
from erase_concept.training.loop import Record, TargetProgress


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("erase_scale", [0.0, 100.0])
def test_two_steps_equal_the_formulas(
    tiny: Diffusion,
    square: Concept,
    data: ForgetRetain,
    noised: Callable[..., Any],
    adam: Callable[..., None],
    guidance: float,
    erase_scale: float,
) -> None:
    """Targets are the base model's, and the steps begin where MACE's closed form leaves the weights of the mask."""
    terms = {"alpha": 0.25, "guidance": guidance, "erase_scale": erase_scale, "decay": False}
    settings = EditThenTrainSettings(steps=2, batch_size=3, lr=1e-2, **terms)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    base, edited = copy.deepcopy(tiny.unet), tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(
        mace(
            edited,
            data,
            mask,
            MACESettings(erase_scale=erase_scale, preserve_scale=0.1, ridge=1000.0, tokens="behind-name", lora=False),
            seed=0,
        )
    )
    unet = edited.unet.requires_grad_(True)
    records = [event for event in edit_then_train(tiny, data, mask, settings, seed=7) if isinstance(event, Record)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    forget_prompts = ["a square", "one square"]
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        which = data.forget_which[rows]
        x_f, t_f, _ = noised(data.forget_latents[rows], generator)
        retain_rows = draw(6, 3, generator)
        x_r, t_r, _ = noised(data.retain_latents[retain_rows], generator)
        c_f = tiny.encode_prompts([forget_prompts[i] for i in which])
        c_new = tiny.encode_prompts([forget_prompts[i].replace("square", "circle") for i in which])
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[retain_rows]])
        with torch.no_grad():
            wanted = (1 + guidance) * base(x_f, t_f, c_new).sample - guidance * base(x_f, t_f, c_f).sample
            kept = base(x_r, t_r, c_r).sample
        forget = (unet(x_f, t_f, c_f).sample - wanted).square().mean()
        retain = (unet(x_r, t_r, c_r).sample - kept).square().mean()
        loss = forget + 0.25 * retain
        # After a step of Adam, which divides by the gradient's own size, rounding shows where a gradient is next to 0.
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        assert records[step].terms == pytest.approx(
            {"forget": forget.item(), "retain": retain.item()}, rel=near, abs=1e-9
        )
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 1e-2, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        close = torch.isclose(p, q, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99, name


def test_is_like_every_trained_method(check_method: Callable[..., None], data: ForgetRetain) -> None:
    check_method(edit_then_train, data, EditThenTrainSettings(steps=6))


def test_tells_how_far_the_targets_are_and_computes_only_what_is_left(
    tiny: Diffusion, data: ForgetRetain, tmp_path: Path
) -> None:
    settings = EditThenTrainSettings(steps=6, batch_size=2, lr=1e-3, checkpoint_every=2, accumulation=2)
    models = [tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(3)]
    list(edit_then_train(models[0], data, None, settings, seed=7))
    file = tmp_path / "checkpoints" / "last.safetensors"
    interrupted = edit_then_train(models[1], data, None, settings, seed=7, checkpoint=file)
    assert [next(interrupted) for _ in range(6)] == [TargetProgress(step, 6) for step in range(1, 7)]
    assert [next(interrupted).step for _ in range(5)] == [1, 2, 3, 4, 5]
    interrupted.close()
    records = list(edit_then_train(models[2], data, None, settings, seed=7, checkpoint=file))
    assert [(type(record), record.step) for record in records] == [
        (TargetProgress, 5),
        (TargetProgress, 6),
        (Record, 5),
        (Record, 6),
    ]
    first = models[0].unet.state_dict()
    assert all(torch.equal(first[name], value) for name, value in models[2].unet.state_dict().items())


def test_begins_at_the_closed_form_with_targets_of_the_base_model(tiny: Diffusion, data: ForgetRetain) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=4)
    base, edited, still = (tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(3))
    list(
        mace(
            edited,
            data,
            mask,
            MACESettings(erase_scale=100.0, preserve_scale=0.1, ridge=1000.0, tokens="behind-name", lora=False),
            seed=0,
        )
    )
    assert any((p != q).any() for p, q in zip(base.unet.parameters(), edited.unet.parameters(), strict=True))
    settings = EditThenTrainSettings(steps=1, batch_size=3, lr=0.0, guidance=0.0, erase_scale=100.0)
    *_, record = edit_then_train(still, data, mask, settings, seed=7)
    for (name, p), q in zip(still.unet.named_parameters(), edited.unet.parameters(), strict=True):
        assert torch.equal(p, q), name
    generator = stage_generator(7, "step", 0, 0, 0)
    forget = data.forget_batch(base, data.draw_forget(3, generator), generator)
    with torch.no_grad():
        wanted = base.predict(forget.noisy, forget.timesteps, forget.remapped)
        now = edited.predict(forget.noisy, forget.timesteps, forget.embeddings)
    assert record.terms["forget"] == pytest.approx((now - wanted).square().mean().item(), rel=1e-5)


def test_the_closed_form_of_a_concept_told_twice_is_that_of_the_concept(tiny: Diffusion, data: ForgetRetain) -> None:
    doubled = {
        "forget": 0,
        "remap": 1,
        "forget_spans": 0,
        "anchor_spans": 0,
        "forget_ids": 0,
        "anchor_ids": 0,
        "forget_parts": 0,
    }
    longer = replace(data, **{name: torch.cat([getattr(data, name)] * 2, dim) for name, dim in doubled.items()})
    twice = replace(longer, forget_parts=torch.arange(2).repeat_interleave(len(data.forget)))
    settings = EditThenTrainSettings(steps=1, batch_size=2, lr=0.0, erase_scale=100.0)
    edited = []
    for some in (data, twice, longer):
        model = tiny.with_components(unet=copy.deepcopy(tiny.unet))
        list(edit_then_train(model, some, None, settings, seed=7))
        edited.append(torch.cat([p.flatten() for p in model.unet.parameters()]))
    torch.testing.assert_close(edited[1], edited[0])
    with pytest.raises(AssertionError):  # as prompts of one concept they weigh twice as much
        torch.testing.assert_close(edited[2], edited[0])


def test_begins_at_the_base_model_where_the_mask_has_no_keys_and_values(tiny: Diffusion, data: ForgetRetain) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=4, scope="self-attention")
    one, other = (tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(2))
    for model, scale in ((one, 8.0), (other, 0.0)):
        settings = EditThenTrainSettings(steps=1, batch_size=2, lr=1e-3, erase_scale=scale)
        list(edit_then_train(model, data, mask, settings, seed=7))
    assert all(torch.equal(p, q) for p, q in zip(one.unet.parameters(), other.unet.parameters(), strict=True))


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain) -> None:
    settings = EditThenTrainSettings(steps=3, batch_size=2, lr=1e-3)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(edit_then_train(tiny, data, mask, settings, seed=7))
    list(edit_then_train(other, data, mask, replace(settings, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())
