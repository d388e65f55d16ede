"""What is asked of a model: concepts and prompt sets."""
