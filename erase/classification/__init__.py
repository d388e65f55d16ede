"""Unlearning in image classifiers: the images to forget, the methods, and the run from one classifier to another."""
