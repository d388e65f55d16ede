"""The last two checkpoints are kept, and one that is damaged is never used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erase_concept.training.checkpoint import previous, read_checkpoint, save_checkpoint, steps_done, steps_in


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights.a": torch.randn(5, 3, generator=generator),
        "mean.a": torch.randn(7, generator=generator).bfloat16(),
        "step": torch.tensor(step),
    }


def same(found: dict[str, torch.Tensor], step: int) -> bool:
    expected = tensors(step)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    assert steps_done(file) == steps_done(None) == 0
    for step in (2, 4, 6):
        save_checkpoint(file, tensors(step), step)
        assert steps_done(file) == step
    assert sorted(one.name for one in tmp_path.iterdir()) == ["last.safetensors", "last.safetensors.previous"]
    assert same(read_checkpoint(file), 6)
    file.unlink()  # as a kill between the two renames leaves them
    assert steps_done(file) == 4
    assert same(read_checkpoint(file), 4)


@pytest.mark.parametrize("damage", [torn, flipped, emptied])
def test_the_one_before_a_damaged_one_is_used(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "last.safetensors"
    for step in (2, 4):
        save_checkpoint(file, tensors(step), step)
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert steps_done(file) == 2
        assert same(read_checkpoint(file), 2)
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [f"erase-concept: {file}"]
    save_checkpoint(file, tensors(4), 4)
    assert same(read_checkpoint(file), 4)
    damage(file)
    assert steps_done(file) == 2  # the damaged one has not taken the place of the one before
    damage(previous(file))
    assert steps_done(file) == 0


def test_another_step_in_the_metadata_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, tensors(4), 4)
    file.write_bytes(file.read_bytes().replace(b'"step":"4"', b'"step":"5"'))
    assert steps_done(file) == 0


def test_other_versions_of_the_libraries_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, tensors(4), 4)
    with caplog.at_level(logging.WARNING):
        assert same(read_checkpoint(file), 4)
        assert not caplog.records
        monkeypatch.setattr("erase_concept.training.checkpoint.versions", lambda: {"torch": "1.0"})
        assert same(read_checkpoint(file), 4)
    (record,) = caplog.records
    assert f"torch {torch.__version__.partition('+')[0]}" in record.getMessage()
    assert "and this is torch 1.0: the result will not have the bits" in record.getMessage()


def test_the_steps_of_all_trainings_are_counted(tmp_path: Path) -> None:
    for name, steps in (("last.safetensors", (1, 2)), ("last-1.safetensors", (3,))):
        for step in steps:
            save_checkpoint(tmp_path / name, tensors(step), step)
    assert steps_in(tmp_path) == 2 + 3
    (tmp_path / "last.safetensors").unlink()
    assert steps_in(tmp_path) == 1 + 3
    assert steps_in(tmp_path / "absent") == 0
