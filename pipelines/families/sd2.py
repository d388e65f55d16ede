"""Stable Diffusion 2.x: OpenCLIP's text encoder ViT-H/14, 512 pixels and the noise, or 768 pixels and the velocity."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Configs, Family, SingleFile
from erase_concept.pipelines.families.original_names import UNET, VAE, open_clip

UNET_CONFIG: dict[str, Any] = {
    **shared.UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
OPEN_CLIP_H: dict[str, Any] = {
    **shared.OPEN_CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
# What differs in the model for 768 pixels.
VELOCITY: Configs = {
    "unet": {"sample_size": 96},
    "vae": {"sample_size": 768},
    "scheduler": {"prediction_type": "v_prediction"},
}
_TEXT_ENCODER = "cond_stage_model.model."
_PREDICTION_TYPE = "modelspec.prediction_type"


def _configs(metadata: Mapping[str, str]) -> Configs:
    configs = {"unet": UNET_CONFIG, "vae": shared.VAE, "text_encoder": OPEN_CLIP_H, "scheduler": shared.SCHEDULER}
    changed = VELOCITY if metadata.get(_PREDICTION_TYPE, "").startswith("v") else {}
    return {part: copy.deepcopy(config) | changed.get(part, {}) for part, config in configs.items()}


def _settle(components: dict[str, Any], metadata: Mapping[str, str]) -> None:
    """Find out which of the two models it is where the metadata does not say so."""
    if shared.predicts_noise(components["unet"]):
        return
    components["scheduler"] = DDIMScheduler.from_config(shared.SCHEDULER | VELOCITY["scheduler"])
    for part in ("unet", "vae"):
        components[part].register_to_config(**VELOCITY[part])


FAMILIES.add(
    Family(
        name="sd2",
        title="Stable Diffusion 2.x",
        summary="Stable Diffusion 2.x: one OpenCLIP text encoder, 512 x 512 or 768 x 768 pixels.",
        pipeline=StableDiffusionPipeline,
        components=shared.COMPONENTS,
        matches=lambda configs: configs["text_encoder"].get("hidden_act") == "gelu",
        check_fit=shared.check_fit,
        encode=shared.encode,
        uncond=shared.uncond,
        predict=shared.predict,
        noise=shared.NOISE,
        layers=shared.UNET_LAYERS,
        pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        single_file=SingleFile(
            mark=_TEXT_ENCODER,
            layouts={"unet": UNET, "vae": VAE, "text_encoder": open_clip(_TEXT_ENCODER)},
            configs=_configs,
            widths=shared.widths_in_file,
            pad_tokens={"tokenizer": "!"},
            settle=_settle,
            architectures={"": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
            lora_metadata={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
        ),
    )
)
