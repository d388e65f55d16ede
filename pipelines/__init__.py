"""Models in; images and models out."""
