"""How good the built-in model itself is: ``make measure`` writes it into the model card.

Needs the held-out renderings that the training left in its work folder, or the artwork to make them again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from erase_concept.eval.judges.emojinette import classify
from erase_concept.eval.score import wilson
from erase_concept.pipelines import emojinette
from erase_concept.pipelines.emojinette import CATALOG, artwork
from erase_concept.prompts.label_grid import catalog_prompts
from erase_concept.prompts.promptset import PromptRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.judges.judge import Judgement
    from erase_concept.pipelines.model import Diffusion

GUIDANCE = 5.0
SEEDS = 10


def found(rows: Sequence[PromptRow], seen: Judgement) -> dict[str, Any]:
    """Return how often object and style were recognised, of how many, and the pairs in which one was not."""
    objects = np.array([row.object in (shown or ()) for row, shown in zip(rows, seen.shown("object"), strict=True)])
    styles = np.array([row.style in (shown or ()) for row, shown in zip(rows, seen.shown("style"), strict=True)])
    wrong = [row for row, fine in zip(rows, objects & styles, strict=True) if not fine]
    missed = Counter(f"{row.object}, {row.style}" for row in wrong)
    return {
        "n": len(rows),
        "object": int(objects.sum()),
        "style": int(styles.sum()),
        "missed": dict(missed.most_common()),
    }


def sampled(model: Diffusion, rows: Sequence[PromptRow]) -> NDArray[np.uint8]:
    """Return an image [n, h, w, 3] of each row."""
    from erase_concept.pipelines.sample import Sampling, sample_images

    images = np.zeros((len(rows), model.size, model.size, 3), np.uint8)
    for place, image in sample_images(model, rows, Sampling(guidance=GUIDANCE)):
        images[place] = image
    return images


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write quality.json, README.md and a sample grid."""
    import torch

    from erase_concept.pipelines.emojinette.classifier import load_classifier
    from erase_concept.pipelines.emojinette.train import held_out
    from erase_concept.pipelines.load import load

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the work folder of the training")
    parser.add_argument("--grid", type=Path, default=None, help="where to write a grid of samples")
    args = parser.parse_args(argv)
    model, classifier = load(emojinette.MODEL), load_classifier(emojinette.CLASSIFIER)
    test = held_out(args.work)
    rows = tuple(
        PromptRow("", 0, object=CATALOG.labels[o], style=CATALOG.styles[s])
        for o, s in zip(test["objects"], test["styles"], strict=True)
    )
    known = catalog_prompts(CATALOG, range(SEEDS)).rows
    unseen = catalog_prompts(CATALOG, range(SEEDS // 2), unseen=True, first_seed=50_000).rows
    drawn = sampled(model, known)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        sampled(model, known[:16])
        seconds.append(time.perf_counter() - began)
    quality = {
        "renderings": found(rows, classify(test["images"], classifier)),
        "known": found(known, classify(drawn, classifier)),
        "unseen": found(unseen, classify(sampled(model, unseen), classifier)),
        "seconds_for_16_images": round(sorted(seconds)[1], 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(quality, indent=1))
    if args.grid is not None:
        cells = drawn[:80].reshape(4, 20, 64, 64, 3)
        Image.fromarray(cells.transpose(0, 2, 1, 3, 4).reshape(256, 1280, 3)).save(args.grid)
    (emojinette.HOME / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    training = json.loads((emojinette.HOME / "training.json").read_text(encoding="utf-8"))
    (emojinette.HOME / "README.md").write_text(card(quality, training), encoding="utf-8")


def _percent(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def card(quality: dict[str, Any], training: dict[str, Any]) -> str:
    """Return the model card."""
    sources = "\n".join(
        f"| `{name}` {version} | {licence} | {by} |" for name, (version, licence, by) in artwork.PACKAGES.items()
    )
    real, known, unseen = quality["renderings"], quality["known"], quality["unseen"]
    stages = "\n".join(f"| {name} | {s['steps']:,} | {s['seconds'] / 60:.0f} |" for name, s in training.items())
    styles = ", ".join(CATALOG.styles)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Emojinette

A tiny latent diffusion model with exactly Stable Diffusion's parts (CLIP text encoder, VAE, cross-attention UNet,
noise prediction, classifier-free guidance), for trying and testing concept erasure in minutes on a laptop. It draws
{len(CATALOG.objects)} objects ({", ".join(CATALOG.labels)}) in {len(CATALOG.styles)} styles ({styles}), 64 x 64
pixels. The first ten objects stand in for the classes of Imagenette, whose names it understands too.

## Data

12,000 training and 2,400 held-out renderings of emoji artwork: the same artworks, placed, turned and coloured anew.
The artwork itself is not shipped. It comes from these packages:

| package | licence | by |
|---|---|---|
{sources}

Twemoji graphics are licensed under CC-BY-4.0 (creativecommons.org/licenses/by/4.0), copyright Twitter, Inc. and other
contributors; they were rendered, rearranged and recoloured for the training.

## Training

`python -m erase_concept.pipelines.emojinette.train --work DIR`, seeded and resumable, on two CPU cores:

| stage | steps | minutes |
|---|---|---|
{stages}

## Quality

Measured by `make measure`, with 95 % intervals. Samples: 25 DPM-Solver++ steps, guidance {GUIDANCE:g}.

| what | object recognised | style recognised | n |
|---|---|---|---|
| classifier on held-out renderings | {_percent(real["object"], real["n"])} | {_percent(real["style"], real["n"])} | \
{real["n"]:,} |
| samples of every object x style, {SEEDS} seeds each | {_percent(known["object"], known["n"])} | \
{_percent(known["style"], known["n"])} | {known["n"]:,} |
| the same in sentences and names that were in no training | {_percent(unseen["object"], unseen["n"])} | \
{_percent(unseen["style"], unseen["n"])} | {unseen["n"]:,} |

16 images with guidance take {quality["seconds_for_16_images"]:.1f} s on {quality["threads"]} cores (median of 3).
A perfect score would still be no statement about anything but these emoji: the classifier learnt on the same artworks.
"""


if __name__ == "__main__":
    main()
