"""Emojinette's classifier: which of the 20 objects and which of the 4 styles an image of 64 x 64 shows."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from erase_concept.pipelines.emojinette import CATALOG

FEATURES = 96


class EmojinetteClassifier(nn.Module):
    """A small residual network with one head for objects and one for styles.

    Takes RGB images [n, 3, 64, 64] in [0, 1]; ``features`` returns [n, 96], ``forward`` two tables of logits,
    [n, 20] for the objects and [n, 4] for the styles, in the order of the catalogue.
    """

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.stages = nn.ModuleList([_Stage(24, 32), _Stage(32, 64), _Stage(64, FEATURES)])
        self.object_head = nn.Linear(FEATURES, len(CATALOG.objects))
        self.style_head = nn.Linear(FEATURES, len(CATALOG.styles))

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features [n, 96] under both heads."""
        hidden = self.stem(images * 2 - 1)
        for stage in self.stages:
            hidden = stage(hidden)
        return hidden.mean((2, 3))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return object logits [n, 20] and style logits [n, 4] of features [n, 96]."""
        return self.object_head(features), self.style_head(features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return object logits [n, 20] and style logits [n, 4]."""
        return self.heads(self.features(images))


class _Stage(nn.Module):
    """Halve the resolution, then add one residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.block = nn.Sequential(
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.down(hidden))
        return hidden + self.block(hidden)


def load_classifier(file: Path) -> EmojinetteClassifier:
    """Load a classifier saved as safetensors (any float dtype), in fp32 and evaluation mode."""
    model = EmojinetteClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return model.eval().requires_grad_(False)
