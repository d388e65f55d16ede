"""``mask`` and ``mask-info``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


def test_mask_command_makes_the_runs_mask(folder: Path, command: Command, small: Sequence[str]) -> None:
    command("erase", "model", "-c", "square.yaml", "-o", "run", *small)
    data = [s for s in small if s.startswith("data.")]
    options = [part for setting in data for part in ("-s", setting)]
    code, _, _ = command("mask", "model", "-c", "square.yaml", "-o", "m.safetensors", *options)
    assert code == 0
    _, out, _ = command("mask-info", "m.safetensors", "run/mask.safetensors", "--json")
    assert json.loads(out)["overlaps"][0]["jaccard"] == 1


def test_masks_are_described(folder: Path, command: Command, small: Sequence[str]) -> None:
    """Density, origin, and the overlap of two masks that have nothing in common."""
    data = [part for name in ("forget=2", "retain=2", "steps=2") for part in ("-s", f"data.{name}")]
    for kind in ("salient", "least-salient"):
        asked = ["mask", "model", "-c", "square.yaml", "--mask", kind, "-o", f"{kind}.safetensors", *data]
        code, out, err = command(*asked, "--sparsity", "0.75", "--json")
        assert code == 0, err
        assert json.loads(out)["density"] == pytest.approx(0.25, abs=1e-4)
    code, out, _ = command("mask-info", "salient.safetensors", "least-salient.safetensors", "--json")
    assert (code, json.loads(out)["overlaps"][0]["jaccard"]) == (0, 0)
    code, out, _ = command("mask-info", "salient.safetensors")
    assert (code, "cross-attention" in out, "25.0%" in out) == (0, True, True)
