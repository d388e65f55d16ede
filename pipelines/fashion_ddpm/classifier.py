"""The classifier that judges the model's images: ResNet-18 in its CIFAR shape, a quarter of its width."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from erase_concept.pipelines.classifiers.resnet import ResNet18
from erase_concept.pipelines.fashion_ddpm import LABELS

WIDTH = 16


def new_classifier() -> ResNet18:
    """Return the untrained classifier; it takes grey images [n, 1, 16, 16] in [-1, 1] and has features [n, 128]."""
    return ResNet18(len(LABELS), channels=1, width=WIDTH)


def load_classifier(file: Path) -> ResNet18:
    """Load a classifier saved as safetensors (any float dtype), in fp32 and evaluation mode."""
    network = new_classifier()
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False)


def to_input(images: Tensor) -> Tensor:
    """Turn grey images uint8 [n, 1, h, w] into floats in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1
