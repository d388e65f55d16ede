"""CLIP scores against transformers' own logits, on a tiny CLIP with random weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from erase_concept.errors import RequestError
from erase_concept.eval.metrics.clip_score import MODEL, Clip, clip_score, clip_values, load_clip
from erase_concept.pipelines.model import weights_hash

# One that occurs twice, one longer than the model's 16 tokens, some that are not of letters.
PROMPTS = (
    "a dog",
    "a cat",
    "a dog",
    "",
    "a very long prompt about a church",
    "<b>emoji \N{DOG FACE}</b>",
    "x" * 100_000,
)


@pytest.fixture(scope="module")
def folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP of some 10,000 weights, as the hub would give it."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8))
        for weight in model.parameters():  # large enough for cosines that differ
            torch.nn.init.normal_(weight)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An image for each prompt, of different sizes, one of them grey."""
    home = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    found = []
    for place in range(len(PROMPTS)):
        shape = (24 + 8 * place, 40) if place == 1 else (24 + 8 * place, 40, 3)
        found.append(home / f"{place}.png")
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(found[-1])
    return found


def test_values_are_the_models_own_logits(
    clip: Clip, folder: Path, files: list[Path], tokenizer: CLIPTokenizer
) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessor.from_pretrained(folder)
    expected = []
    for file, prompt in zip(files, PROMPTS, strict=True):
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        tokens = tokenizer([prompt], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image
        expected.append(100 * (logits / model.logit_scale.exp()).item())
    assert min(expected) < 0 < max(expected)
    values = clip_values(files, PROMPTS, clip)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)


def test_values_do_not_depend_on_the_batch_size(clip: Clip, files: list[Path]) -> None:
    whole = clip_values(files, PROMPTS, clip, batch_size=32)
    for batch_size in (1, 3):
        np.testing.assert_allclose(
            clip_values(files, PROMPTS, clip, batch_size=batch_size), whole, rtol=1e-4, atol=1e-4
        )


def test_the_score_is_their_mean_and_says_what_was_cut(clip: Clip, folder: Path) -> None:
    values = np.array([20.0, 30, 25, 0, 31, 29, 26], np.float32)
    score = clip_score(values, PROMPTS, clip, target="church")
    assert (score.metric, score.target, score.n, score.unit) == ("clip_score", "church", 7, "100 cos")
    assert score.value == pytest.approx(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / 7**0.5
    assert score.ci95 == pytest.approx((score.value - half, score.value + half), abs=0.4 * half)
    # A letter is a token here, between a first and a last one, so two prompts are too long; so is one of many signs.
    assert "3 prompts cut after 16 tokens" in score.protocol
    assert f"{folder} (weights {weights_hash(CLIPModel.from_pretrained(folder))[:12]})" in score.protocol
    assert "cut" not in clip_score(values[:4], PROMPTS[:4], clip, target="church").protocol


def test_without_the_hub_it_says_so_at_once() -> None:
    began = time.perf_counter()
    with pytest.raises(RequestError, match=f"metric.clip {MODEL}: no folder and not in the hub's cache") as told:
        load_clip()
    assert time.perf_counter() - began < 10
    assert "\n" not in str(told.value)


def test_a_model_that_lacks_something_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no CLIP model"):
        load_clip(str(tmp_path))
    part = tmp_path / "part"
    part.mkdir()
    for file in folder.iterdir():
        (part / file.name).write_bytes(file.read_bytes())
    weights = load_file(part / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"no whole CLIP model: 1 weights missing, text_projection\.weight"):
        load_clip(str(part))
    weights["text_projection.weight"] = torch.zeros(8, 17)
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"1 weights missing, .*text_projection\.weight"):
        load_clip(str(part))
    (part / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RequestError, match="holds no CLIP model") as told:
        load_clip(str(part))
    assert "\n" not in str(told.value)
    for file in part.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges")):
            file.unlink()
    (part / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(RequestError, match="its tokenizer knows 2 tokens, its model asks for 190"):
        load_clip(str(part))
    (part / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="holds no CLIP model: Can't load image processor"):
        load_clip(str(part))


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(RequestError, match="could not be downloaded: ") as told:
        load_clip()
    assert time.perf_counter() - began < 10
    assert "\n" not in str(told.value)


def test_bad_input_is_refused(clip: Clip, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="7 images, but 6 prompts"):
        clip_values(files, PROMPTS[:6], clip)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"bad\.png: no readable image"):
        clip_values([tmp_path / "bad.png"], ["a dog"], clip)
    with pytest.raises(RequestError, match="no images"):
        clip_score(clip_values([], [], clip), [], clip, target="church")
