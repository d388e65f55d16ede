"""The negative prompt, as every program for Stable Diffusion has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from erase_concept.pipelines.guards import GUARDS
from erase_concept.pipelines.guards.guard import Guard, Predict, classifier_free, encode_names
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import NoSettings


def negative_prompt(
    model: Diffusion,
    names: Sequence[str],
    settings: NoSettings,
    embeddings: Tensor,
    uncond: Tensor,
    scale: Tensor,
    steps: int,
) -> Predict:
    """Classifier-free guidance away from the concept's names in the place of the empty prompt."""
    return classifier_free(model, names, settings, embeddings, encode_names(model, names, uncond), scale, steps)


GUARDS.add(
    Guard("negative-prompt", "Guide away from the concept's names.", NoSettings, guide=negative_prompt),
)
