"""SPM's loss, update and fusion against a plain transcription of its formulas and of DDIM."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
from torch.func import functional_call

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.make_data import make_data
from erase_concept.methods.spm import SPMSettings, noise_like, spm, varied_size
from erase_concept.pipelines.formats.lora import save_lora
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe
from erase_concept.seed import stage_generator
from erase_concept.training.loop import Record

SHORT = SPMSettings(steps=4, batch_size=2, lr=1e-2, warmup=0, sampling_steps=3, anchors=2, checkpoint_every=2)


def prompts_alone(model: Diffusion, concept: Concept) -> ForgetRetain:
    return make_data(model, concept, DataRecipe(steps=2, guidance=2.0), seed=1, parts=())


@pytest.mark.parametrize("anchors_from", ["noise", "retain"])
def test_two_steps_equal_the_formulas(tiny: Diffusion, square: Concept, anchors_from: str) -> None:
    """Noise goes with sizes that vary, as in the authors' code: of 16 pixels these are 8 and 12, in latents 4 and 6."""
    plain = {"optimizer": "adam", "weight_decay": 0.0, "warmup": 0, "decay": False, "start_guidance": 2.0}
    plain |= {"anchors_from": anchors_from, "vary_size": anchors_from == "noise"}
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
    stops, shapes = [], set()
    for step in range(2):
        generator = stage_generator(7, "step", step, 0, 0)
        which = draw(2, 2, generator)
        concept = tiny.encode_prompts([["a square", "one square"][i] for i in which])
        anchor = tiny.encode_prompts([["a circle", "one circle"][i] for i in which])
        shape = (4, 8, 8)
        if anchors_from == "noise":
            shape = (4, *(8 * n // 8 // 2 * 2 for n in torch.randint(4, 8, (2,), generator=generator).tolist()))
        shapes.add(shape)
        stops.append(int(torch.randint(0, 5, (1,), generator=generator)))
        seeds = torch.randint(0, 2**62, (2,), generator=generator).tolist()
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        a, b = concept.flatten(1), retained.flatten(1)
        cosine = a @ b.T / a.norm(dim=1, keepdim=True) / b.norm(dim=1)
        if anchors_from == "retain":
            drawn = torch.multinomial(1 - cosine.abs(), 3, replacement=True, generator=generator)
            others = retained[drawn.flatten()]
        else:
            others = torch.stack([noise_for(one, generator) for one in concept for _ in range(3)])
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


def noise_for(prompt: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A direction, accepted with 1 - cos, and a length of 0.8 to 1.2 times the prompt's."""
    while True:
        noise = torch.randn(prompt.shape, generator=generator)
        cosine = (noise * prompt).sum() / noise.square().sum().sqrt() / prompt.square().sum().sqrt()
        if torch.rand((), generator=generator) < 1 - cosine:
            scale = 0.8 + 0.4 * torch.rand((), generator=generator)
            return noise * scale * prompt.square().sum().sqrt() / noise.square().sum().sqrt()


def test_noise_anchors_have_the_prompts_length_and_xls_whole_prompt_its_own(family: Diffusion, square: Concept) -> None:
    prompts = family.encode_prompts(square.forget_prompts).repeat(50, 1, 1)
    noise = noise_like(prompts, 16, torch.Generator().manual_seed(3))
    assert noise.shape == prompts.shape
    for part in (slice(0, 16), slice(16, None)):
        ratio = noise[:, part].flatten(1).norm(dim=1) / prompts[:, part].flatten(1).norm(dim=1)
        if prompts[:, part].shape[1]:
            assert ratio.min() > 0.8 - 1e-5
            assert ratio.max() < 1.2 + 1e-5
            assert ratio.std() > 0.1
    assert not noise[prompts == 0].any()
    alike = torch.cosine_similarity(noise[:, :16].flatten(1), prompts[:, :16].flatten(1))
    assert alike.abs().max() < 0.35  # of 256 numbers, whose cosines vary by 1/16


def test_sizes_vary_as_the_authors_do_for_512_pixels(tiny: Diffusion, square: Concept) -> None:
    """SD's VAE makes 8 pixels one, and its UNet halves three times."""
    parts = {name: SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * 4)) for name in ("vae", "unet")}
    sd, data = replace(tiny, components=parts), prompts_alone(tiny, square)
    data = replace(data, forget_latents=torch.empty(0, 4, 64, 64))
    generator = torch.Generator().manual_seed(0)
    found = {side for _ in range(60) for side in varied_size(sd, data, generator)}
    assert found == {256, 320, 384, 448}


def test_the_learning_rate_is_that_of_diffusers_cosines_with_restarts() -> None:
    config = SPMSettings(steps=300, warmup=0)
    assert (config.cycles, config.decay, SPMSettings().warmup) == (3, True, 500)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, 300, num_cycles=3)
    for step in range(300):
        assert config.lr_at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6, abs=1e-18)
        optimizer.step()
        schedule.step()


def test_the_change_is_added_as_often_as_asked(tiny: Diffusion, square: Concept) -> None:
    once, twice = (tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in range(2))
    data = prompts_alone(tiny, square)
    list(spm(once, data, None, SHORT, seed=7))
    list(spm(twice, data, None, replace(SHORT, strength=2.0), seed=7))
    for base, first, second in zip(*(m.unet.parameters() for m in (tiny, once, twice)), strict=True):
        torch.testing.assert_close(second - base, 2 * (first - base), rtol=1e-4, atol=1e-6)


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
    fit = save_lora(tiny.with_components(unet=before), tiny.unet, tmp_path / "adapter.safetensors", **options)
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


@pytest.mark.parametrize(
    ("name", "value"), [("anchoring", -1.0), ("anchors", 0), ("strength", 0.0), ("eta", -1.0), ("lr", float("nan"))]
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        SPMSettings(**{name: value})
