"""The forms a model is read from and written to, each with its round trip."""
