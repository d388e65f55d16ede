"""A built-in model: a small class-conditional DDPM of Fashion-MNIST's ten classes, 16 x 16 grey pixels."""

from pathlib import Path

from erase_concept.prompts.catalog import catalog

HOME = Path(__file__).parent
MODEL = HOME / "model"
CLASSIFIER = HOME / "classifier.safetensors"
REFERENCE = HOME / "reference.safetensors"
LABELS = tuple(catalog("fashion-mnist").concepts)  # in the order of the classes
SIZE = 16  # pixels
