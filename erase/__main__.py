"""``python -m erase_concept``: the command, for launchers such as torchrun."""

from erase_concept.cli.main import main

main()
