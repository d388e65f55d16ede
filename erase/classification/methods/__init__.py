"""The methods for classifiers, one file each. A file here is found by itself; other packages use an entry point."""

from erase_concept.classification.method import UNLEARNERS

__all__ = ["UNLEARNERS"]
