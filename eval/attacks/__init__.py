"""Attacks, one file each: what brings a concept back without asking for it by name."""
