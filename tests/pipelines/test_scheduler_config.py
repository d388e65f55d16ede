"""Whatever a model's scheduler says, and leaves unsaid, an erased model says and leaves unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from erase_concept.pipelines.families.stable_diffusion import SCHEDULER
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.scheduler import stated
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import make_scheduler, sample_latents

# What Stable Diffusion 1.5's folder says: nothing of the time steps' spacing.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.fixture(params=["published folder", "single file", "explicit folder"])
def model(tiny: Diffusion, tmp_path: Path, request: pytest.FixtureRequest) -> Diffusion:
    """A model as it is loaded: of the published folder, of a single file, and of a folder that states everything."""
    if request.param == "single file":
        return tiny.with_components(scheduler=DDIMScheduler.from_config(SCHEDULER))
    save_pipeline(tiny, tmp_path / "base")
    config = PUBLISHED if request.param == "published folder" else dict(PNDMScheduler.from_config(PUBLISHED).config)
    text = json.dumps({name: value for name, value in config.items() if name != "_use_default_values"})
    (tmp_path / "base" / "scheduler" / "scheduler_config.json").write_text(text)
    (tmp_path / "base" / "model_index.json").write_text(
        (tmp_path / "base" / "model_index.json").read_text().replace("DDIMScheduler", "PNDMScheduler")
    )
    return load(tmp_path / "base")


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_base_and_erased_are_sampled_at_the_same_time_steps(model: Diffusion, tmp_path: Path, name: str | None) -> None:
    save_pipeline(model, tmp_path / "erased")
    erased = load(tmp_path / "erased")
    steps = [make_scheduler(one, name, 5).timesteps for one in (model, erased)]
    assert torch.equal(*steps)
    assert stated(model.scheduler) == stated(erased.scheduler)
    prompts = model.encode_prompts(["a"]), model.encode_uncond()
    drawn = [sample_latents(one, *prompts, [1], [2.0]) for one in (model, erased)]
    assert torch.allclose(*drawn, rtol=1e-3, atol=1e-3)


def test_other_programs_schedulers_find_the_same(model: Diffusion, tmp_path: Path) -> None:
    """What people write: ``DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)``."""
    save_pipeline(model, tmp_path / "erased")
    for kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        own, theirs = (kind.from_config(one.scheduler.config).config for one in (model, load(tmp_path / "erased")))
        assert own.timestep_spacing == theirs.timestep_spacing
    written = json.loads((tmp_path / "erased" / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == type(model.scheduler).__name__
    assert written.keys() >= {"_diffusers_version", "prediction_type"}


def test_a_value_that_was_set_later_is_stated(tiny: Diffusion, tmp_path: Path) -> None:
    tiny.scheduler.register_to_config(timestep_spacing="trailing")
    save_pipeline(tiny, tmp_path / "model")
    assert load(tmp_path / "model").scheduler.config.timestep_spacing == "trailing"


def test_what_is_left_unsaid_tells_images_apart(tiny: Diffusion) -> None:
    said = tiny.with_components(scheduler=DDIMScheduler.from_config(stated(tiny.scheduler), timestep_spacing="leading"))
    assert said.scheduler.config.timestep_spacing == tiny.scheduler.config.timestep_spacing
    assert said.besides_unet(["a"]) != tiny.besides_unet(["a"])
