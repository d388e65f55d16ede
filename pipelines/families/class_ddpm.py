"""Class-conditional DDPM with classifier-free guidance (arXiv 2207.12598): a label in the place of a prompt.

SalUn's second setting for generation. The UNet adds the embedding of a class to that of the time step. It knows one
class more than there are labels: the null class, which guidance leads away from. There is no text encoder, and the
embedding of a label is its number. Latents are pixels.

The tokenizer's first tokens are the labels, in the order of their classes. A label is one word, and a word that is no
label must have a token or several, too, so that it is not taken for the empty prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Component, Components, Family, Layers


class Pixels(ModelMixin, ConfigMixin):
    """What stands in a VAE's place: latents are pixels in [-1, 1], of one channel (grey) or three.

    ``unit`` is 1; as the only weight it says where the module is, and in which dtype it works.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers gives it no types
    def __init__(self, channels: int = 1, sample_size: int = 32) -> None:
        super().__init__()
        # Configurations of a VAE whose latents are as large as the image.
        self.register_to_config(latent_channels=channels, block_out_channels=[1], scaling_factor=1.0)
        self.unit = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """Return the pixels of images [n, 3, h, w] as a distribution without variance, [n, channels, h, w]."""
        pixels = images.mean(1, keepdim=True) if self.config.channels == 1 else images
        moments = torch.cat([pixels, torch.zeros_like(pixels)], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return images [n, 3, h, w]."""
        return DecoderOutput(sample=latents.expand(-1, 3, -1, -1))


class ClassConditionalPipeline(DiffusionPipeline):
    """A diffusers pipeline that draws images of labels."""

    def __init__(self, tokenizer: Any, vae: Pixels, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw an image for each label; ``output_type`` is "pil", "np" or "pt". Up to the scale 1 nothing is guided."""
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            ["", *prompts], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        null, *given = encode(self.components, (ids.to(self.device),)).split(1)
        labels, config = torch.cat(given), self.unet.config
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        noise = torch.randn(shape, generator=generator, device="cpu" if generator is None else generator.device)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = noise.to(self.device, self.unet.dtype) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noisy, times = self.scheduler.scale_model_input(latents, timestep), timestep.expand(len(prompts))
            without = predict(self.components, noisy, times, null.expand_as(labels))
            wanted = predict(self.components, noisy, times, labels)
            guided = without + max(guidance_scale, 1.0) * (wanted - without)
            latents = self.scheduler.step(guided, timestep, latents).prev_sample
        images: Any = (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).float().cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)


def encode(components: Components, ids: Sequence[Tensor]) -> Tensor:
    """Return the classes of labels, [n, 1, 1]; the empty prompt's is the null class.

    Raises RequestError for a prompt that is none of the labels.
    """
    tokenizer, classes = components["tokenizer"], components["unet"].config.num_class_embeds - 1
    first, second = ids[0][:, 1], ids[0][:, 2]
    empty = first == tokenizer.eos_token_id
    known = empty | ((first < classes) & (second == tokenizer.eos_token_id))
    if not bool(known.all()):
        prompt = tokenizer.decode(ids[0][~known][0], skip_special_tokens=True).strip()
        words = ", ".join(tokenizer.decode([label]).strip() for label in range(classes))
        raise RequestError("prompt", prompt, f"is none of the model's labels: {words}")
    return torch.where(empty, classes, first).float().view(-1, 1, 1)


def predict(components: Components, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Return the UNet's prediction for noisy pixels."""
    labels = embeddings[:, 0, 0].round().long()
    predicted: Tensor = components["unet"](noisy, timesteps, class_labels=labels).sample
    return predicted


def check_fit(components: Components) -> None:
    """Raise ValueError when UNet, pixels and scheduler do not fit each other."""
    unet, vae = components["unet"].config, components["vae"].config
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        has = f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}"
        raise ValueError(f"{has}, the images have {vae.latent_channels}")
    if not unet.num_class_embeds or unet.class_embed_type is not None:
        raise ValueError("the UNet knows no classes: num_class_embeds must be the number of labels and one more")
    if components["scheduler"].config.prediction_type not in shared.PREDICTION_TYPES:
        raise ValueError(f"the scheduler's prediction type is none of {', '.join(shared.PREDICTION_TYPES)}")


def layer_group(name: str) -> str:
    """Return the group of a parameter of diffusers' UNet2DModel, by its name."""
    if ".attentions." in name:
        return "self-attention"
    return "resnet" if ".resnets." in name else "other"


FAMILIES.add(
    Family(
        name="class-ddpm",
        title="Class-conditional DDPM",
        summary="DDPM in pixels, guided by labels: SalUn's setting on CIFAR-10.",
        pipeline=ClassConditionalPipeline,
        components={
            "tokenizer": Component(shared.TOKENIZER_FILES),
            "scheduler": Component(("scheduler_config.json",)),
            "vae": Component(("config.json",), Pixels.from_config),
            "unet": Component(("config.json",), UNet2DModel.from_config),
        },
        matches=lambda configs: True,  # no other family has this pipeline class
        check_fit=check_fit,
        encode=encode,
        uncond=shared.uncond,
        predict=predict,
        noise=shared.NOISE,
        layers=Layers(
            group=layer_group,
            is_cross_attention=lambda name: False,
            is_key_or_value=lambda name: False,
            is_time_or_output=shared.UNET_LAYERS.is_time_or_output,
        ),
    )
)
