"""SPM's loss, update and fusion against a plain transcription of its formulas and of DDIM."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.make_data import make_data
from erase_concept.methods.spm import SPMSettings, spm
from erase_concept.pipelines.formats.lora import save_lora
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.training.loop import Record

SHORT = SPMSettings(steps=4, batch_size=2, lr=1e-2, warmup=0, sampling_steps=3, anchors=2, checkpoint_every=2)


def prompts_alone(model: Diffusion, concept: Concept) -> ForgetRetain:
    return make_data(model, concept, DataRecipe(steps=2, guidance=2.0), seed=1, parts=())


def test_two_steps_equal_the_formulas(tiny: Diffusion, square: Concept) -> None:
    plain = {"optimizer": "adam", "weight_decay": 0.0, "warmup": 0, "decay": False, "start_guidance": 2.0}
    config = SPMSettings(steps=2, batch_size=2, lr=1e-2, eta=0.5, sampling_steps=5, anchoring=4.0, anchors=3, **plain)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    base = copy.deepcopy(tiny.unet)
    data = prompts_alone(tiny, square)
    records = [event for event in spm(tiny, data, mask, config, seed=7) if isinstance(event, Record)]

    modules = {
        n: m for n, m in base.named_modules() if "attentions" in n and m.__class__.__name__ in ("Linear", "Conv2d")
    }
    generator = stage_generator(7, "adapters")
    downs, ups = {}, {}
    for name, module in modules.items():
        bound = module.weight[0].numel() ** -0.5
        downs[name] = ((2 * torch.rand(module.weight[0].numel(), generator=generator) - 1) * bound).requires_grad_()
        ups[name] = torch.zeros(len(module.weight), requires_grad=True)

    def fused() -> dict[str, torch.Tensor]:
        products = {n: (ups[n][:, None] * downs[n][None]).reshape(m.weight.shape) for n, m in modules.items()}
        return {f"{n}.weight": m.weight + products[n] * mask.dense(f"{n}.weight") for n, m in modules.items()}

    def adapted(x: torch.Tensor, t: int, prompts: torch.Tensor) -> torch.Tensor:
        return functional_call(base, fused(), (x, t, prompts)).sample

    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    empty = tiny.encode_prompts([""]).expand(2, -1, -1)
    retained = tiny.encode_prompts(square.retain_prompts)
    stops = []
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        which = draw(2, 2, generator)
        concept = tiny.encode_prompts([["a square", "one square"][i] for i in which])
        anchor = tiny.encode_prompts([["a circle", "one circle"][i] for i in which])
        stops.append(int(torch.randint(0, 5, (1,), generator=generator)))
        seeds = torch.randint(0, 2**62, (2,), generator=generator).tolist()
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        a, b = concept.flatten(1), retained.flatten(1)
        cosine = a @ b.T / a.norm(dim=1, keepdim=True) / b.norm(dim=1)
        drawn = torch.multinomial(1 - cosine.abs(), 3, replacement=True, generator=generator)
        others = retained[drawn.flatten()]
        with torch.no_grad():
            for t in range(800, 800 - 200 * stops[-1], -200):
                without = adapted(x, t, empty)
                e = without + 2 * (adapted(x, t, concept) - without)
                clean = (x - (1 - kept[t]).sqrt() * e) / kept[t].sqrt()
                x = kept[t - 200].sqrt() * clean + (1 - kept[t - 200]).sqrt() * e
            t = 800 - 200 * stops[-1]
            instead = base(x, t, anchor).sample
            wanted = instead - 0.5 * (base(x, t, concept).sample - instead)
            again = torch.stack([x[0]] * 3 + [x[1]] * 3)
            left = base(again, t, others).sample
        forget = (adapted(x, t, concept) - wanted).square().mean()
        anchoring = (adapted(again, t, others) - left).square().mean()
        loss = forget + 4 * anchoring
        near = (1e-5, 1e-3)[step]
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        terms = {"forget": forget.item(), "retain": anchoring.item()}
        assert records[step].terms == pytest.approx(terms, rel=near, abs=1e-9)
        if step == 0:
            assert anchoring == 0  # nothing has moved
            leaves = [*downs.values(), *ups.values()]
            gradients = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                for p, g in zip(leaves, gradients, strict=True):
                    p -= 0.01 * g / (g.abs() + 1e-8)
    assert max(stops) > 0  # some of it was sampled


def test_what_is_fused_is_what_was_trained_and_of_rank_one(tiny: Diffusion, square: Concept, tmp_path: Path) -> None:
    before = copy.deepcopy(tiny.unet)
    order = [name for name, _ in tiny.unet.named_parameters()]
    list(spm(tiny, prompts_alone(tiny, square), None, SHORT, seed=7))
    assert [name for name, _ in tiny.unet.named_parameters()] == order
    assert not any("forward" in vars(module) for module in tiny.unet.modules())
    changed = set()
    for (name, old), new in zip(before.named_parameters(), tiny.unet.parameters(), strict=True):
        values = torch.linalg.svdvals((new - old).double().flatten(1)) if old.ndim > 1 else torch.zeros(2)
        if not torch.equal(old, new):
            changed.add(name)
            assert values[1] < 1e-3 * values[0], name  # what is left is the rounding of the sum
    assert changed == {n for n, p in before.named_parameters() if "attentions" in n and p.ndim > 1}
    options = {"rank": 1, "style": "kohya", "dtype": torch.float32, "about": {}}
    fit = save_lora(before, tiny.unet, tiny.family, tmp_path / "adapter.safetensors", **options)
    assert fit.left_out == 0
    assert fit.errors[1] < 1e-3


def test_freezes_what_the_mask_freezes_and_resumes_to_the_same_bits(
    tiny: Diffusion, square: Concept, tmp_path: Path
) -> None:
    with torch.no_grad():
        for p in tiny.unet.parameters():
            p.view(-1)[::3] = -0.0  # which a change of zero would make positive
    mask, file = masks.random(tiny.unet, 0.5, seed=4, scope="cross-attention"), tmp_path / "last.safetensors"
    data = prompts_alone(tiny, square)
    models = [tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(4)]
    list(spm(models[0], data, mask, SHORT, seed=7))
    interrupted = spm(models[1], data, mask, SHORT, seed=7, checkpoint=file)
    assert [next(interrupted).step for _ in range(3)] == [1, 2, 3]
    interrupted.close()
    before = dict(tiny.unet.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in models[1].unet.named_parameters())  # nothing is fused yet
    assert [event.step for event in spm(models[2], data, mask, SHORT, seed=7, checkpoint=file)] == [3, 4]
    assert list(spm(models[3], data, mask, SHORT, seed=7, checkpoint=file)) == []  # killed before it was exported
    others = [model.unet.state_dict() for model in models[2:]]
    moved = 0
    for name, after in models[0].unet.named_parameters():
        assert all(torch.equal(after, other[name]) for other in others), name
        chosen = mask.dense(name)
        assert torch.equal(before[name][~chosen].view(torch.int32), after[~chosen].view(torch.int32)), name
        moved += int((before[name] != after).sum())
    assert moved > 0


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, square: Concept) -> None:
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    data = prompts_alone(tiny, square)
    list(spm(tiny, data, None, SHORT, seed=7))
    list(spm(other, data, None, replace(SHORT, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())
    assert not other.unet.is_gradient_checkpointing


@pytest.mark.parametrize(("name", "value"), [("anchoring", -1.0), ("anchors", 0), ("eta", -1.0), ("lr", float("nan"))])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        SPMSettings(**{name: value})
