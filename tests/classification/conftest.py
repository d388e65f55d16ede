"""A small ResNet with random weights, images of noise that it can learn, and a data set in Fashion-MNIST's format."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.pipelines.classifiers.architectures import build
from erase_concept.pipelines.classifiers.classifier import Classifier, Normalisation
from erase_concept.pipelines.classifiers.images import InMemory

ARCHITECTURE = "resnet18-cifar[width=2]"
# PyTorch 2.14 writes past its memory in training convolutions of fewer than 16 channels on several threads, and the
# process dies. It does so without any code of ours; a width of 16 and more is sound.
torch.set_num_threads(1)


@pytest.fixture
def model() -> Classifier:
    """A classifier of three classes, always the same one, whose statistics are not the initial ones."""
    network = build(ARCHITECTURE, 3, 1, seed=5).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 1, 12, 12, generator=generator))
    return Classifier(ARCHITECTURE, network.eval(), ("a", "b", "c"), Normalisation((0.4,), (0.5,)), 12, "small", {})


@pytest.fixture
def data() -> ForgetRetainImages:
    """Thirty images, of which eight are forgotten, without crops."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (30, 1, 12, 12), generator=generator, dtype=torch.uint8)
    order = torch.randperm(30, generator=generator)
    forget, retain = order[:8].sort().values, order[8:].sort().values
    return ForgetRetainImages(InMemory(images), torch.arange(30) % 3, 3, forget, retain)


def write_idx(file: Path, array: np.ndarray) -> None:
    """Write an array in the format IDX."""
    sizes = np.array(array.shape, ">i4").tobytes()
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 400 and 200 images of 8 x 8 pixels in ten classes, each a bright row in noise."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 200)):
        labels = generator.permutation(np.arange(count) % 10)
        images = generator.integers(0, 160, (count, 8, 8))
        images[np.arange(count), labels % 8] += 60
        images[np.arange(count), :, labels // 8 * 4] += 30
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return f"fashion-mnist:{folder}"
