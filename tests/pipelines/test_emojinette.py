"""The built-in model: what it is made of, that it draws what it is asked for, and that it forgets."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from erase_concept.eval.benchmarks.emojinette import card
from erase_concept.eval.judges.emojinette import classify
from erase_concept.pipelines import emojinette
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.classifier import load_classifier
from erase_concept.pipelines.formats.weights import published_name
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import Sampling, sample_images
from erase_concept.prompts.label_grid import catalog_prompts


@pytest.fixture(scope="module")
def model() -> Diffusion:
    return load("emojinette")


def test_has_stable_diffusions_parts(model: Diffusion) -> None:
    schedule = model.scheduler.config
    assert (schedule.beta_schedule, schedule.prediction_type) == ("scaled_linear", "epsilon")
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    names = {name.split(".")[0] for name, _ in model.unet.named_parameters()}
    assert names == {
        *("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
    }
    assert any(".attn2.to_k." in name for name, _ in model.unet.named_parameters())
    assert type(model.pipeline()).__name__ == "StableDiffusionPipeline"


def test_text_encoder_has_the_published_names_and_its_trained_bits(model: Diffusion) -> None:
    """Bit for bit: the values of all tensors, in the order of the file, have had this SHA-256 since the training."""
    file = emojinette.MODEL / "text_encoder" / "model.safetensors"
    digest = hashlib.sha256()
    content = file.read_bytes()
    digest.update(content[8 + int.from_bytes(content[:8], "little") :])
    assert digest.hexdigest() == "1e75a7357786fc94be10ff6a4e2d66949d7d18bd7602b2fda3f1f136be537b23"
    with safe_open(file, "pt") as stored:
        assert all(name.startswith("text_model.") for name in stored.keys())
        for name, value in model.text_encoder.state_dict().items():
            assert torch.equal(value, stored.get_tensor(published_name(model.text_encoder, name)).float())


def test_diffusers_alone_loads_every_weight(model: Diffusion) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(emojinette.MODEL, torch_dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(pipeline, part)) == weights_hash(getattr(model, part))
    assert torch.equal(
        model.encode_prompts(["a church"]),
        pipeline.encode_prompt("a church", "cpu", 1, do_classifier_free_guidance=False)[0],
    )


def test_vocabulary_loads_without_tokenizer_json(model: Diffusion, tmp_path: Path) -> None:
    """Older versions of transformers read vocab.json and merges.txt alone."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(emojinette.MODEL / "tokenizer" / name, tmp_path / name)
    old = CLIPTokenizer.from_pretrained(tmp_path)
    for row in catalog_prompts(CATALOG, range(1), unseen=True).rows:
        assert old(row.prompt).input_ids == model.tokenizer(row.prompt).input_ids


def test_text_that_is_cut_or_empty_is_embedded_alike(model: Diffusion) -> None:
    embedded = model.encode_prompts(["", "a church", "a church " * 30])
    assert embedded.shape == (3, 24, model.unet.config.cross_attention_dim)


def test_latents_are_normalised(model: Diffusion) -> None:
    rows = catalog_prompts(CATALOG, range(1)).rows[::4]
    images = np.stack([image for _, image in sample_images(model, rows, Sampling(steps=8, guidance=5.0))])
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = model.encode_images(tensors, torch.Generator().manual_seed(0))
    assert latents.mean((0, 2, 3)).abs().max() < 0.5
    assert 0.6 < latents.std((0, 2, 3)).min() <= latents.std((0, 2, 3)).max() < 1.6


def test_draws_what_it_is_asked_for(model: Diffusion) -> None:
    rows = catalog_prompts(CATALOG, range(1), first_seed=77_000).rows[1::2]
    images = np.zeros((len(rows), 64, 64, 3), np.uint8)
    for place, image in sample_images(model, rows, Sampling(steps=15, guidance=5.0)):
        images[place] = image
    seen = classify(images, load_classifier(emojinette.CLASSIFIER))
    right = sum(shown == (row.object,) for shown, row in zip(seen.shown("object"), rows, strict=True))
    styled = sum(shown == (row.style,) for shown, row in zip(seen.shown("style"), rows, strict=True))
    # Of 40; the quality that the card states makes fewer than 36 a one in a thousand event.
    assert right >= 36
    assert styled >= 36


def test_reference_holds_every_pair_and_the_classifier_knows_it() -> None:
    with safe_open(emojinette.REFERENCE, "pt") as file:
        features, objects, styles = (file.get_tensor(name) for name in ("features", "object", "style"))
    pairs = torch.stack([objects, styles], 1)
    assert len(pairs.unique(dim=0)) == len(CATALOG.labels) * len(CATALOG.styles)
    with torch.no_grad():
        object_logits, style_logits = load_classifier(emojinette.CLASSIFIER).heads(features.float())
    assert (object_logits.argmax(1) == objects).float().mean() >= 0.995
    assert (style_logits.argmax(1) == styles).float().mean() >= 0.995


def test_card_says_what_was_measured() -> None:
    quality = json.loads((emojinette.HOME / "quality.json").read_text(encoding="utf-8"))
    training = json.loads((emojinette.HOME / "training.json").read_text(encoding="utf-8"))
    assert (emojinette.HOME / "README.md").read_text(encoding="utf-8") == card(quality, training)
