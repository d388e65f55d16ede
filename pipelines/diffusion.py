"""One face over a latent diffusion model: what erasing, sampling and evaluation need of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A Stable Diffusion 1.x model: tokenizer, text encoder, VAE, UNet and noise schedule.

    ``source`` says where it came from. Shapes: latents [n, 4, h/f, w/f] with the VAE's factor f, time steps int64 [n]
    in [0, 1000), prompt embeddings [n, tokens, width].
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: Any
    source: str

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        """Side of the images that the model was trained for, in pixels."""
        return int(self.unet.config.sample_size) * self.factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, tokens, width] of prompts, padded and cut as Stable Diffusion does."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Encode images [n, 3, h, w] in [-1, 1] to scaled latents, drawn from the VAE's posterior."""
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to uint8 images [n, h, w, 3]."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents at the given time steps: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise."""
        kept, added = self._schedule(timesteps)
        return kept * latents + added * noise

    def _schedule(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t), each [n, 1, 1, 1].

        Not the scheduler's own ``add_noise``: with Euler or DPM-Solver, common in published models, it scales by other
        rules, and not by these time steps.
        """
        a = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Return the UNet's prediction for noisy latents, in the model's own prediction type."""
        return self.unet(noisy, timesteps, embeddings).sample

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what ``predict`` was trained to give: the noise, or the velocity (arXiv 2202.00512)."""
        if self.scheduler.config.prediction_type == "v_prediction":
            kept, added = self._schedule(timesteps)
            return kept * noise - added * latents
        return noise

    def pipeline(self) -> StableDiffusionPipeline:
        """Return the model as a diffusers pipeline that shares its weights."""
        return StableDiffusionPipeline(
            self.vae,
            self.text_encoder,
            self.tokenizer,
            self.unet,
            self.scheduler,
            None,
            None,
            requires_safety_checker=False,
        )


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
