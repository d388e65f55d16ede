"""Stable Diffusion 1.x: OpenAI's text encoder CLIP ViT-L/14, 512 x 512 pixels, noise prediction."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionPipeline

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Configs, Family, SingleFile
from erase_concept.pipelines.families.original_names import UNET, VAE, clip

UNET_CONFIG: dict[str, Any] = {**shared.UNET, "cross_attention_dim": 768, "attention_head_dim": 8}
_TEXT_ENCODER = "cond_stage_model.transformer."


def _configs(metadata: Mapping[str, str]) -> Configs:
    configs = {"unet": UNET_CONFIG, "vae": shared.VAE, "text_encoder": shared.CLIP_L, "scheduler": shared.SCHEDULER}
    return copy.deepcopy(configs)


def _matches(configs: Configs) -> bool:
    """Tell it from Stable Diffusion 2.x, whose text encoder has another activation."""
    return configs["text_encoder"].get("hidden_act") != "gelu"


FAMILIES.add(
    Family(
        name="sd1",
        title="Stable Diffusion 1.x",
        summary="Stable Diffusion 1.x: one CLIP text encoder of OpenAI's, 512 x 512 pixels.",
        pipeline=StableDiffusionPipeline,
        components=shared.COMPONENTS,
        matches=_matches,
        check_fit=shared.check_fit,
        encode=shared.encode,
        uncond=shared.uncond,
        predict=shared.predict,
        noise=shared.NOISE,
        layers=shared.UNET_LAYERS,
        pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        single_file=SingleFile(
            mark=_TEXT_ENCODER,
            layouts={"unet": UNET, "vae": VAE, "text_encoder": clip(_TEXT_ENCODER)},
            configs=_configs,
            widths=shared.widths_in_file,
            architectures={"": "stable-diffusion-v1"},
            lora_metadata={"ss_base_model_version": "sd_v1", "ss_v2": "False"},
        ),
    )
)
