"""The methods, one file each. A file in this folder is found by itself; other packages use an entry point."""

from erase_concept.method import METHODS

__all__ = ["METHODS"]
