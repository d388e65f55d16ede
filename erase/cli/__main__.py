"""The command as a module."""

from erase_concept.cli.main import main

main()
