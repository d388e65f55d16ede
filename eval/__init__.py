"""Is the concept gone, and is everything else still there."""
