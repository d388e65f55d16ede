"""Judges, one file each: what tells whether an image shows a concept."""
