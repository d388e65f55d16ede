"""Stable Diffusion XL: the text encoders CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, 1024 x 1024 pixels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Components, Configs, Family, SingleFile
from erase_concept.pipelines.families.original_names import UNET, VAE, clip, open_clip

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
OPEN_CLIP_G: dict[str, Any] = {
    **shared.OPEN_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_TEXT_ENCODER = "conditioner.embedders.0.transformer."
_TEXT_ENCODER_2 = "conditioner.embedders.1.model."


def _configs(metadata: Mapping[str, str]) -> Configs:
    configs = {
        "unet": UNET_CONFIG,
        "vae": shared.VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": shared.CLIP_L,
        "text_encoder_2": OPEN_CLIP_G,
        "scheduler": shared.SCHEDULER,
    }
    return copy.deepcopy(configs)


def encode(components: Components, ids: Sequence[Tensor]) -> Tensor:
    """Return the last hidden state but one of both text encoders side by side, and the pooled prompt as a last token.

    The pooled embedding is narrower than the others, and filled up with zeros.
    """
    first = components["text_encoder"](ids[0], output_hidden_states=True)
    second = components["text_encoder_2"](ids[1], output_hidden_states=True)
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = nn.functional.pad(second[0], (0, tokens.shape[-1] - second[0].shape[-1]))
    return torch.cat([tokens, pooled[:, None]], 1)


def uncond(empty: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Guide away from zeros, or from the empty prompt where the pipeline's setting says so."""
    return torch.zeros_like(empty) if settings["force_zeros_for_empty_prompt"] else empty


def predict(components: Components, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Return the UNet's prediction for uncropped images of the latents' size."""
    unet, factor = components["unet"], shared.vae_factor(components["vae"])
    height, width = (side * factor for side in noisy.shape[-2:])
    # The size at which an image was made, the corner of its crop, and the size that it is to have.
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=embeddings.dtype, device=noisy.device)
    pooled = embeddings[:, -1, : shared.pooled_width(unet.config)]
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
    return unet(noisy, timesteps, embeddings[:, :-1], added_cond_kwargs=added).sample


FAMILIES.add(
    Family(
        name="sdxl",
        title="Stable Diffusion XL",
        summary="Stable Diffusion XL: two CLIP text encoders, 1024 x 1024 pixels.",
        pipeline=StableDiffusionXLPipeline,
        components=shared.COMPONENTS | shared.SECOND_TEXT_ENCODER,
        matches=lambda configs: True,
        check_fit=shared.check_fit,
        encode=encode,
        uncond=uncond,
        predict=predict,
        noise=shared.NOISE,
        layers=shared.UNET_LAYERS,
        extra_tokens=1,
        settings={"force_zeros_for_empty_prompt": True},
        pipeline_options={"add_watermarker": False},
        single_file=SingleFile(
            mark=_TEXT_ENCODER,
            layouts={
                "unet": UNET,
                "vae": VAE,
                "text_encoder": clip(_TEXT_ENCODER),
                "text_encoder_2": open_clip(_TEXT_ENCODER_2),
            },
            configs=_configs,
            widths=shared.widths_in_file,
            pad_tokens={"tokenizer_2": "!"},
            architectures={"": "stable-diffusion-xl-v1-base"},
            lora_metadata={"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
            lora_names=True,
        ),
    )
)
