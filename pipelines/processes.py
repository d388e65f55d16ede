"""The processes that share the work, where ``accelerate launch`` or ``torchrun`` has started several.

Torch is imported late: the command uses this file before it knows whether it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import only_process

if TYPE_CHECKING:
    from accelerate import PartialState

_T = TypeVar("_T")
_OF_ALL = ("torch", "diffusers", "transformers", "erase-concept")  # what all processes need the same version of


def main_process() -> bool:
    """Tell whether this is the only process or the first of several."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def first_of_machine() -> bool:
    """Tell whether this is the only process, or the first of its machine."""
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return os.environ.get("WORLD_SIZE", "1") == "1" or first == "0"


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


def process_count() -> int:
    """Return how many processes were started together, without loading torch."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise RequestError("WORLD_SIZE", count, "must be a whole number")
    return int(count)


def launched_alone() -> bool:
    """Tell whether ``accelerate launch`` was asked for several processes and started one, as it does with ``--cpu``.

    It then sets the address at which they would meet, and no number of them; with MPI, that tells the number.
    """
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    asked = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    return asked and not any(name in os.environ for name in counts)


def lost_process(problem: BaseException) -> str:
    """Say why another process cannot be reached, in one line, where an error says that; "" for any other error."""
    from torch.distributed import DistError

    text = str(problem).lower()
    said = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo")
    if not isinstance(problem, DistError) and not (isinstance(problem, RuntimeError) and any(s in text for s in said)):
        return ""
    host, port = (os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
    if "eaddrinuse" in text or "address already in use" in text:
        return f"port {port} is in use: choose another one with the launcher's --main_process_port or --master-port"
    if "trying to connect" in text:
        return f"the first process cannot be reached at {host}, port {port}: was it started, and may it be reached?"
    return "another process of this run has ended; if it gave no reason, the same command goes on from here"


def total(count: int) -> int:
    """Return the sum of all processes' counts; every process has to call it."""
    return sum(gathered(count))


def gathered(value: _T) -> list[_T]:
    """Return the values of all processes, in their order; every process has to call it."""
    from accelerate.utils import gather_object

    processes()
    return cast(list[_T], gather_object([value]))


def from_main(work: Callable[[], _T]) -> _T:
    """Let the main process alone do some work, and return its result, or raise its error, in all processes.

    Every process has to call it. The work begins when all have: one may have ended before, and then no result is
    written that says that all is done. None goes on before the work is done.
    """
    from accelerate.utils import broadcast_object_list

    state = processes()
    outcome: list[tuple[_T | None, Exception | None]] = [(None, None)]
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            outcome = [(work(), None)]
        except (RequestError, EraseError, OSError) as problem:
            outcome = [(None, problem)]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, raised = outcome[0]
    if isinstance(raised, EraseError):
        raised.of_all = True
    if raised is not None:
        raise raised
    return cast(_T, result)


def same_for_all(setting: str, value: object, found: object) -> None:
    """Raise RequestError in all processes where one of them has found something else than the first; all call it.

    ``setting`` and ``value`` name what they looked at, such as the base model: machines may have other files of a name.
    """
    everywhere = gathered(found)
    others = [place for place, one in enumerate(everywhere) if one != everywhere[0]]
    if others:
        allowed = f"is another one for process {others[0]} than for the first: all machines must have the same files"
        raise RequestError(setting, value, allowed)


def _check_versions() -> None:
    """Raise RequestError in all processes where they do not work with the same versions: their bits would differ."""
    everywhere = gathered({name: version(name) for name in _OF_ALL})
    for place, found in enumerate(everywhere):
        for name, ours in everywhere[0].items():
            if found[name] != ours:
                allowed = f"process {place} has {name} {found[name]}, and the first has {ours}; all need the same"
                raise RequestError("processes", len(everywhere), allowed)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make a folder and hold it, so that no other run works in it; of several processes, the main one holds it.

    Raises RequestError in all processes where another run works in it, and where one of them does not see it or has
    other versions of the libraries.
    """
    with ExitStack() as until_the_end:

        def hold() -> None:
            out.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(only_process(out))

        _check_versions()
        from_main(hold)
        if not all(gathered(out.is_dir())):
            raise RequestError("out", out, "some of the processes do not see it: machines must share its file system")
        yield
