"""What Stable Diffusion 1.x, 2.x and XL share: UNet, VAE, CLIP text encoders and noise schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erase_concept.pipelines.families.family import Component, Components, Configs, Layers, Noise, State

PREDICTION_TYPES = ("epsilon", "v_prediction")
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")

COMPONENTS = {
    "tokenizer": Component(TOKENIZER_FILES),
    "scheduler": Component(("scheduler_config.json",)),
    "text_encoder": Component(("config.json",), lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config))),
    "vae": Component(("config.json",), AutoencoderKL.from_config),
    "unet": Component(("config.json",), UNet2DConditionModel.from_config),
}
SECOND_TEXT_ENCODER = {
    "tokenizer_2": Component(TOKENIZER_FILES),
    "text_encoder_2": Component(
        ("config.json",), lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    ),
}

# Configurations of the published models. Values that are diffusers' and transformers' own defaults are left out.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_L: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
OPEN_CLIP: dict[str, Any] = {**_CLIP, "hidden_act": "gelu"}


def check_fit(components: Components) -> None:
    """Raise ValueError when the configurations of UNet, VAE, text encoders and scheduler do not fit each other."""
    unet, vae = components["unet"].config, components["vae"].config
    if unet.in_channels == 9:
        raise ValueError("it is an inpainting model (its UNet takes 9 channels); a text-to-image model is needed")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        has = f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}"
        raise ValueError(f"{has}, the VAE's latents have {vae.latent_channels}")
    if isinstance(unet.sample_size, list | tuple) and len({*unet.sample_size}) > 1:
        has = f"the UNet's sample_size is {list(unet.sample_size)}"
        raise ValueError(f"{has}: set one number; a prompt's width and height make images that are not square")
    encoders = [part.config for name, part in components.items() if name.startswith("text_encoder")]
    _check_known(unet, vae, encoders)
    width = sum(encoder.hidden_size for encoder in encoders)
    if unet.cross_attention_dim != width:
        has = f"the UNet takes prompts {unet.cross_attention_dim} wide, the text encoder gives {width}"
        raise ValueError(f"{has}: they are of different families")
    pooled = encoders[1].projection_dim if len(encoders) == 2 else 0
    if pooled_width(unet) != pooled:
        raise ValueError(f"the UNet takes pooled prompts {pooled_width(unet)} wide, the text encoder gives {pooled}")
    scheduler = components["scheduler"]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"the scheduler is a {type(scheduler).__name__}, which is none of Stable Diffusion's")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        has = f"the scheduler's prediction type is {scheduler.config.prediction_type}"
        raise ValueError(f"{has}; allowed: {', '.join(PREDICTION_TYPES)}")


def _check_known(unet: Any, vae: Any, encoders: Sequence[Any]) -> None:
    """Raise ValueError for what the published models do not have, without which images would be others."""
    for name in ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(name) is not None:
            kind = ", as a latent consistency model's does" if name == "time_cond_proj_dim" else ""
            raise ValueError(f"the UNet takes more than latents, time step and prompt ({name} is {unet[name]}){kind}")
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ValueError("the VAE scales each channel by itself (latents_mean, latents_std), which is not supported")
    if any(getattr(encoder, "use_attention_mask", False) for encoder in encoders):
        raise ValueError("the text encoder masks the padding (use_attention_mask), which is not supported")


def pooled_width(unet: Any) -> int:
    """Return how wide an embedding of the whole prompt a UNet of this configuration takes; 0 if it takes none."""
    if unet.addition_embed_type != "text_time":
        return 0
    return int(unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim)


def vae_factor(vae: Any) -> int:
    """Return the image pixels per latent pixel, along each side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def encode(components: Components, ids: Any) -> Tensor:
    """Return the last hidden state of the one text encoder, [n, tokens, width]."""
    return components["text_encoder"](ids[0])[0]


def uncond(empty: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Guide away from the empty prompt."""
    return empty


def predict(components: Components, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Return the UNet's prediction for noisy latents."""
    return components["unet"](noisy, timesteps, embeddings).sample


def add_noise(components: Components, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise."""
    signal, sigma = _schedule(components, timesteps)
    return signal * latents + sigma * noise


def target(components: Components, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noise, or the velocity (arXiv 2202.00512) of a model that predicts it."""
    if components["scheduler"].config.prediction_type == "v_prediction":
        signal, sigma = _schedule(components, timesteps)
        return signal * noise - sigma * latents
    return noise


def _schedule(components: Components, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a_t) and sqrt(1 - a_t), each [n, 1, 1, 1].

    Not the scheduler's own ``add_noise``: that of Euler and DPM-Solver, common in published models, scales otherwise
    and takes other time steps.
    """
    a = components["scheduler"].alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


NOISE = Noise(add_noise, target)


def layer_group(name: str) -> str:
    """Return the group of a parameter of diffusers' UNet2DConditionModel, by its name."""
    if ".attn2." in name:
        return "cross-attention"
    if ".attn1." in name:
        return "self-attention"
    if ".attentions." in name:
        return "other transformer"
    return "resnet" if ".resnets." in name else "other"


UNET_LAYERS = Layers(
    group=layer_group,
    is_cross_attention=lambda name: name.endswith(".attn2"),
    is_key_or_value=lambda name: name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")),
    is_time_or_output=lambda name: name.startswith(("time_embedding.", "conv_norm_out.", "conv_out.")),
)


def widths_in_file(tensors: State) -> Configs:
    """Return the widths that a UNet's tensors in a single file show, so that another kind is refused for what it is."""
    prefix, found = "model.diffusion_model.", {}
    for key, value in tensors.items():
        if key == f"{prefix}input_blocks.0.0.weight":
            found["in_channels"] = value.shape[1]
        elif key.startswith(prefix) and key.endswith(".attn2.to_k.weight"):
            found["cross_attention_dim"] = value.shape[1]
    return {"unet": found}


@torch.no_grad()
def predicts_noise(unet: UNet2DConditionModel) -> bool:
    """Tell whether a UNet predicts the noise or the velocity, by giving it pure noise at the last time step.

    A UNet that predicts the noise gives it back; one that predicts the velocity gives the negative image. Leaves the
    UNet in fp32, in which a CPU is many times as fast as in fp16.
    """
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(1, 8, unet.config.cross_attention_dim)
    predicted = unet.float().eval()(noise, 999, empty).sample
    return bool(torch.corrcoef(torch.stack([noise.flatten(), predicted.flatten()]))[0, 1] > 0.95)
