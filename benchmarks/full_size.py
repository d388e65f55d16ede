"""Models of Stable Diffusion's own size with random weights, and steps on them measured in processes of their own.

No real weights are needed to know what a step costs. A process's peak memory includes all that it ever held, so each
flow runs in a new one, and flows that are compared take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.methods.salun import SalUnSettings, salun
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.model import Diffusion
from erase_concept.recipe import MEMORY
from erase_concept.training.loop import Record

TOKENS = 77
# The Makefile's settings, for speed: memory that was had is kept.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def configs(family: str = "sd1", width: float = 1.0) -> dict[str, Any]:
    """Return a family's configurations; ``width`` is the share of the UNet's channels."""
    makes = FAMILIES.find(family).single_file.configs({})
    channels = makes["unet"]["block_out_channels"]
    makes["unet"] |= {"block_out_channels": [int(c * width) for c in channels]}
    if width < 1:
        makes["unet"] |= {"norm_num_groups": 8}
    return makes


def build(part: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a part with small random weights, the same block of numbers again and again: quick to make."""
    with torch.device("meta"):
        module = FAMILIES.find("sdxl").components[part].make(config)  # which has every part of the others too
    module.to(dtype)
    module.to_empty(device="cpu")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for p in module.parameters():
            flat = p.view(-1)
            for start in range(0, flat.numel(), len(block)):
                flat[start : start + len(block)] = block[: flat.numel() - start]
            if p.ndim == 1:
                p.add_(1)
    for name, buffer in module.named_buffers():
        if "position_ids" in name:
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return module.eval().requires_grad_(False)


def model(width: float = 1.0, family: str = "sd1", dtype: torch.dtype = torch.float32) -> Diffusion:
    """Return a model whose UNet alone has weights; its VAE is there for its configuration."""
    made = configs(family, width)
    with torch.device("meta"):
        vae = FAMILIES.find(family).components["vae"].make(made["vae"])
    own = {"unet": build("unet", made["unet"], dtype), "vae": vae}
    own["scheduler"] = DDIMScheduler.from_config(made["scheduler"])
    return Diffusion(FAMILIES.find(family), own, source="random")


def rows(n: int, size: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents for images of ``size`` pixels, time steps and prompt embeddings."""
    side = size // 8
    return torch.randn(n, 4, side, side), torch.randint(0, 1000, (n,)), torch.randn(n, TOKENS, context)


def bare(args: argparse.Namespace) -> Iterator[float]:
    """Do a step's work in the UNet and nothing else: for each pair of rows 2 forward and backward and 1 forward."""
    unet = model(args.width).unet
    context = unet.config.cross_attention_dim
    unet.requires_grad_(True)
    for _ in range(args.steps):
        one, both = rows(args.batch, args.size, context), rows(2 * args.batch, args.size, context)
        began = time.perf_counter()
        with torch.no_grad():
            unet(*one)
        unet(*both).sample.square().mean().backward()
        yield time.perf_counter() - began
        for p in unet.parameters():
            p.grad = None


def published(args: argparse.Namespace) -> Iterator[float]:
    """Transcribe the step of SalUn's reference: all is encoded anew, three UNet calls, Adam on all weights.

    The forget images are encoded twice, once for each of their prompts, and so are the prompts; the target is computed
    with its graph, which is then cut off; gradients are multiplied by a mask, here of bytes, since the reference's
    integers of 8 bytes would not fit into memory.
    """
    made = configs("sd1", args.width)
    vae, text = build("vae", made["vae"]), build("text_encoder", made["text_encoder"])
    whole = model(args.width)
    unet = whole.unet.requires_grad_(True)
    mask = {name: (torch.rand(p.shape) < 0.5).to(torch.uint8) for name, p in unet.named_parameters()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-5)
    context = unet.config.cross_attention_dim

    def encoded(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            return latents, text(ids)[0][..., :context]

    for _ in range(args.steps):
        images = [torch.rand(args.batch, 3, args.size, args.size) * 2 - 1 for _ in range(2)]
        ids = [torch.randint(0, 49000, (args.batch, TOKENS)) for _ in range(3)]
        began = time.perf_counter()
        optimizer.zero_grad()
        (forget, concept), (_, other), (retain, kept) = (
            encoded(image, prompt) for image, prompt in zip((images[0], images[0], images[1]), ids, strict=True)
        )
        t, noise = torch.randint(0, 1000, (args.batch,)), torch.randn_like(forget)
        remaining = mse_loss(unet(whole.add_noise(retain, noise, t), t, kept).sample, noise)
        noisy = whole.add_noise(forget, noise, t)
        predicted, target = unet(noisy, t, concept).sample, unet(noisy, t, other).sample.detach()
        (mse_loss(predicted, target) + 0.5 * remaining).backward()
        for name, p in unet.named_parameters():
            if p.grad is not None:
                p.grad *= mask[name]
        optimizer.step()
        yield time.perf_counter() - began


def ours(args: argparse.Namespace) -> Iterator[float]:
    """Take the same step with the method ``salun`` as users run it, with a memory preset's settings."""
    settings = {"steps": args.steps, "batch_size": args.batch, "lr": 1e-5} | MEMORY[args.memory].get("settings", {})
    bf16 = settings.get("weights") == "bf16"
    whole = model(args.width, args.family, torch.bfloat16 if bf16 else torch.float32)
    context, tokens = whole.unet.config.cross_attention_dim, TOKENS + whole.family.extra_tokens
    n = max(4, args.batch)
    latents, embedded = torch.randn(n, 4, args.size // 8, args.size // 8), torch.randn(n, tokens, context)
    which, none = torch.arange(n), torch.arange(0)
    data = ForgetRetain(
        *(latents, which, latents[:0], none, latents, which, embedded, embedded[None], embedded, embedded[:1]),
        *(torch.ones(n, 2).long(), torch.ones(n, 2).long()),
        *(torch.zeros(n).long(), *[torch.zeros(n, TOKENS).long()] * 3),
    )
    bits = {
        name: torch.from_numpy(np.packbits(torch.randint(0, 2, (p.numel(),), dtype=torch.uint8).numpy()))
        for name, p in whole.unet.named_parameters()
    }
    mask = Mask(bits, {name: tuple(p.shape) for name, p in whole.unet.named_parameters()})
    before = 0.0
    for record in salun(whole, data, mask, SalUnSettings(**settings), seed=0):
        if isinstance(record, Record):
            yield record.seconds - before
            before = record.seconds


FLOWS = {flow.__name__: flow for flow in (bare, published, ours)}


def measured(flow: str, *, fast: bool, **options: Any) -> dict[str, Any]:
    """Run a flow in a new process: ``seconds`` of each step but the first, ``peak`` and ``before`` in GiB.

    ``fast`` sets the allocator as the Makefile does; without it the memory is what a plain process takes.
    """
    command = [sys.executable, __file__, flow, *(f"--{key}={value}" for key, value in options.items())]
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    environment = plain | (ALLOCATOR if fast else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, value: float, unit: str, baseline: float, bar: str = "", *, holds: bool = True) -> dict[str, Any]:
    """Return a line of a benchmark's results; one without a bar holds."""
    line = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": value / baseline}
    return line | {"bar": bar, "holds": holds}


def main() -> None:
    """Run one flow and print what it took as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("flow", choices=FLOWS)
    parser.add_argument("--family", default="sd1", choices=("sd1", "sdxl"))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", default="fast", choices=MEMORY)
    args = parser.parse_args()
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss / 2**30
    seconds = list(FLOWS[args.flow](args))[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak": peak, "before": before}))


if __name__ == "__main__":
    main()
