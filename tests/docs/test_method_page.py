"""The method that docs/extending/method.md shows is a method like any other: its very text is run here."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from erase_concept.masks.mask import Mask
from erase_concept.methods import METHODS
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.training.loop import Record


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the example, from a file of its own as a contributor would write it."""
    page = (Path(__file__).parents[2] / "docs" / "extending" / "method.md").read_text(encoding="utf-8")
    file = tmp_path / "towards_nothing.py"
    file.write_text(re.findall(r"```python\n(.*?)```", page, re.S)[0], encoding="utf-8")
    monkeypatch.setattr(METHODS, "_records", METHODS.all())
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("towards_nothing", None)
    importlib.import_module("towards_nothing")


@pytest.mark.parametrize("mask", [None, "none", "random"])
def test_the_example_runs_and_takes_every_mask(
    example: None, tiny: Diffusion, square: Concept, tmp_path: Path, mask: str | None
) -> None:
    assert "towards-nothing" in METHODS.all()
    save_pipeline(tiny, tmp_path / "model")
    values = {"model": str(tmp_path / "model"), "concept": square, "method": "towards-nothing"}
    values |= {"data": {"forget": 4, "retain": 4, "steps": 2}, "settings": {"steps": 3, "batch_size": 2, "lr": 1e-3}}
    recipe = make_recipe(values | ({} if mask is None else {"mask": {"kind": mask}}))
    assert recipe.mask.kind == (mask or "salient")
    records = [event for event in iter_erase(recipe, tmp_path / "run") if isinstance(event, Record)]
    assert [record.step for record in records] == [1, 2, 3]
    erased = load(tmp_path / "run" / "pipeline").unet
    frozen = moved = 0
    kept = None if mask == "none" else Mask.load(tmp_path / "run" / "mask.safetensors")
    for name, p in erased.named_parameters():
        differs = p != tiny.unet.get_parameter(name)
        outside = torch.zeros_like(differs) if kept is None else ~kept.dense(name)
        frozen += int((differs & outside).sum())
        moved += int(differs.sum())
    assert frozen == 0
    assert moved > 0
