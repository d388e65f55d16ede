"""The command ``erase-concept``: one file per command."""
