"""Files appear whole or not at all, and as the user's umask says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erase_concept.files import atomic_write


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    with pytest.raises(TypeError), atomic_write(file) as partial:
        partial.write_text("half") + partial  # 4 characters, and then an error
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_write(file) as partial:
        partial.write_text("whole")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["a.txt"]
    with pytest.raises(TypeError), atomic_write(file) as partial:
        partial.write_text("half") + partial
    assert file.read_text() == "whole"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "w.safetensors") as partial:
            save_file({"x": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode
