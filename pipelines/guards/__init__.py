"""Guards, one file each: ways to sample that keep a concept out while no weight changes."""
