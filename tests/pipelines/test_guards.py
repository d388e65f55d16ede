"""Guards: each against a transcription of its formula, in every family."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig
from diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe import (
    StableDiffusionPipelineSafe,
)
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.guards import GUARDS, find_guard
from erase_concept.pipelines.guards.guard import AppliedGuard
from erase_concept.pipelines.guards.safree import PHRASES
from erase_concept.pipelines.guards.sld import UNSAFE
from erase_concept.pipelines.image_set import read_images
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import Sampling, iter_sample, sample_images, sample_latents
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.promptset import PromptRow, PromptSet
from erase_concept.settings import settings_of

PROMPTS = ("a square on a line", "one square", "a circle")
SCALES = (7.5, 3.0, 1.0)
# scale, warmup, threshold, momentum_scale, momentum_beta, as in the paper's table
SLD = {
    "sld-weak": (200, 15, 0.0, 0.0, 0.0),
    "sld-weak-diffusers": (20, 15, 0.0, 0.0, 0.0),
    "sld-medium": (1000, 10, 0.01, 0.3, 0.4),
    "sld-strong": (2000, 7, 0.025, 0.5, 0.7),
    "sld-max": (5000, 0, 1.0, 0.5, 0.7),
}


@pytest.fixture
def exact(family: Diffusion) -> Diffusion:
    """A model in fp64: SLD multiplies differences by thousands, and those of random weights are next to nothing."""
    for part in (family.unet, family.vae, *family.text_encoders.values()):
        part.double()
    return family


@pytest.fixture
def named(square: Concept) -> Concept:
    return replace(square, synonyms=("box",))


def latents(model: Diffusion, guard: AppliedGuard | None, steps: int, prompts: Sequence[str] = PROMPTS) -> Tensor:
    embeddings = model.encode_prompts(prompts) if guard is None else guard.encode(model, prompts)
    seeds, scales = range(len(prompts)), SCALES[: len(prompts)]
    return sample_latents(model, embeddings, model.encode_uncond(), seeds, scales, Sampling(steps=steps, guard=guard))


@torch.no_grad()
def transcribed(model: Diffusion, settings: tuple[float, ...], steps: int) -> Tensor:
    """SLD's pseudo code, one image after the other."""
    scale, warmup, threshold, momentum_scale, beta = settings
    e_empty, e_safety = model.encode_uncond(), model.encode_prompts(["square, box"])
    found = []
    for seed, (prompt, guidance) in enumerate(zip(PROMPTS, SCALES, strict=True)):
        e_prompt = model.encode_prompts([prompt])
        solver = diffusers.DPMSolverMultistepScheduler.from_config(model.scheduler.config, algorithm_type="dpmsolver++")
        solver.set_timesteps(steps)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(e_empty)
        momentum = torch.zeros_like(x)
        for i, t in enumerate(solver.timesteps):
            uncond, text, concept = (model.predict(x, t[None], e) for e in (e_empty, e_prompt, e_safety))
            phi = scale * (text - concept)
            mu = torch.where(text - concept < threshold, torch.minimum(phi.abs(), torch.ones(())), torch.zeros(()))
            gamma = mu * (concept - uncond) + momentum_scale * momentum
            momentum = beta * momentum + (1 - beta) * gamma
            if i < warmup * steps / 50:
                gamma = torch.zeros_like(gamma)
            x = solver.step(uncond + guidance * (text - uncond - gamma), t, x).prev_sample
        found.append(x)
    return torch.cat(found)


@pytest.mark.parametrize("name", SLD)
def test_sld_equals_its_pseudo_code(exact: Diffusion, named: Concept, name: str) -> None:
    found = latents(exact, find_guard(name, named), 10)
    torch.testing.assert_close(found, transcribed(exact, SLD[name], 10), rtol=1e-6, atol=1e-6)
    assert (found - latents(exact, None, 10)).abs().max() > 1e-4


def test_sld_counts_its_first_steps_in_the_papers_fifty(exact: Diffusion, named: Concept) -> None:
    guard = find_guard("sld-strong", named)  # 7 of 50
    embeddings, empty = exact.encode_prompts(["a square"]), exact.encode_uncond()
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(empty), torch.tensor(500)
    scale = torch.full((1, 1, 1, 1), 5.0).to(empty)
    plain = exact.cfg(x, t, embeddings, empty, scale)
    for steps, first in ((50, 7), (25, 4), (100, 14)):
        predict = guard.guide(exact, embeddings, empty, scale, steps)
        moved = [float((predict(x, t, step) - plain).abs().max()) > 1e-10 for step in range(20)]
        assert moved == [step >= first for step in range(20)]


