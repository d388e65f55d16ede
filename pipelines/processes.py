"""The processes that share the work, where ``accelerate launch`` or ``torchrun`` has started several.

Torch is imported late: the command uses this file before it knows whether it needs torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def main_process() -> bool:
    """Tell whether this is the only process or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> PartialState:
    """Return Accelerate's state of this process: its device, its number, and how many processes there are.

    The first call in a process fixes the state, so all code calls this function. On CPUs Accelerate finds the other
    processes only with ``cpu=True``.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # ``accelerate launch --cpu`` sets it, and PartialState does not read it.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def total(count: int) -> int:
    """Return the sum of all processes' counts; every process has to call it."""
    from accelerate.utils import gather_object

    processes()
    return sum(gather_object([count]))
