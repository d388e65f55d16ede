"""Prompts to images: one random generator per image, so neither batch size nor resuming changes its noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.files import whole
from erase_concept.pipelines.diffusion import Diffusion, weights_hash
from erase_concept.prompts.promptset import PromptRow, PromptSet

STEPS = 25
GUIDANCE = 7.5


@dataclass(frozen=True)
class ImageSet:
    """Images on disk with the rows they were made from; ``settings`` say how."""

    files: tuple[Path, ...]
    rows: tuple[PromptRow, ...]
    settings: dict[str, Any]

    def arrays(self) -> np.ndarray:
        """Return the images as uint8 [n, h, w, 3]; all must be of one size."""
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in self.files])


@torch.no_grad()
def sample_latents(
    model: Diffusion,
    embeddings: Tensor,
    empty: Tensor,
    seeds: Sequence[int],
    guidance: Sequence[float],
    *,
    steps: int = STEPS,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Sample scaled latents [n, 4, h/f, w/f] with DPM-Solver++ (arXiv 2211.01095), one seed and guidance scale each.

    ``embeddings`` [n, tokens, width] and ``empty`` [1, tokens, width] are encoded prompts. The noise of an image
    depends on its own seed alone. Sizes in pixels default to the model's.
    """
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    sides = ((side or model.size) // model.factor for side in (height, width))
    shape = (model.unet.config.in_channels, *sides)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(embeddings) * scheduler.init_noise_sigma
    scale = torch.tensor(guidance, dtype=embeddings.dtype, device=embeddings.device).view(-1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        predicted = model.guided(noisy, timestep, embeddings, empty, scale)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def sample_images(
    model: Diffusion, rows: Sequence[PromptRow], *, steps: int = STEPS, guidance: float = GUIDANCE, batch_size: int = 16
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place in rows, uint8 image [h, w, 3]) for every row; batches mix prompts but not sizes.

    ``guidance`` is for rows that name none.
    """
    empty = model.encode_empty()
    sizes = {(row.height, row.width) for row in rows}
    for height, width in sorted(sizes, key=str):
        places = [i for i, row in enumerate(rows) if (row.height, row.width) == (height, width)]
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            latents = sample_latents(
                model,
                model.encode_prompts([rows[i].prompt for i in batch]),
                empty,
                [rows[i].seed for i in batch],
                [guidance if (g := rows[i].guidance) is None else g for i in batch],
                steps=steps,
                height=height,
                width=width,
            )
            yield from zip(batch, model.decode(latents).numpy(), strict=True)


def sample(
    model: Diffusion,
    prompts: PromptSet,
    out: Path,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 16,
) -> Iterator[Path]:
    """Sample a prompt set into a folder, yielding each image's file as soon as it is written.

    Images are named by their place in the set; ``manifest.jsonl`` gets a line for each, with its row and SHA-256.
    Run again with the same model, prompts and settings, it makes only what is missing or has changed since; a folder
    made with others is refused with RequestError.
    """
    settings = {
        "unet": weights_hash(model.unet),
        **{name: weights_hash(encoder) for name, encoder in model.text_encoders.items()},
        "vae": weights_hash(model.vae),
        "prompts": hashlib.sha256(repr(prompts.rows).encode()).hexdigest(),
        "sampler": "DPM-Solver++ 2M",
        "steps": steps,
        "guidance": guidance,
    }
    out.mkdir(parents=True, exist_ok=True)
    about = out / "sampling.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise RequestError("--out", out, "holds images of another model, prompt set or setting; choose another folder")
    with whole(about) as partial:
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    manifest = out / "manifest.jsonl"
    kept = [line for line in _manifest(manifest) if _intact(out, line)]
    with whole(manifest) as partial:
        partial.write_text("".join(_json_line(line) for line in kept), encoding="utf-8")
    done = {line["image"] for line in kept}
    missing = [i for i in range(len(prompts.rows)) if f"{i:05d}.png" not in done]
    rows = [prompts.rows[i] for i in missing]
    with manifest.open("a", encoding="utf-8") as stream:
        for place, image in sample_images(model, rows, steps=steps, guidance=guidance, batch_size=batch_size):
            file = out / f"{missing[place]:05d}.png"
            with whole(file) as partial:
                Image.fromarray(image).save(partial, format="PNG")
            row = {
                key: value for key, value in asdict(rows[place]).items() if key == "prompt" or value not in ("", None)
            }
            stream.write(_json_line({"image": file.name, "sha256": _sha256(file), **row}))
            stream.flush()
            yield file


def read_images(folder: Path, *, argument: str = "DIR") -> ImageSet:
    """Read what ``sample`` wrote; raises RequestError when there is none or an image is missing or has changed."""
    lines = sorted(_manifest(folder / "manifest.jsonl"), key=lambda line: str(line.get("image")))
    if not lines:
        raise RequestError(argument, folder, "holds no manifest.jsonl with images in it")
    try:
        for line in lines:
            if not _intact(folder, line):
                raise RequestError(argument, folder, f"{line['image']} is missing or differs from the manifest")
        rows = tuple(PromptRow(**{k: v for k, v in line.items() if k not in ("image", "sha256")}) for line in lines)
        settings = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as problem:
        raise RequestError(argument, folder, f"not as 'sample' writes it: {problem!r}") from None
    return ImageSet(tuple(folder / line["image"] for line in lines), rows, settings)


def _manifest(file: Path) -> list[dict[str, Any]]:
    """Return the manifest's lines; one that a kill cut short does not count."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _intact(folder: Path, line: dict[str, Any]) -> bool:
    file = folder / Path(line["image"]).name
    return file.is_file() and _sha256(file) == line["sha256"]


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
