"""Image classifiers: what they are made of, where their weights come from, and the images that they learn from."""