def test_sld_with_scale_zero_is_plain_sampling_bit_for_bit(family: Diffusion, named: Concept) -> None:
    guard = find_guard("sld-max", named, {"scale": 0})
    assert torch.equal(latents(family, guard, 5), latents(family, None, 5))


def test_a_negative_prompt_is_that_of_diffusers(tiny: Diffusion, named: Concept) -> None:
    pipeline = tiny.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(tiny.scheduler.config)
    theirs = pipeline(
        "a square on a line",
        negative_prompt="square, box",
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    row, guard = PromptRow("a square on a line", 5, guidance=6.0), find_guard("negative-prompt", named)
    ((_, ours),) = sample_images(tiny, [row], Sampling(steps=4, scheduler="DDIMScheduler", guard=guard))
    ((_, plain),) = sample_images(tiny, [row], Sampling(steps=4, scheduler="DDIMScheduler"))
    assert np.abs(ours - theirs * 255).max() <= 1
    assert np.abs(ours.astype(int) - plain).max() > 1


def test_a_negative_prompt_replaces_the_empty_one_in_every_family(family: Diffusion, named: Concept) -> None:
    guard = find_guard("negative-prompt", named)
    away = family.encode_prompts(["square, box"])
    wanted = sample_latents(family, family.encode_prompts(PROMPTS), away, range(3), SCALES, Sampling(steps=3))
    assert torch.equal(latents(family, guard, 3), wanted)


def ends(model: Diffusion, ids: list[list[int]]) -> np.ndarray:
    """What stands for prompts of the given tokens as a whole: of SD 1 and 2 the text encoder's pooled output."""
    length = model.tokenizer.model_max_length
    padded = torch.tensor([row + [model.tokenizer.pad_token_id] * (length - len(row)) for row in ids])
    if len(model.text_encoders) == 1:
        return model.text_encoder(padded).pooler_output.double().numpy()
    both = [encoder(padded, output_hidden_states=True).hidden_states[-2] for encoder in model.text_encoders.values()]
    return torch.cat(both, -1)[range(len(ids)), [len(row) - 1 for row in ids]].double().numpy()


def onto(rows: np.ndarray) -> np.ndarray:
    """The projection onto the span of rows, from an orthonormal basis of it."""
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > 1e-10 * sizes[0]]
    return basis.T @ basis


@torch.no_grad()
def test_safree_equals_its_formulas(family: Diffusion, named: Concept) -> None:
    tokenizer, guard = family.tokenizer, find_guard("safree", named, {"filter": False})
    concept = onto(ends(family, [tokenizer(name).input_ids for name in ("square", "box")]))
    some = 0
    for prompt in (*PROMPTS, "box", "a thin red line"):
        ids = tokenizer(prompt, truncation=True).input_ids
        count = len(ids) - 2
        masked = ends(family, [[*ids[:i], 0, *ids[i + 1 :]] for i in range(1, count + 1)])
        far = np.linalg.norm(masked - masked @ concept, axis=1)
        plain = family.encode_prompts([prompt])[0].double().numpy()
        wanted = plain.copy()
        for i in range(count):
            if count > 1 and far[i] < 1.01 * np.delete(far, i).mean():
                continue
            some += 1
            wanted[i + 1] = (np.eye(len(concept)) - concept) @ onto(masked) @ plain[i + 1]
        found = guard.encode(family, [prompt])[0]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)
        assert np.array_equal(found[count + 1 :].numpy(), plain[count + 1 :].astype(np.float32))  # end, padding, whole
    assert some >= 3


def test_safree_leaves_a_prompt_without_words_alone(family: Diffusion, named: Concept) -> None:
    guard = find_guard("safree", named, {"filter": False})
    torch.testing.assert_close(guard.encode(family, [""]), family.encode_prompts([""]))


