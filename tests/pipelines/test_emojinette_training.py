"""The training of the built-in model: it goes on where it was killed, and what it writes loads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.captions import TOKENS, prompt_for, train_tokenizer
from erase_concept.pipelines.emojinette.parts import new_scheduler, new_text_encoder, new_unet, new_vae
from erase_concept.pipelines.emojinette.train import Schedule, fit
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion


def trained(work: Path, *, killed_at: int | None = None) -> dict[str, torch.Tensor]:
    """Fit a line in 600 steps; return the averaged weights."""
    torch.manual_seed(0)
    line = nn.Linear(2, 1)
    calls = 0

    def loss(rng: np.random.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 2))).float()
        return (line(x) - x.sum(1, keepdim=True) + 0.1 * torch.randn(8, 1)).square().mean()

    work.mkdir(exist_ok=True)
    return fit("line", {"line": line}, loss, work, Schedule(600, 1e-2, flat=0.3))["line"].state_dict()


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", killed_at=550)
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    torch.testing.assert_close(whole["weight"], torch.ones(1, 2), atol=0.1, rtol=0)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [Schedule(2000, 1.0, flat=0.25).rate(step) for step in range(2000)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(rates[99:501]) == {1.0}
    assert rates[1250] == pytest.approx(0.5)  # half-way down the cosine
    assert all(later <= earlier for earlier, later in pairwise(rates[500:]))
    assert rates[-1] < 1e-5


def test_captions_name_what_is_drawn_as_often_as_they_should() -> None:
    rng = np.random.default_rng(0)
    drawn = [prompt_for("church", "pixel", rng) for _ in range(4000)]
    names = CATALOG.names_of("church")
    empty = sum(caption == "" for caption in drawn) / 4000
    named = sum(names.label in caption or names.synonym in caption for caption in drawn) / 4000
    styled = sum("pixel" in caption for caption in drawn) / 4000
    assert empty == pytest.approx(0.10, abs=0.02)
    assert named == pytest.approx(0.85, abs=0.02)
    assert styled == pytest.approx(0.55, abs=0.03)
    assert not any("{" in caption for caption in drawn)


def test_the_untrained_parts_make_a_model_that_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(tmp_path / "tokenizer")
    parts = {"tokenizer": tokenizer, "text_encoder": new_text_encoder(tokenizer), "vae": new_vae(), "unet": new_unet()}
    save_pipeline(
        Diffusion(FAMILIES.find("sd1"), parts | {"scheduler": new_scheduler()}, source="new"), tmp_path / "out"
    )
    model = load(tmp_path / "out")
    assert (model.family.name, model.stored, model.size) == ("sd1", "float32", 64)
    assert model.encode_prompts(["a church"]).shape == (1, TOKENS, 128)
    assert {file.name for file in (tmp_path / "out" / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
