"""The training of the built-in model: its captions, and that what it writes loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.captions import TOKENS, prompt_for, train_tokenizer
from erase_concept.pipelines.emojinette.parts import new_scheduler, new_text_encoder, new_unet, new_vae
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion


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
