"""A benchmark in miniature: an untrained classifier, invented real images, and coloured noise for samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from erase_concept.eval import benchmark, fidelity
from erase_concept.pipelines.emojinette.classifier import FEATURES, EmojinetteClassifier
from erase_concept.pipelines.sample import ImageSet
from erase_concept.prompts.concept import Concept, concepts
from erase_concept.prompts.promptset import PromptRow


@pytest.fixture(scope="session")
def classifier() -> EmojinetteClassifier:
    """Return an untrained classifier, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmojinetteClassifier().eval().requires_grad_(False)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: EmojinetteClassifier) -> None:
    """Put the untrained classifier and invented real images in the place of the shipped ones."""
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    generator = np.random.default_rng(1)
    real = {
        "features": generator.normal(size=(240, FEATURES)).astype(np.float16),
        "object": np.tile(np.arange(20), 12).astype(np.uint8),
        "style": np.repeat(np.arange(4), 60).astype(np.uint8),
    }
    save_arrays(real, tmp_path / "reference.safetensors")
    monkeypatch.setattr(benchmark, "CLASSIFIER", tmp_path / "classifier.safetensors")
    monkeypatch.setattr(benchmark, "REFERENCE", tmp_path / "reference.safetensors")
    monkeypatch.setattr(fidelity, "REFERENCE", tmp_path / "reference.safetensors")
    # As where the extra is not installed; tests/eval/test_fidelity.py runs the network itself.
    monkeypatch.setattr(fidelity, "find_spec", lambda name: None)


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., ImageSet]:
    """Return a function that draws one image of coloured noise per row into a folder."""

    def draw(name: str, rows: tuple[PromptRow, ...], *, seed: int = 0, size: int = 64, steps: int = 25) -> ImageSet:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        files = []
        for place in range(len(rows)):
            colours = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            files.append(folder / f"{place:05d}.png")
            Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST).save(files[-1])
        return ImageSet(
            tuple(files), rows, {"unet": name, "sampler": "DPM-Solver++ 2M", "steps": steps, "guidance": 7.5}
        )

    return draw


@pytest.fixture(scope="session")
def church() -> Concept:
    """Return the built-in object concept."""
    return concepts()["church"]


@pytest.fixture(scope="session")
def sketch() -> Concept:
    """Return the built-in style concept."""
    return concepts()["sketch"]
