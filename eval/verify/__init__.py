"""Checks a run or an export against its base model and its own records, and certifies it."""
