"""A training that goes wrong stops: an exploding loss, a dead mask, retained prompts that collapse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain
from erase_concept.errors import EraseError
from erase_concept.methods import METHODS
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.training import health
from erase_concept.training.health import watched, watched_losses
from erase_concept.training.loop import Record, Training

SETTINGS = Training(steps=40, probe_every=0)


def steps(losses: list[float], after: Callable[[int], None] = lambda step: None) -> Iterator[Record]:
    """Yield a record of each loss, after something was done to the model."""
    for step, loss in enumerate(losses, start=1):
        after(step)
        yield Record(step, len(losses), loss, {}, 1e-5, 0.0)


@pytest.mark.parametrize("first", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_may_be_a_hundred_times_the_first_ones(
    tiny: Diffusion, data: ForgetRetain, first: float, sign: int
) -> None:
    """Measured by the largest of the first ten, and by 1 at least, for some losses begin at zero."""
    most = sign * 100 * max(1.0, first)
    for last, grown in ((most, False), (most * 1.01, True)):
        losses = [sign * first / 2] * 9 + [sign * first] + [last]
        events = watched(steps(losses), tiny, data, None, SETTINGS)
        if grown:
            with pytest.raises(EraseError, match="at step 11, more than 100 times that of the first steps: ") as found:
                list(events)
            advice = "lower lr or set max_grad_norm, and choose another folder"
            assert str(found.value).endswith(f": {advice}"), "no checkpoint is promised"
        else:
            assert len(list(events)) == 11


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [([0.1] + [1e6] * 39, 2), ([0.06, 0.67, 293, 172, 1110] + [1e4] * 35, 3), ([0.06, -0.67, -293] + [-1e4] * 37, 3)],
)
def test_a_loss_that_explodes_in_the_first_steps_is_measured_by_those_before_it(
    tiny: Diffusion, data: ForgetRetain, losses: list[float], stopped: int
) -> None:
    """Else it would raise the limit for itself, and for all later ones."""
    with pytest.raises(EraseError, match=f"at step {stopped}, more than 100 times that of the first steps"):
        list(watched(steps(losses), tiny, data, None, SETTINGS))


@pytest.mark.parametrize("losses", [[0.0, 1e-6, 1e-3, 0.5, 20.0, 90.0] * 5, [400.0, 0.1, 300.0, 4e4] * 5])
def test_a_loss_that_begins_at_zero_may_grow_in_the_first_steps(
    tiny: Diffusion, data: ForgetRetain, losses: list[float]
) -> None:
    """An honest one that grows from 0 stays below 100, and the very first loss has nothing before it."""
    assert len(list(watched(steps(losses), tiny, data, None, SETTINGS))) == len(losses)


def test_a_resumed_run_is_measured_by_the_first_steps_of_all(tiny: Diffusion, data: ForgetRetain) -> None:
    """Else a run that goes on where it exploded would find its losses usual."""
    with pytest.raises(EraseError, match="at step 1, "):
        list(watched(steps([400.0]), tiny, data, None, SETTINGS, [0.1] * 50))
    assert list(watched(steps([400.0]), tiny, data, None, SETTINGS))
    assert list(watched(steps([4e9]), tiny, data, None, replace(SETTINGS, max_loss_growth=0), [0.1] * 50))


def test_a_classifiers_loss_may_fall_without_bound_and_not_rise() -> None:
    """Gradient ascent is meant to raise it, as a loss below zero; SCRUB does so in some of its steps."""
    for honest in ([-0.1, -300.0, -1e6] * 9, [-0.1, 2.0, -500.0, 150.0] * 9, [0.0, 0.5, 99.0] * 9):
        assert len(list(watched_losses(steps(honest), 100.0))) == len(honest)
    for losses, earlier, stopped in (([-400.0, 0.1, 101.0], [], 3), ([101.0], [-400.0, 0.1], 1)):
        with pytest.raises(EraseError, match=f"at step {stopped}, more than .*: lower lr, and choose another folder$"):
            list(watched_losses(steps(losses), 100.0, earlier))
        assert list(watched_losses(steps(losses), 0, earlier))


def shaken(model: Diffusion, size: float) -> Callable[[int], None]:
    generator = torch.Generator().manual_seed(0)

    def shake(step: int) -> None:
        for p in model.unet.parameters():
            p += size * torch.randn(p.shape, generator=generator)

    return torch.no_grad()(shake)


def test_predictions_that_leave_the_base_models_stop_the_run(tiny: Diffusion, data: ForgetRetain) -> None:
    settings = replace(SETTINGS, probe_every=2, checkpoint_every=3)
    seen: list[int] = []
    events = watched(steps([0.1] * 9, shaken(tiny, 0.4)), tiny, data, None, settings)
    with pytest.raises(EraseError, match=r"predictions for retained prompts differ .* at step 2: lower lr"):
        seen.extend(event.step for event in events if isinstance(event, Record))
    assert seen == [1], "the step that is found wrong gets into no log and no checkpoint"


def test_the_model_is_looked_at_before_each_checkpoint_and_at_the_end(
    tiny: Diffusion, data: ForgetRetain, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(health._Probe, "check", lambda self, event, limit: looked.append(event.step))
    list(watched(steps([0.1] * 10), tiny, data, None, replace(SETTINGS, probe_every=4, checkpoint_every=3)))
    assert looked == [3, 4, 6, 8, 9, 10]


def test_small_changes_and_a_limit_of_0_let_it_run(tiny: Diffusion, data: ForgetRetain) -> None:
    settings = replace(SETTINGS, probe_every=1)
    assert len(list(watched(steps([0.1] * 3, shaken(tiny, 1e-4)), tiny, data, None, settings))) == 3
    off = replace(settings, max_retain_change=0)
    assert len(list(watched(steps([0.1] * 3, shaken(tiny, 1.0)), tiny, data, None, off))) == 3


def test_weights_that_are_no_numbers_stop_it_too(tiny: Diffusion, data: ForgetRetain) -> None:
    settings = replace(SETTINGS, probe_every=1)
    with pytest.raises(EraseError, match="by nan"):
        list(watched(steps([0.1], shaken(tiny, float("nan"))), tiny, data, None, settings))


def test_nothing_that_changes_is_a_dead_mask(tiny: Diffusion, data: ForgetRetain) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=4)
    settings = replace(SETTINGS, probe_every=5)
    with pytest.raises(EraseError, match="no weight has changed in 10 steps: raise lr, or choose a mask"):
        list(watched(steps([0.1] * 40), tiny, data, mask, settings))
    assert len(list(watched(steps([0.1] * 4), tiny, data, mask, settings))) == 4, "one look is no proof"


def test_a_text_encoder_that_learns_is_alive(tiny: Diffusion, data: ForgetRetain) -> None:
    """The UNet's predictions are of prompts that were embedded before: they stay as they are."""
    mask = masks.token_rows(tiny.text_encoder, torch.tensor([5]))
    table = tiny.text_encoder.get_input_embeddings().weight

    @torch.no_grad()
    def learn(step: int) -> None:
        table[5] += 0.01

    assert len(list(watched(steps([0.1] * 6, learn), tiny, data, mask, replace(SETTINGS, probe_every=2)))) == 6


def test_watching_changes_no_bit(tiny: Diffusion, data: ForgetRetain, new_model: Any, tokenizer: Any) -> None:
    """Of any method's weights: neither a generator nor a weight is touched."""
    method = METHODS.find("esd-x")
    settings = method.settings(steps=3, batch_size=2, lr=1e-3, probe_every=1, sampling_steps=2)
    alone, seen = new_model(tokenizer), new_model(tokenizer)
    list(method.start(alone, data, None, settings, seed=1))
    list(watched(method.start(seen, data, None, settings, seed=1), seen, data, None, settings))
    for one, other in zip(alone.unet.parameters(), seen.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_stops_with_the_checkpoint_before(
    tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny, Path("model"))
    settings = {"steps": 6, "batch_size": 2, "lr": 1.0, "checkpoint_every": 2, "max_loss_growth": 0}
    values = {"model": "model", "concept": square, "data": {"forget": 2, "retain": 2, "steps": 2}}
    recipe = make_recipe(values | {"settings": settings | {"max_retain_change": 0.5}})
    with pytest.raises(EraseError, match=r"(?s)predictions for retained prompts|loss is"):
        list(iter_erase(recipe, Path("run")))
    assert not Path("run/run.json").exists()
