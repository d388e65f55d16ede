"""``python -m erase_concept``: the command, for launchers such as ``accelerate launch`` and torchrun."""

import runpy

runpy.run_module("erase_concept.cli", run_name="__main__", alter_sys=True)
