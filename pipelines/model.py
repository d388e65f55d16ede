"""Diffusion: one interface to a latent diffusion model, for erasing, sampling and evaluation."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.families import FAMILIES, families_of_pipeline, find_family
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.scheduler import stated, with_zero_snr
from erase_concept.pipelines.formats.tokenizer import limit_tokenizers
from erase_concept.pipelines.formats.weights import dtype_names, published_name

_TOKENIZED = 1024  # prompts at once
# What a text encoder's configuration says of its file and of the library that wrote it.
_OF_FILES = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A latent diffusion model: its components by diffusers' names, and the family that says how they work together.

    ``source`` says where it came from, ``settings`` are those of its diffusers pipeline that the family knows, and
    ``stored`` the dtype that its UNet had there, such as "float16", or "float16, float32" where both are mixed.
    ``taken`` says which UNet was taken of a single file that holds averaged weights.
    Shapes: latents [n, c, h/f, w/f] with the VAE's factor f, time steps int64 [n] in [0, 1000), prompt embeddings [n,
    tokens, width].
    """

    family: Family
    components: Mapping[str, Any]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stored: str = "unknown"
    taken: str = ""

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> Diffusion:
        """Take over a loaded diffusers pipeline, such as a StableDiffusionPipeline, sharing its components.

        Raises RequestError when it is of no known family, or its components do not fit each other.
        """
        kind = type(pipeline).__name__
        name = str(pipeline.config.get("_name_or_path") or kind)
        parts = pipeline.components
        candidates = families_of_pipeline(kind)
        if not candidates:
            known = dict.fromkeys(family.pipeline.__name__ for family in FAMILIES.all().values())
            raise RequestError("model", name, f"is a {kind}; needed: {' or '.join(known)}")
        if missing := [key for key in candidates[0].components if parts.get(key) is None]:
            raise RequestError("model", name, f"has no {missing[0]}: a {kind} needs one")
        family = find_family(kind, {key: _config(part) for key, part in parts.items() if hasattr(part, "config")})
        if family is None:
            raise RequestError("model", name, f"is a {kind} of an unknown family: its configurations fit none")
        components = limit_tokenizers({key: parts[key] for key in family.components})
        try:
            family.check_fit(components)
        except ValueError as problem:
            raise RequestError("model", name, str(problem)) from None
        components["scheduler"] = with_zero_snr(components["scheduler"])
        settings = {key: pipeline.config.get(key, default) for key, default in family.settings.items()}
        stored = dtype_names(components["unet"].state_dict().values())
        return cls(family, components, source=name, settings=settings, stored=stored)

    def with_components(self, **changed: Any) -> Diffusion:
        """Return the same model with other components in the place of its own."""
        return replace(self, components={**self.components, **changed})

    def part_of(self, weights: Collection[str]) -> str:
        """Return "text_encoder" where weights of these names are its token embeddings, otherwise "unet"."""
        return "text_encoder" if any(name.endswith("token_embedding.weight") for name in weights) else "unet"

    @contextmanager
    def in_training(self, *, recompute: bool) -> Iterator[None]:
        """Let the UNet compute activations anew in backward passes while it learns, if ``recompute`` says so."""
        if recompute:
            self.unet.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.unet.disable_gradient_checkpointing()

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.components["unet"]

    @property
    def vae(self) -> Any:
        """The VAE, from images to latents and back."""
        return self.components["vae"]

    @property
    def scheduler(self) -> Any:
        """The scheduler that the model came with."""
        return self.components["scheduler"]

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return self.components["tokenizer"]

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.components["text_encoder"]

    @property
    def tokenizers(self) -> dict[str, Any]:
        """All tokenizers by diffusers' names."""
        return {name: part for name, part in self.components.items() if name.startswith("tokenizer")}

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """All text encoders by diffusers' names."""
        return {name: part for name, part in self.components.items() if name.startswith("text_encoder")}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All components with weights, by diffusers' names."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    def describe(self) -> dict[str, str]:
        """Return what was loaded: source, UNet's SHA-256, family, prediction type, stored dtype, choice of weights."""
        return {
            "source": self.source,
            "unet": weights_hash(self.unet, torch.float32),
            "family": self.family.title,
            "prediction_type": str(self.scheduler.config.prediction_type),
            "dtype": self.stored,
            **({"weights": self.taken} if self.taken else {}),
        }

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of every component by diffusers' names."""
        return {name: module.state_dict() for name, module in self.modules.items()}

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        """Side of the images that the model was trained for, in pixels; where its files do not say, the family's."""
        side = self.unet.config.sample_size
        if side is None and self.family.single_file is not None:
            side = self.family.single_file.configs({})["unet"]["sample_size"]
        return int(side[0] if isinstance(side, list | tuple) else side) * self.factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, tokens, width] of prompts, padded and truncated as diffusers does."""
        return self.encode_ids(self.token_ids(prompts))

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the token ids of prompts for each text encoder, int64 [n, tokens], padded and truncated."""
        return tuple(self._ids(tokenizer, prompts) for tokenizer in self.tokenizers.values())

    def besides_unet(self, prompts: Iterable[str]) -> dict[str, Any]:
        """Return all but the UNet's weights on which the images of these prompts depend, to tell results apart by it.

        Hashes of the other weights, all configurations, the pipeline's settings, the size, and a hash of the token ids,
        which depend on the tokenizers.
        """
        digest, unique = hashlib.sha256(), list(dict.fromkeys(prompts))
        for start in range(0, len(unique), _TOKENIZED):
            for ids in self.token_ids(unique[start : start + _TOKENIZED]):
                digest.update(ids.cpu().numpy().tobytes())
        return {
            **{name: weights_hash(part) for name, part in self.modules.items() if name != "unet"},
            "configurations": {name: config_hash(part) for name, part in self.modules.items()},
            "scheduler": stated(self.scheduler),
            "settings": dict(self.settings),
            "size": self.size,
            "tokens": digest.hexdigest(),
        }

    def cut_prompts(self, prompts: Sequence[str]) -> int:
        """Return how many different prompts have more tokens than the model reads, so that the rest is cut off."""
        unique, longest = list(dict.fromkeys(prompts)), self.tokenizer.model_max_length
        ids = self.tokenizer(unique, verbose=False).input_ids if unique else []
        return sum(len(some) > longest for some in ids)

    def encode_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the embeddings [n, tokens, width] of what ``token_ids`` returned, with gradients where asked for."""
        return self.family.encode(self.components, ids)

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        length = tokenizer.model_max_length
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return ids.input_ids.to(self.device)

    def encode_uncond(self) -> Tensor:
        """Return what guidance leads away from, [1, tokens, width]: the empty prompt, or XL's zeros."""
        return self.family.uncond(self.encode_prompts([""]), self.settings)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Encode images [n, 3, h, w] in [-1, 1] to scaled latents, drawn from the VAE's posterior."""
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to uint8 images [n, h, w, 3]; raises EraseError when they are not finite."""
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        if not bool(images.isfinite().all()):
            raise EraseError(f"{self.source}: the VAE gives NaN or infinity in the place of an image")
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents at the given time steps."""
        return self.family.noise.add(self.components, latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Return the UNet's prediction for noisy latents, in the model's own prediction type.

        A UNet in bf16 or fp16 works in that precision; the prediction has the dtype of the latents.
        """
        dtype = next(self.unet.parameters()).dtype
        if dtype == noisy.dtype:
            return self.family.predict(self.components, noisy, timesteps, embeddings)
        predicted = self.family.predict(self.components, noisy.to(dtype), timesteps, embeddings.to(dtype))
        return predicted.to(noisy.dtype)

    def cfg(
        self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor, uncond: Tensor, scale: float | Tensor
    ) -> Tensor:
        """Return the prediction with classifier-free guidance (arXiv 2207.12598), from one call on 2 n rows.

        That is e(x, uncond) + scale (e(x, c) - e(x, uncond)), so scale 1 is no guidance. ``timesteps`` are [n], or one
        for all; ``uncond`` is [1, tokens, width], and ``scale`` a number or [n, 1, 1, 1].
        """
        both = torch.cat([uncond.expand_as(embeddings), embeddings])
        twice = timesteps.to(noisy.device).expand(len(noisy)).repeat(2)
        without, given = self.predict(torch.cat([noisy, noisy]), twice, both).chunk(2)
        return without + scale * (given - without)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what ``predict`` is trained to give: the noise, or the velocity (arXiv 2202.00512)."""
        return self.family.noise.target(self.components, latents, noise, timesteps)

    def pipeline(self) -> Any:
        """Return the model as a diffusers pipeline that shares its weights."""
        return self.family.pipeline(**self.components, **self.settings, **self.family.pipeline_options)


def _config(part: Any) -> dict[str, Any]:
    """Return a component's configuration: transformers' is an object, diffusers' a mapping."""
    return part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)


