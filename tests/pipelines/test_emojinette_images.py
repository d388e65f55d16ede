"""The built-in model's artwork as a data set for classifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.images import read_images
from erase_concept.pipelines.emojinette import CATALOG, artwork


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A source whose artwork is a dark square, as large as the object's place in the catalogue says."""
    for package in artwork.PACKAGES:
        (tmp_path / package).mkdir(parents=True)

    def square(folder: Path, package: str, codepoint: str) -> Image.Image:
        place = list(artwork.CODEPOINTS.values()).index(codepoint)
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).rectangle((20, 20, 40 + 8 * place, 40 + 8 * place), (90, 0, 0, 255))
        return image

    monkeypatch.setattr(artwork, "_draw", square)
    artwork.load.cache_clear()
    return f"emojinette:{tmp_path}"


def test_the_classes_are_the_objects_in_every_style(drawn: str) -> None:
    images = read_images(drawn, 32)
    assert (images.name, images.labels) == ("emojinette", CATALOG.labels)
    assert (len(images.train), len(images.test), images.train.shape) == (8000, 2000, (3, 32, 32))
    for labels in (images.train_labels, images.test_labels):
        assert len(labels.bincount().unique()) == 1
    # The larger an object's square, the darker its images: so images and labels belong together.
    rows = torch.arange(80)
    means = images.train[rows].float().mean((1, 2, 3))
    small, large = means[images.train_labels[rows] == 1].mean(), means[images.train_labels[rows] == 18].mean()
    assert small > large + 20


def test_an_image_is_always_the_same_and_scaled_from_64_pixels(drawn: str) -> None:
    images, large = read_images(drawn, 32), read_images(drawn, 64)
    rows = torch.tensor([5, 123, 5])
    found = images.train[rows]
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], found[2])
    assert torch.equal(images.train[torch.tensor([123])][0], found[1])
    whole = artwork.render_rows(Path(drawn.partition(":")[2]), 2, [123])[0]
    assert np.array_equal(large.train[torch.tensor([123])][0].permute(1, 2, 0).numpy(), whole)
    scaled = np.asarray(Image.fromarray(whole).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(found[1].permute(1, 2, 0).numpy(), scaled)
    assert not torch.equal(images.test[rows[:1]], found[:1])


def test_artwork_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no @lobehub/fluent-emoji-3d; python -m .*artwork .* fetches"):
        read_images(f"emojinette:{tmp_path}")
    with pytest.raises(RequestError, match="needs the folder of its files: emojinette:DIR"):
        read_images("emojinette")
