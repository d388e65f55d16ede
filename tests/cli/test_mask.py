"""``mask`` and ``mask-info``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


def test_mask_command_makes_the_runs_mask(folder: Path, command: Command, small: Sequence[str]) -> None:
    command("erase", "model", "-c", "square.yaml", "-o", "run", *small)
    data = [s for s in small if s.startswith("data.")]
    options = [part for setting in data for part in ("-s", setting)]
    code, _, _ = command("mask", "model", "-c", "square.yaml", "-o", "m.safetensors", *options)
    assert code == 0
    _, out, _ = command("mask-info", "m.safetensors", "run/mask.safetensors", "--json")
    assert json.loads(out)["overlaps"][0]["jaccard"] == 1
