"""A loaded diffusers pipeline in the place of a model's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel

from erase_concept.errors import RequestError
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import sample
from erase_concept.prompts.promptset import PromptRow, PromptSet


@pytest.fixture
def pipeline(family: Diffusion, tmp_path: Path) -> DiffusionPipeline:
    """A pipeline as its owner loads it."""
    save_pipeline(family, tmp_path / "model")
    with silence_hub_logs():
        return DiffusionPipeline.from_pretrained(tmp_path / "model")


def test_it_is_the_model_that_it_was_saved_from(family: Diffusion, pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    model = Diffusion.from_pipeline(pipeline)
    assert model.describe() == load(tmp_path / "model").describe()
    assert torch.equal(model.encode_prompts(["a church"]), family.encode_prompts(["a church"]))
    assert torch.equal(model.encode_uncond(), family.encode_uncond())
    assert type(model.pipeline()) is type(pipeline)
    assert model.unet is pipeline.unet


def test_loading_copies_so_that_the_owners_pipeline_stays_as_it_is(pipeline: DiffusionPipeline) -> None:
    before, flags = weights_hash(pipeline.unet), [p.requires_grad for p in pipeline.unet.parameters()]
    model = load(pipeline, dtype=torch.bfloat16)
    assert model.unet.dtype == torch.bfloat16
    with torch.no_grad():
        for module in model.modules.values():
            for p in module.parameters():
                p.zero_()
    assert weights_hash(pipeline.unet) == before
    assert pipeline.unet.dtype == torch.float32
    assert [p.requires_grad for p in pipeline.unet.parameters()] == flags


def test_it_samples_the_same_images(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    prompts = PromptSet("p", (PromptRow("a square", 1), PromptRow("a line", 2)))
    ours = sample(load(tmp_path / "model"), prompts, tmp_path / "a", steps=2)
    theirs = sample(pipeline, prompts, tmp_path / "b", steps=2)
    named = sample(tmp_path / "model", prompts, tmp_path / "c", steps=2)
    assert (ours.arrays() == theirs.arrays()).all()
    assert (ours.arrays() == named.arrays()).all()
    assert ours.settings == theirs.settings == named.settings


def test_the_pooled_prompt_and_the_setting_of_xl_are_kept(family: Diffusion, pipeline: DiffusionPipeline) -> None:
    if "force_zeros_for_empty_prompt" not in family.settings:
        assert Diffusion.from_pipeline(pipeline).settings == {}
        return
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    model = Diffusion.from_pipeline(pipeline)
    assert torch.equal(model.encode_uncond(), model.encode_prompts([""]))
    assert model.pipeline().config.force_zeros_for_empty_prompt is False


def test_what_is_no_model_of_a_known_family_is_refused(tiny: Diffusion) -> None:
    small = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(RequestError, match=r"is a DDPMPipeline; needed: .*StableDiffusionPipeline or"):
        load(DDPMPipeline(small, tiny.scheduler))
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = dict(tiny.components) | {"text_encoder": None}
    with pytest.raises(RequestError, match="has no text_encoder: a StableDiffusionPipeline needs one"):
        load(StableDiffusionPipeline(**parts, **options))
