"""Keep weights that are not needed for a while on the disk, where they take no memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.processes import from_main, processes


@contextmanager
def offload_to_disk(modules: Sequence[nn.Module], folder: Path) -> Iterator[None]:
    """Write the modules' weights to files in the folder, and bring the same weights back when the context ends.

    The folder is removed with its files. Several processes have the same weights: the main one writes them, and all of
    them read them. When several processes fail, the modules stay empty.
    """
    places = [(module, next(module.parameters()).device) for module in modules]

    def write() -> None:
        for i, module in enumerate(modules):
            with atomic_write(folder / f"{i}.safetensors", sync=False) as partial:
                save_tensors({name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}, partial)

    from_main(write)
    for module in modules:
        for p in module.parameters():
            p.data = p.data.new_empty(0)
    done = False
    try:
        yield
        done = True
    finally:
        state = processes()
        if done or state.num_processes == 1:
            _bring_back(places, folder)
        if done:  # after a failure nobody can be waited for
            state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folder)


def _bring_back(places: Sequence[tuple[nn.Module, torch.device]], folder: Path) -> None:
    """Read the weights of each module from its file, to its device."""
    for i, (module, device) in enumerate(places):
        with safe_open(folder / f"{i}.safetensors", "pt") as stored:
            for name, p in module.named_parameters():
                # A copy: what safetensors returns is mapped to the file, and the file is removed.
                p.data = stored.get_tensor(name).clone().to(device)
