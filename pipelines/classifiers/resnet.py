"""ResNet-18 in its CIFAR shape (He et al. 2016, arXiv 1512.03385): a 3 x 3 stem without pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, named as torchvision names them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        changed = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (changed + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet18(nn.Module):
    """ResNet-18 for small images. Width 64 and stride 1 give the usual 11.17 million weights for 10 classes.

    ``width`` is that of the first stage, and ``stride`` the stem's: 2 halves the sides of all feature maps.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, classes: int, channels: int = 3, width: int = 64, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            outputs = width << stage
            blocks = [BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features [n, 8 width] of images [n, channels, h, w]."""
        # Channels last, in which a CPU's convolutions are a tenth faster or more.
        x = self.bn1(self.conv1(x).contiguous(memory_format=torch.channels_last)).relu()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of images [n, channels, h, w]."""
        return self.fc(self.features(x))