@torch.no_grad()
def test_safree_takes_the_projected_prompt_for_as_many_steps_as_it_changed(family: Diffusion, named: Concept) -> None:
    """10 sigmoid(2 k (10 b - m)), where b is 1 minus the mean cosine of a prompt's tokens with their projections."""
    tokenizer = family.tokenizer
    concept = onto(ends(family, [tokenizer(name).input_ids for name in ("square", "box")]))
    betas = []
    for prompt in (*PROMPTS, "a thin red line"):
        ids = tokenizer(prompt, truncation=True).input_ids
        masked = ends(family, [[*ids[:i], 0, *ids[i + 1 :]] for i in range(1, len(ids) - 1)])
        plain = family.encode_prompts([prompt])[0, : len(ids)].double().numpy()
        away = plain @ onto(masked) @ (np.eye(len(concept)) - concept)
        cosines = (plain * away).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(away, axis=1)
        betas.append(1 - cosines.mean())
    middle = float(10 * np.mean(betas))
    guard = find_guard("safree", named, {"filter_middle": middle, "filter_slope": 3.0})
    changing = find_guard("safree", named, {"filter": False})
    numbers = [round(10 / (1 + np.exp(-2 * 3.0 * (10 * beta - middle)))) for beta in betas]
    embedded = guard.encode(family, [*PROMPTS, "a thin red line"])
    assert embedded[:, -1].unique(dim=1).squeeze(1).tolist() == numbers
    assert len(set(numbers)) > 1
    plain, changed = family.encode_prompts(PROMPTS[:1]), changing.encode(family, PROMPTS[:1])
    negative = family.encode_prompts(["square, box"])
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    scale = torch.full((1, 1, 1, 1), 5.0)
    predict = guard.guide(family, embedded[:1], family.encode_uncond(), scale, 50)
    for step in range(12):
        used = changed if step <= numbers[0] else plain
        torch.testing.assert_close(predict(x, t, step), family.cfg(x, t, used, negative, scale))
    halved = guard.guide(family, embedded[:1], family.encode_uncond(), scale, 100)  # in twice as many steps
    torch.testing.assert_close(halved(x, t, 2 * numbers[0]), predict(x, t, numbers[0]))
    torch.testing.assert_close(halved(x, t, 2 * numbers[0] + 1), predict(x, t, numbers[0] + 1))


def test_safree_guides_away_from_its_terms_unless_told_otherwise(family: Diffusion, named: Concept) -> None:
    plain = {"filter": False, "alpha": 1e6}  # no token is projected
    away = latents(family, find_guard("safree", named, plain), 3, PROMPTS[:1])
    assert torch.equal(away, latents(family, find_guard("negative-prompt", named), 3, PROMPTS[:1]))
    without = latents(family, find_guard("safree", named, plain | {"negative": False}), 3, PROMPTS[:1])
    assert torch.equal(without, latents(family, None, 3, PROMPTS[:1]))


def test_the_authors_terms_are_kept_out_for_nudity(named: Concept) -> None:
    """The terms are those of the authors' code, and of diffusers' port of SLD."""
    nudity, unsafe = replace(named, kind="nudity"), replace(named, kind="unsafe")
    source = inspect.getsource(StableDiffusionPipelineSafe.__init__)
    theirs = "".join(re.findall(r'"([^"]*)"', source.partition("safety_concept: str")[2].partition("scheduler")[0]))
    for concept in (nudity, unsafe):
        (text,) = find_guard("sld-medium", concept).names
        assert text == theirs
    assert len(UNSAFE) == len(set(UNSAFE)) == 20
    assert find_guard("safree", nudity).names == PHRASES
    assert len(PHRASES) == len(set(PHRASES)) == 17
    assert (PHRASES[0], PHRASES[-1]) == ("Sexual Acts", "Sexual Gratification")
    assert find_guard("safree", unsafe).names == find_guard("negative-prompt", nudity).names == ("square", "box")
    assert find_guard("sld-max", named).names == ("square", "box")
    for name in ("sld-strong", "safree"):
        given = find_guard(name, nudity, {"terms": "blood,  open wounds ,"})
        assert given.names == ("blood", "open wounds")


def test_the_levels_are_those_of_diffusers_but_for_the_papers_weak() -> None:
    keys = ("guidance_scale", "warmup_steps", "threshold", "momentum_scale", "mom_beta")
    for name, level in (("weak-diffusers", "WEAK"), ("medium", "MEDIUM"), ("strong", "STRONG"), ("max", "MAX")):
        theirs = tuple(getattr(SafetyConfig, level)[f"sld_{key}"] for key in keys)
        ours = vars(GUARDS.find(f"sld-{name}").settings())
        fields = ("scale", "warmup", "threshold", "momentum_scale", "momentum_beta")
        assert tuple(ours[key] for key in fields) == theirs
    assert GUARDS.find("sld-weak").settings().scale == 200


