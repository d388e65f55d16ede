"""Model families, one file each: what a model is made of and how it predicts."""
