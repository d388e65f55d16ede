"""Masks: which weights may change. Saliency, the exact top k, one bit for each weight, scopes."""

from erase_concept.masks.mask import Mask, all_ones, describe, expand_to
from erase_concept.masks.scopes import SCOPES, TEXT_ENCODER, in_scope, token_rows
from erase_concept.masks.top_k import bottom_k, keep_count, random, top_k

__all__ = [
    "SCOPES",
    "TEXT_ENCODER",
    "Mask",
    "all_ones",
    "bottom_k",
    "describe",
    "expand_to",
    "in_scope",
    "keep_count",
    "random",
    "token_rows",
    "top_k",
]