@pytest.mark.parametrize("name", GUARDS.all())
def test_batch_size_changes_no_image(exact: Diffusion, named: Concept, name: str) -> None:
    guard = find_guard(name, named)
    rows = [PromptRow(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    whole, alone = (
        np.stack(
            [image for _, image in sorted(sample_images(exact, rows, Sampling(steps=4, batch_size=size, guard=guard)))]
        )
        for size in (3, 1)
    )
    assert np.array_equal(whole, alone)
    assert whole.std() > 1


def test_images_of_another_guard_never_mix(tiny: Diffusion, named: Concept, tmp_path: Path) -> None:
    prompts = PromptSet("p", (PromptRow("a square", 1), PromptRow("a line", 2)))
    medium, plain = find_guard("sld-medium", named), tmp_path / "plain"
    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    assert len(list(iter_sample(tiny, prompts, tmp_path / "out", Sampling(steps=2, guard=medium)))) == 2
    assert all(torch.equal(before[name], p) for name, p in tiny.unet.named_parameters())
    assert read_images(tmp_path / "out").settings["guard"] == "sld-medium: square, box"
    assert list(iter_sample(tiny, prompts, tmp_path / "out", Sampling(steps=2, guard=medium))) == []
    other = find_guard("sld-medium", replace(named, synonyms=()))
    for guard in (None, other, find_guard("sld-max", named)):
        with pytest.raises(RequestError, match="another model, prompt set or setting"):
            list(iter_sample(tiny, prompts, tmp_path / "out", Sampling(steps=2, guard=guard)))
    list(iter_sample(tiny, prompts, plain, Sampling(steps=2)))
    assert "guard" not in read_images(plain).settings
    with pytest.raises(RequestError, match="another model, prompt set or setting"):
        list(iter_sample(tiny, prompts, plain, Sampling(steps=2, guard=medium)))


def test_given_settings_are_used_and_told(exact: Diffusion, named: Concept) -> None:
    guard = find_guard("sld-weak", named, {"scale": "500", "warmup": 5, "momentum_beta": 0.2, "momentum_scale": 0.4})
    torch.testing.assert_close(
        latents(exact, guard, 10), transcribed(exact, (500, 5, 0.0, 0.4, 0.2), 10), rtol=1e-6, atol=1e-6
    )
    told = "sld-weak (scale=500.0, warmup=5, momentum_scale=0.4, momentum_beta=0.2): square, box"
    assert str(guard) == told
    assert str(find_guard("sld-weak", named, {"scale": 200})) == "sld-weak: square, box"


def test_safree_turns_fewer_tokens_the_more_is_asked_of_them(family: Diffusion, named: Concept) -> None:
    prompt = ["a thin red line on a square"]
    plain = family.encode_prompts(prompt)
    changed = [
        int(
            (find_guard("safree", named, {"alpha": alpha, "filter": False}).encode(family, prompt) != plain)
            .any(-1)
            .sum()
        )
        for alpha in (0.0, 0.01, 1.0, 1e6)
    ]
    assert changed == sorted(changed, reverse=True)
    assert changed[0] > changed[-1] == 0


def test_guards_that_do_not_exist_and_settings_out_of_range_are_refused(named: Concept) -> None:
    with pytest.raises(
        RequestError, match=r"^guard sld-hard: did you mean \S+\? allowed: negative-prompt, safree, sld"
    ):
        find_guard("sld-hard", named)
    for values, line in (
        ({"scale": -1}, r"^guard\.scale -1: "),
        ({"momentum_beta": 2}, r"^guard\.momentum_beta 2: "),
        ({"strength": 1}, r"^guard\.strength 1: no such setting; there are: scale, warmup, threshold, momentum_"),
    ):
        with pytest.raises(RequestError, match=line):
            find_guard("sld-strong", named, values)
    with pytest.raises(RequestError, match=r"^guard\.scale 1: no such setting; there are: none"):
        find_guard("negative-prompt", named, {"scale": 1})


def test_every_guard_says_what_its_settings_are() -> None:
    for guard in GUARDS.all().values():
        assert guard.summary.endswith(".")
        for setting in settings_of(guard.settings).values():
            assert setting.sentence
            assert setting.source
            assert setting.allowed
    strong = settings_of(GUARDS.find("sld-strong").settings)
    assert (strong["scale"].default, strong["scale"].allowed) == (2000.0, "number, at least 0")
