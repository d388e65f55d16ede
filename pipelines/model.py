"""One face over a latent diffusion model: what erasing, sampling and evaluation need of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase_concept.pipelines.formats.single_file import Family

FAMILIES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A Stable Diffusion 1.x, 2.x or XL model: tokenizer, text encoder, VAE, UNet and noise schedule.

    ``source`` says where it came from, and ``stored`` which dtype its UNet had there. Shapes: latents [n, 4, h/f, w/f]
    with the VAE's factor f, time steps int64 [n] in [0, 1000), prompt embeddings [n, tokens, width]. XL has a second
    tokenizer and text encoder, whose embedding of the whole prompt goes along as one token more, filled up with zeros:
    so a prompt is one tensor in every family.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: Any
    source: str
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    force_zeros_for_empty_prompt: bool = False  # XL: guidance leads away from zeros, not from the embedded empty prompt
    stored: str = "unknown"  # such as "float16"; "float16, float32" where weights of both are mixed

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by diffusers' names, one or two."""
        found = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @property
    def family(self) -> Family:
        """Which Stable Diffusion this is, told by its text encoders: OpenAI's, OpenCLIP's, or one of each."""
        if self.text_encoder_2 is not None:
            return "sdxl"
        return "sd2" if self.text_encoder.config.hidden_act == "gelu" else "sd1"

    def describe(self) -> dict[str, str]:
        """Return what was loaded: source, SHA-256 of the UNet's weights, family, prediction type and stored dtype."""
        return {
            "source": self.source,
            "unet": weights_hash(self.unet),
            "family": FAMILIES[self.family],
            "prediction_type": str(self.scheduler.config.prediction_type),
            "dtype": self.stored,
        }

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of every part by diffusers' names."""
        parts = {"unet": self.unet, "vae": self.vae, **self.text_encoders}
        return {name: part.state_dict() for name, part in parts.items()}

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
        return self.encode_ids(self.token_ids(prompts))

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the tokens of prompts for each text encoder, int64 [n, tokens], padded and cut."""
        tokenizers = (self.tokenizer, self.tokenizer_2) if self.text_encoder_2 is not None else (self.tokenizer,)
        return tuple(self._ids(tokenizer, prompts) for tokenizer in tokenizers)

    def encode_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the embeddings [n, tokens, width] of what ``token_ids`` gave, for the encoders' gradients too."""
        if self.text_encoder_2 is None:
            return self.text_encoder(ids[0])[0]
        first = self.text_encoder(ids[0], output_hidden_states=True)
        second = self.text_encoder_2(ids[1], output_hidden_states=True)
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        whole = nn.functional.pad(second[0], (0, tokens.shape[-1] - second[0].shape[-1]))
        return torch.cat([tokens, whole[:, None]], 1)

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        length = tokenizer.model_max_length
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return ids.input_ids.to(self.device)

    def encode_uncond(self) -> Tensor:
        """Return what guidance leads away from, [1, tokens, width]: the empty prompt, or XL's zeros."""
        empty = self.encode_prompts([""])
        return torch.zeros_like(empty) if self.force_zeros_for_empty_prompt else empty

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
        config = self.unet.config
        if config.addition_embed_type != "text_time":
            return self.unet(noisy, timesteps, embeddings).sample
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        height, breadth = (side * self.factor for side in noisy.shape[-2:])
        # The size an image was made at, where it was cut, and the size it is to have: as if it always had that size.
        sizes = torch.tensor([height, breadth, 0, 0, height, breadth], dtype=embeddings.dtype, device=noisy.device)
        added = {"text_embeds": embeddings[:, -1, :width], "time_ids": sizes.expand(len(noisy), -1)}
        return self.unet(noisy, timesteps, embeddings[:, :-1], added_cond_kwargs=added).sample

    def cfg(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor, empty: Tensor, scale: float | Tensor) -> Tensor:
        """Return the prediction with classifier-free guidance (arXiv 2207.12598), from one call on 2 n rows.

        That is e(x, empty) + scale (e(x, c) - e(x, empty)), so scale 1 is no guidance. ``timesteps`` are [n], or one
        for all; ``empty`` is [1, tokens, width], and ``scale`` a number or [n, 1, 1, 1].
        """
        both = torch.cat([empty.expand_as(embeddings), embeddings])
        twice = timesteps.to(noisy.device).expand(len(noisy)).repeat(2)
        without, given = self.predict(torch.cat([noisy, noisy]), twice, both).chunk(2)
        return without + scale * (given - without)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what ``predict`` was trained to give: the noise, or the velocity (arXiv 2202.00512)."""
        if self.scheduler.config.prediction_type == "v_prediction":
            kept, added = self._schedule(timesteps)
            return kept * noise - added * latents
        return noise

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """Return the model as a diffusers pipeline that shares its weights."""
        shared = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        if self.text_encoder_2 is None:
            return StableDiffusionPipeline(
                **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        return StableDiffusionXLPipeline(
            **shared,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )


def check_fit(parts: Mapping[str, Any]) -> None:
    """Raise ValueError when parts, by diffusers' names, do not make a model together: their configurations tell."""
    unet, vae = parts["unet"].config, parts["vae"].config
    if unet.in_channels == 9:
        raise ValueError("it is an inpainting model (its UNet takes 9 channels); a text-to-image model is needed")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        has = f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}"
        raise ValueError(f"{has}, the VAE's latents have {vae.latent_channels}")
    encoders = [parts[name].config for name in ("text_encoder", "text_encoder_2") if name in parts]
    width = sum(encoder.hidden_size for encoder in encoders)
    if unet.cross_attention_dim != width:
        has = f"the UNet takes prompts {unet.cross_attention_dim} wide, the text encoder gives {width}"
        raise ValueError(f"{has}: they are of different families")
    needs = unet.addition_embed_type == "text_time"
    whole = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim if needs else 0
    given = encoders[1].projection_dim if len(encoders) == 2 else 0
    if whole != given:
        raise ValueError(f"the UNet takes whole prompts {whole} wide, the text encoder gives {given}")
    scheduler = parts["scheduler"]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"the scheduler is a {type(scheduler).__name__}, which is none of Stable Diffusion's")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        has = f"the scheduler's prediction type is {scheduler.config.prediction_type}"
        raise ValueError(f"{has}; allowed: {', '.join(PREDICTION_TYPES)}")


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """Return the dtype of weights in words, such as "float16"; where they are mixed, all of them."""
    names = {str(value.dtype).removeprefix("torch.") for value in tensors if value.is_floating_point()}
    return ", ".join(sorted(names))


def published_name(part: str, name: str) -> str:
    """Return the name under which published models store a weight of a part, such as "text_encoder_2".

    transformers 5 names those of CLIP's text encoder without ``text_model.``, transformers 4 and all files with it.
    """
    if not part.startswith("text_encoder") or name.startswith(("text_model.", "text_projection.")):
        return name
    return f"text_model.{name}"


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights, in the order of their names.

    The names are the published ones, so that a model has the same hash with every version of the libraries.
    """
    digest = hashlib.sha256()
    part = "text_encoder" if isinstance(module, CLIPTextModel | CLIPTextModelWithProjection) else ""
    for name, value in sorted((published_name(part, name), value) for name, value in module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
