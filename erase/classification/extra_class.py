"""A classifier with one class more, and its mask."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier, head_of


def with_extra_class(model: Classifier, mask: Mask | None, seed: int) -> tuple[Classifier, Mask | None]:
    """Return a copy of a classifier with another logit, of a seed's random weights, and its mask, which allows these.

    Raises RequestError where the classifier has no linear head.
    """
    name, network = head_of(model), copy.deepcopy(model.network)
    old = network.get_submodule(name)
    assert isinstance(old, nn.Linear)  # that is what a head is
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = nn.Linear(old.in_features, old.out_features + 1, bias=old.bias is not None)
    new = new.to(old.weight.device)
    with torch.no_grad():
        for part, value in old.named_parameters():
            new.get_parameter(part)[: old.out_features] = value
    network.set_submodule(name, new)
    wider = replace(model, network=network.eval(), labels=(*model.labels, "forgotten"))
    if mask is None:
        return wider, None
    bits, shapes = dict(mask.bits), dict(mask.shapes)
    for part, value in new.named_parameters():
        dense = torch.ones(value.shape, dtype=torch.bool)
        dense[:-1] = mask.dense(f"{name}.{part}")
        bits[f"{name}.{part}"] = torch.from_numpy(np.packbits(dense.numpy()))
        shapes[f"{name}.{part}"] = tuple(value.shape)
    return wider, Mask(bits, shapes, mask.provenance)


def without_extra_class(wider: Classifier) -> dict[str, Tensor]:
    """Return the state of a network without its last logit."""
    head = wider.network.get_submodule(head_of(wider))
    state = dict(wider.network.state_dict())
    for part, _ in head.named_parameters():
        state[f"{head_of(wider)}.{part}"] = state[f"{head_of(wider)}.{part}"][:-1]
    return state
