"""The processes that share the work, where ``accelerate launch`` or ``torchrun`` has started several.

Torch is imported late, for the command asks here before it knows whether it needs it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def main_process() -> bool:
    """Tell whether this is the only process or the first of several, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> PartialState:
    """Return what Accelerate knows of this process: its device, its number, and how many there are.

    The first call in a process fixes it, so everything asks here. On CPUs Accelerate sees the other processes only
    when it is told to use no accelerator.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env(
        "ACCELERATE_USE_CPU"
    )  # by ``accelerate launch --cpu``; only Accelerator reads it itself
    return PartialState(cpu=asked or not torch.accelerator.is_available())


def total(count: int) -> int:
    """Return the sum of every process's count; all of them have to ask for it."""
    from accelerate.utils import gather_object

    processes()
    return sum(gather_object([count]))
