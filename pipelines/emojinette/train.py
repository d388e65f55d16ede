"""Train Emojinette: ``python -m erase_concept.pipelines.emojinette.train --work DIR``.

Fetches the artwork, renders the data, trains VAE, text encoder with UNet, and classifier, and writes the pipeline as
diffusers folder with fp16 weights. Every stage is skipped when its result is in DIR, a stage that was interrupted
goes on from its last checkpoint, and all randomness is seeded. About two hours on two cores; see the Makefile for the
allocator settings that make it so.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from erase_concept.pipelines.emojinette import CATALOG, artwork
from erase_concept.pipelines.emojinette.captions import SEED, TOKENS, prompt_for, train_tokenizer
from erase_concept.pipelines.emojinette.classifier import EmojinetteClassifier
from erase_concept.pipelines.emojinette.parts import new_scheduler, new_text_encoder, new_unet, new_vae
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.fit import Schedule, fit
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.model import Diffusion


def to_float(images: np.ndarray) -> Tensor:
    """Turn uint8 images [n, h, w, 3] into floats [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_vae(data: dict[str, np.ndarray], work: Path, steps: int) -> AutoencoderKL:
    """Train the VAE on the renderings; its latents come out with mean 0 and variance 1 per channel."""
    torch.manual_seed(SEED)
    vae = new_vae()
    images = data["images"]

    def loss(rng: np.random.Generator) -> Tensor:
        x = to_float(images[rng.integers(0, len(images), 16)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return 2 * F.mse_loss(y, x) + 0.5 * F.l1_loss(y, x) + 0.5 * edges + 2e-4 * posterior.kl().mean() / x[0].numel()

    schedule = Schedule(steps, lr=1.5e-3, betas=(0.9, 0.99), flat=0.3)
    trained = fit("vae", {"vae": vae}, loss, work, schedule, seed=SEED)["vae"]
    fold_latent_statistics(trained, images[:2000])
    return trained


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Normalise the latents per channel by rewriting the 1 x 1 convolutions on both sides of them.

    z' = (z - m) / s goes into ``quant_conv`` (and log s off the log variances), z = z' s + m into ``post_quant_conv``.
    """
    mean, _ = encode(vae, images)
    m, s = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    inward, outward = vae.quant_conv, vae.post_quant_conv
    outward.bias.add_(outward.weight[:, :, 0, 0] @ m)
    outward.weight.mul_(s[None, :, None, None])
    inward.weight[:4].div_(s[:, None, None, None])
    inward.bias[:4].sub_(m).div_(s)
    inward.bias[4:].sub_(2 * s.log())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the posterior's means and standard deviations, each [n, 4, 16, 16]."""
    parts = [vae.encode(to_float(images[i : i + 64])).latent_dist for i in range(0, len(images), 64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def train_unet(
    data: dict[str, np.ndarray], vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, steps: int, offset_steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder together on noise prediction with min-SNR weights (gamma 5, arXiv 2303.09556).

    The last ``offset_steps`` add a random constant per channel to the noise and favour late time steps. Stable
    Diffusion's noise schedule leaves a trace of the image's mean in the last step (arXiv 2305.08891), from which the
    model reads whether a picture is dark, as pixel art is. Sampling starts without that trace; the offset hides it in
    training too, so that the model takes the prompt's word for it.
    """
    torch.manual_seed(SEED)
    modules = {"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}
    scheduler = new_scheduler()
    mean, std = encode(vae, data["images"])
    objects, styles = data["objects"], data["styles"]
    signal = (1 - scheduler.betas).cumprod(0)
    snr = signal / (1 - signal)
    weight = snr.clamp(max=5) / snr

    def loss(rng: np.random.Generator, offset: float) -> Tensor:
        rows = rng.integers(0, len(mean), 32)
        prompts = [
            prompt_for(CATALOG.labels[o], CATALOG.styles[s], rng)
            for o, s in zip(objects[rows], styles[rows], strict=True)
        ]
        ids = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        latents = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        # One time step from each of 32 equal strata: less variance in the loss than independent draws.
        share = (np.arange(32) + rng.random(32)) / 32
        if offset:
            share[::2] = 0.7 + 0.3 * share[::2]
        timesteps = torch.from_numpy((share * 1000).astype(np.int64))
        noise = torch.randn_like(latents) + offset * torch.randn(32, latents.shape[1], 1, 1)
        hidden = modules["text_encoder"](ids.input_ids)[0]
        predicted = modules["unet"](scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        return (weight[timesteps] * (predicted - noise).square().mean((1, 2, 3))).mean()

    schedule = Schedule(steps, lr=8e-4, flat=0.3, ema_decay=0.998)
    modules = fit("unet", modules, lambda rng: loss(rng, 0.0), work, schedule, seed=SEED)
    for module in modules.values():
        module.requires_grad_(True)
    schedule = Schedule(offset_steps, lr=5e-4, ema_decay=0.99)
    modules = fit("offset", modules, lambda rng: loss(rng, 0.2), work, schedule, seed=SEED)
    return modules["unet"], modules["text_encoder"]


def train_classifier(data: dict[str, np.ndarray], vae: AutoencoderKL, work: Path, steps: int) -> EmojinetteClassifier:
    """Train the classifier on renderings and on what the VAE makes of them, blurred, noised and shifted."""
    torch.manual_seed(SEED)
    model = EmojinetteClassifier()
    clean = data["images"]

    @cache
    def decoded() -> np.ndarray:
        mean, _ = encode(vae, clean)
        with torch.no_grad():
            parts = [vae.decode(mean[i : i + 64]).sample for i in range(0, len(mean), 64)]
        return torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    objects, styles = torch.from_numpy(data["objects"]), torch.from_numpy(data["styles"])

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(0, len(clean), 64)
        x = to_float(np.concatenate([clean[rows[:24]], decoded()[rows[24:]]])).add(1).div(2)
        x = x.roll((int(rng.integers(-4, 5)), int(rng.integers(-4, 5))), (2, 3))
        if rng.random() < 0.3:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = x * (1 + 0.15 * torch.randn(64, 3, 1, 1)) + 0.06 * torch.randn(64, 3, 1, 1)
        x = (x + rng.uniform(0, 0.08) * torch.randn_like(x)).clamp(0, 1)
        object_logits, style_logits = model(x)
        both = ((object_logits, objects), (style_logits, styles))
        return torch.stack([F.cross_entropy(out, truth[rows], label_smoothing=0.05) for out, truth in both]).sum()

    trained = fit("classifier", {"classifier": model}, loss, work, Schedule(steps, lr=2e-3, flat=0.2), seed=SEED)
    return trained["classifier"]


def held_out(work: Path) -> dict[str, np.ndarray]:
    """Return the 2,400 renderings that no training sees: images, and the indices of their objects and styles."""
    return _data(work, "test", 2400, 1)


def _data(work: Path, name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    file = work / f"{name}.npz"
    if not file.exists():
        artwork.download(work / "artwork")
        images, objects, styles = artwork.build(work / "artwork", count, seed)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, images=images, objects=objects, styles=styles)
        partial.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def _half(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value.half().contiguous()) for name, value in state.items())


def main(argv: list[str] | None = None) -> None:
    """Train everything and write it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for artwork, data and checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the trained files go")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--classifier-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--offset-steps", type=int, default=700)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = _data(args.work, "train", 12000, 0), held_out(args.work)

    tokenizer = train_tokenizer(args.work / "tokenizer")
    vae = train_vae(train, args.work, args.vae_steps)
    mse = torch.cat([_reconstruction_error(vae, test["images"][i : i + 64]) for i in range(0, 2400, 64)]).mean()
    print(f"VAE PSNR on held-out renderings: {10 * math.log10(4 / mse):.2f} dB", flush=True)
    classifier = train_classifier(train, vae, args.work, args.classifier_steps)
    unet, text_encoder = train_unet(train, vae, tokenizer, args.work, args.unet_steps, args.offset_steps)

    components = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "unet": unet}
    model = Diffusion(FAMILIES.find("sd1"), components | {"scheduler": new_scheduler()}, source="emojinette")
    model.pipeline().to(torch.float16)
    partial = args.work / "model"
    save_pipeline(model, partial)
    # transformers 5 saves tokenizer.json alone; older versions load these two.
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(args.work / "tokenizer" / name, partial / "tokenizer" / name)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.out / "model", ignore_errors=True)
    shutil.move(partial, args.out / "model")
    save_file(dict(_half(classifier.state_dict())), args.out / "classifier.safetensors")
    times = {name: getattr(args, f"{name}_steps") for name in ("vae", "classifier", "unet", "offset")}
    states = {name: torch.load(args.work / f"{name}.pt", weights_only=True) for name in times}
    training = {name: {"steps": steps, "seconds": states[name]["seconds"]} for name, steps in times.items()}
    (args.out / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone, and the package is for everybody
    with torch.no_grad():
        features = classifier.features(to_float(test["images"]).add(1).div(2)).half()
    save_file(
        {
            "features": features,
            "object": torch.from_numpy(test["objects"]).to(torch.uint8),
            "style": torch.from_numpy(test["styles"]).to(torch.uint8),
        },
        args.out / "reference.safetensors",
    )


@torch.no_grad()
def _reconstruction_error(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    x = to_float(images)
    return (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean((1, 2, 3))


if __name__ == "__main__":
    main()
