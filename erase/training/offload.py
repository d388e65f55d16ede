"""Keep weights that are not needed for a while on the disk, where they take no memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from erase_concept.files import atomic_write


@contextmanager
def offload_to_disk(modules: Sequence[nn.Module], folder: Path) -> Iterator[None]:
    """Write the modules' weights to files in the folder, and bring the same weights back when the context ends.

    The folder is removed with its files.
    """
    places = [(module, next(module.parameters()).device) for module in modules]
    for i, (module, _) in enumerate(places):
        with atomic_write(folder / f"{i}.safetensors") as partial:
            save_file({name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}, partial)
        for p in module.parameters():
            p.data = p.data.new_empty(0)
    try:
        yield
    finally:
        for i, (module, device) in enumerate(places):
            with safe_open(folder / f"{i}.safetensors", "pt") as stored:
                for name, p in module.named_parameters():
                    # A copy: what safetensors returns is mapped to the file, and the file is removed.
                    p.data = stored.get_tensor(name).clone().to(device)
        shutil.rmtree(folder)
