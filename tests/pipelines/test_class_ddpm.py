"""A class-conditional DDPM: labels in the place of prompts, behind the contract that Stable Diffusion has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.nn.functional import mse_loss

from erase_concept.errors import RequestError
from erase_concept.make_data import make_data
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families.class_ddpm import Pixels
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.tokenizer import label_tokenizer
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import Sampling, sample_latents
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe, make_recipe
from erase_concept.run import iter_erase
from erase_concept.run_folder import read_run

LABELS = ("bag", "boot", "coat")


@pytest.fixture
def ddpm(tmp_path: Path) -> Diffusion:
    """A random model of three labels, 8 x 8 grey pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=len(LABELS) + 1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    tokenizer = label_tokenizer(LABELS, tmp_path / "words")
    components = {"tokenizer": tokenizer, "vae": Pixels(1, 8), "unet": unet.eval(), "scheduler": scheduler}
    for part in ("vae", "unet"):
        components[part].requires_grad_(False)
    return Diffusion(FAMILIES.find("class-ddpm"), components, source="tiny")


@pytest.fixture
def bag() -> Concept:
    return Concept("bag", "object", "boot", ("{O}",), retain=("boot", "coat"))


def test_a_label_is_encoded_as_its_class(ddpm: Diffusion) -> None:
    assert ddpm.encode_prompts(["coat", "", "bag"]).flatten().tolist() == [2, 3, 0]
    assert ddpm.encode_uncond().flatten().tolist() == [3]
    assert ddpm.encode_prompts(["Boot"]).flatten().tolist() == [1]
    for wrong in ("hat", "bag boot", "a bag", "b", "é", "ba"):
        with pytest.raises(RequestError, match=r"none of the model's labels: bag, boot, coat"):
            ddpm.encode_prompts(["bag", wrong])


def test_labels_that_would_not_be_one_token_are_refused(tmp_path: Path) -> None:
    """In "tshirt" the letters "sh" would be joined first, where "shirt" comes before it."""
    tokenizer = label_tokenizer(("tshirt", "shirt"), tmp_path)
    assert [tokenizer(word).input_ids[1:-1] for word in ("tshirt", "shirt")] == [[0], [1]]
    for labels in (("shirt", "tshirt"), ("bag", "bag")):
        with pytest.raises(ValueError, match=r"the label .* has the tokens .*not the one token"):
            label_tokenizer(labels, tmp_path)
    for label in ("ankle boot", "t-shirt", "Bag", "écharpe", ""):
        with pytest.raises(ValueError, match="is not one word of small letters"):
            label_tokenizer(("bag", label), tmp_path)


def test_guidance_leads_away_from_the_null_class(ddpm: Diffusion) -> None:
    noisy, times = torch.randn(2, 1, 8, 8), torch.tensor([10, 500])
    guided = ddpm.cfg(noisy, times, ddpm.encode_prompts(["bag", "coat"]), ddpm.encode_uncond(), 3.0)
    own = ddpm.unet(noisy, times, class_labels=torch.tensor([0, 2])).sample
    null = ddpm.unet(noisy, times, class_labels=torch.tensor([3, 3])).sample
    assert torch.allclose(guided, 3 * own - 2 * null, atol=1e-5)  # (1 + s) own - s null with the authors' s = 2


def test_pixels_are_latents(ddpm: Diffusion) -> None:
    assert (ddpm.factor, ddpm.size) == (1, 8)
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1) * 2 - 1
    latents = ddpm.encode_images(images, torch.Generator())
    assert torch.allclose(latents, images[:, :1], atol=1e-6)
    assert torch.equal(ddpm.decode(latents)[..., 0], ((images[:, 0] / 2 + 0.5) * 255).round().to(torch.uint8))


def test_saved_and_loaded_it_draws_the_same(ddpm: Diffusion, tmp_path: Path) -> None:
    save_pipeline(ddpm, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.family.name == "class-ddpm"
    assert weights_hash(back.unet) == weights_hash(ddpm.unet)
    drawn = [
        sample_latents(model, model.encode_prompts(["boot"]), model.encode_uncond(), [7], [3.0], Sampling(steps=3))
        for model in (ddpm, back)
    ]
    assert torch.allclose(*drawn, rtol=1e-4)  # not to the bit: loaded weights are aligned in memory
    pipeline = back.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    drawn = [pipeline("boot", 2, generator=torch.Generator().manual_seed(1), output_type="pt").images for _ in "ab"]
    assert drawn[0].shape == (1, 3, 8, 8)
    assert torch.equal(*drawn)


def test_salun_s_step_is_the_authors(ddpm: Diffusion, bag: Concept) -> None:
    """Their loss on labels: |e(x_t, bag) - e*(x_t, boot)|^2, and the training loss of what is retained."""
    data = make_data(
        ddpm, bag, DataRecipe(forget=4, retain=4, steps=1, guidance=1.0), seed=1, parts=("forget", "retain")
    )
    rows = torch.arange(2)
    batch = data.forget_batch(ddpm, rows, torch.Generator().manual_seed(0))
    assert batch.embeddings.flatten().tolist() == [0, 0]
    assert batch.remapped.flatten().tolist() == [1, 1]
    found = mse_loss(
        ddpm.predict(batch.noisy, batch.timesteps, batch.embeddings),
        ddpm.predict(batch.noisy, batch.timesteps, batch.remapped),
    )
    a = ddpm.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * data.forget_latents[rows] + (1 - a).sqrt() * batch.noise
    own, other = (ddpm.unet(noisy, batch.timesteps, class_labels=torch.tensor([label] * 2)).sample for label in (0, 1))
    assert torch.allclose(found, ((own - other) ** 2).mean())


@pytest.mark.parametrize("method", ["salun", "random-label", "gradient-ascent", "esd-full", "l1-sparse", "salun-soft"])
def test_methods_work_on_it_unchanged(ddpm: Diffusion, bag: Concept, tmp_path: Path, method: str) -> None:
    save_pipeline(ddpm, tmp_path / "model")
    values = {"model": str(tmp_path / "model"), "concept": bag, "method": method, "mask": {"kind": "salient"}}
    values |= {"settings": {"steps": 2, "batch_size": 2, "lr": 1e-3}, "data": {"forget": 2, "retain": 2, "steps": 2}}
    list(iter_erase(make_recipe(values), tmp_path / "run"))
    checks = read_run(tmp_path / "run")["checks"]
    assert checks["changed"] > 0
    assert checks["changed_outside_mask"] == 0
    assert load(tmp_path / "run").family.name == "class-ddpm"


def test_what_needs_cross_attention_says_so(ddpm: Diffusion, bag: Concept, tmp_path: Path) -> None:
    save_pipeline(ddpm, tmp_path / "model")
    recipe = make_recipe({"model": str(tmp_path / "model"), "concept": bag, "method": "uce"})
    with pytest.raises(RequestError, match=r"mask\.scope .*a Class-conditional DDPM has no such layers"):
        list(iter_erase(recipe, tmp_path / "run"))
