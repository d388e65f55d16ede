"""The built-in model: a tiny Stable Diffusion of 20 objects in 4 styles, drawn as emoji of 64 x 64 pixels."""

from pathlib import Path

from erase_concept.prompts.catalog import catalog

HOME = Path(__file__).parent
MODEL = HOME / "model"
CLASSIFIER = HOME / "classifier.safetensors"
REFERENCE = HOME / "reference.safetensors"
CATALOG = catalog("emojinette")  # the words that it knows
