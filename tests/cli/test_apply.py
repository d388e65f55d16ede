"""``export`` and ``apply``: a delta there and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import weights_hash

Command = Callable[..., tuple[int, str, str]]


def test_a_delta_makes_the_erased_model_and_gives_the_base_back(
    folder: Path, command: Command, small: Sequence[str]
) -> None:
    command("erase", "model", "-c", "square.yaml", "-o", "run", *small)
    assert command("export", "run", "-f", "delta", "-o", "d.safetensors")[0] == 0
    assert command("apply", "d.safetensors", "model", "-o", "erased")[0] == 0
    assert command("apply", "d.safetensors", "erased", "-o", "base", "--revert")[0] == 0
    account = json.loads((folder / "run" / "run.json").read_text())
    for name, side in (("erased", "erased"), ("base", "base")):
        assert weights_hash(load(folder / name).unet) == account[side]["unet"]
    code, _, err = command("apply", "d.safetensors", "erased", "-o", "twice")
    assert (code, "is not the base model" in err) == (2, True)
    assert not (folder / "twice").exists()
    code, out, _ = command("apply", "d.safetensors", "erased", "-o", "twice", "--transfer")
    assert (code, "measure whether" in out) == (0, True)
    half = ["export", "run", "-f", "delta", "--dtype", "fp16", "-o", "half.safetensors"]
    assert command(*half)[0] == 0
    assert command("apply", "half.safetensors", "model", "-o", "half")[0] == 0
    erased, half = load(folder / "run", dtype=torch.float16), load(folder / "half", dtype=torch.float16)
    assert weights_hash(half.unet) == weights_hash(erased.unet)
