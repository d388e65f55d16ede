"""Seeds: each stage of a run has its own, derived from the run's seed and the stage's name."""

from __future__ import annotations

import hashlib

import torch


def stage_seed(seed: int, *stage: object) -> int:
    """Return a seed in [0, 2^63) that depends on the run's seed and every part of the stage's name."""
    digest = hashlib.sha256(repr((seed, *stage)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stage_generator(seed: int, *stage: object) -> torch.Generator:
    """Return a CPU generator with the stage's seed."""
    return torch.Generator().manual_seed(stage_seed(seed, *stage))