def config_hash(part: Any) -> str:
    """Return the SHA-256 over what a component's configuration says, without its class's defaults.

    The same weights with another activation, number of heads or scale are another model.
    """
    if hasattr(part.config, "to_diff_dict"):
        found = part.config.to_diff_dict()
    else:
        parameters = inspect.signature(type(part).__init__).parameters
        assumed = {name: json.dumps(one.default, default=str) for name, one in parameters.items()}
        found = {key: one for key, one in part.config.items() if json.dumps(one, default=str) != assumed.get(key)}
    told = {key: one for key, one in found.items() if key[0] != "_" and key not in _OF_FILES}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights, in the order of their names.

    The names are the published ones, so that a model has the same hash with every version of the libraries. ``dtype``
    is the one in which floating point weights count; by default each counts in its own.
    """
    hashed = WeightsHash(dtype)
    for name, value in sorted((published_name(module, name), value) for name, value in module.state_dict().items()):
        hashed.add(name, value)
    return hashed.hexdigest()


class WeightsHash:
    """The hash that ``weights_hash`` returns, of weights that come one at a time, in the order of their names."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Begin with no weights; ``dtype`` is as for ``weights_hash``."""
        self.dtype, self._digest = dtype, hashlib.sha256()

    def add(self, name: str, value: Tensor) -> None:
        """Count one more weight, by its published name."""
        counted = value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value
        self._digest.update(f"{name} {counted.dtype} {tuple(value.shape)}\n".encode())
        self._digest.update(counted.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the SHA-256 over the weights so far."""
        return self._digest.hexdigest()
