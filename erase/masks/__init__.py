"""Masks: which weights may change. Saliency, the exact top k, one bit for each weight, scopes."""
