"""CLIP's tokenizer from a package: the numbers of OpenAI's own, each family's padding, and what is saved of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.formats.tokenizer import clip_tokenizer, write_vocabulary
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion

open_clip = pytest.importorskip("open_clip.tokenizer")

TEXTS = (
    "a photo of a cat",
    "An Image Of A GARBAGE TRUCK, 8k, trending on artstation",
    "don't you're it's we'll I'd they've I'm",
    "(masterpiece:1.2), [bad hands], {best quality} \\ / | ~ ^ # $ % + = < > @ & * _ -",
    "wow!!! what?! ... --- ,,, ;; :)",
    "naïve façade, Ünïcôdé, Ωmega, straße, İstanbul",
    "日本語のテスト 中文 한국어 العربية हिन्दी ไทย русский",
    "😀🔥🪦 emoji 👩‍🚀 and ⚡️",
    "1234567 3.14 10,000 4k x2 2nd",
    "  many   spaces\tand\nlines  ",
    "supercalifragilisticexpialidocious " * 30,
    "a" * 400,
    "",
)


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def reference() -> object:
    return open_clip.SimpleTokenizer()


def inner(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The numbers between the start and the end token, however long."""
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (49406, 49407)
    return ids[1:-1]


def test_the_vocabulary_is_the_published_one(clip: CLIPTokenizer, reference: object) -> None:
    ours, theirs = clip.get_vocab(), dict(reference.encoder)
    for own, other in (("<|startoftext|>", "<start_of_text>"), ("<|endoftext|>", "<end_of_text>")):
        assert ours.pop(own) == theirs.pop(other)
    assert ours == theirs
    assert len(clip) == 49408


@pytest.mark.parametrize("text", TEXTS)
def test_texts_get_the_numbers_of_clips_own_tokenizer(clip: CLIPTokenizer, reference: object, text: str) -> None:
    assert inner(clip, text) == reference.encode(text)


def test_so_do_random_texts(clip: CLIPTokenizer, reference: object) -> None:
    # CLIP's own mends broken encodings and HTML first, which transformers leaves to its user: no such text is compared.
    draw = random.Random(0)
    ranges = range(32, 127), range(0xC0, 0x17F), range(0x391, 0x3C9), range(0x4E00, 0x4E40)
    letters = [chr(code) for some in ranges for code in some]
    letters.remove("Σ")  # transformers 5 has one small letter for it, Python another at a word's end
    compared = 0
    for _ in range(500):
        text = "".join(draw.choices(letters + [" "] * 60, k=draw.randrange(1, 120)))
        if open_clip.basic_clean(text) == text.strip():
            assert inner(clip, text) == reference.encode(text)
            compared += 1
    assert compared > 300


@pytest.mark.parametrize(
    ("family", "pads"), [("sd1", [49407]), ("sd2", [0]), ("sdxl", [49407, 0])], ids=["sd1", "sd2", "sdxl"]
)
def test_a_single_file_loads_offline_and_pads_as_its_family_does(
    clip: CLIPTokenizer, new_model: Callable[..., Diffusion], family: str, pads: list[int], tmp_path: Path
) -> None:
    model = new_model(clip, family)
    save_original(model, tmp_path / "model.safetensors", torch.float32, {})
    save_pipeline(model, tmp_path / "model")
    for folder in (tmp_path / "model").glob("tokenizer*"):
        shutil.rmtree(folder)
    loaded = load(tmp_path / "model.safetensors")
    assert list(loaded.tokenizers) == ["tokenizer", "tokenizer_2"][: len(pads)]
    prompts = ["a church", "", "naïve façade 日本語 " * 40]
    expected = [open_clip.tokenize(prompts) for _ in pads]  # it pads with 0
    for ids, pad, found in zip(expected, pads, loaded.token_ids(prompts), strict=True):
        for row in ids:
            end = int((row == 49407).nonzero()[0])
            row[end + 1 :] = pad
        assert torch.equal(found.cpu(), ids)
    # Saved as a folder and loaded, it says the same, also of the "!" with which OpenCLIP's models pad.
    prompts += ["wow!!! a cat! !", "“curly quotes”"]
    save_pipeline(loaded, tmp_path / "saved")
    back = load(tmp_path / "saved")
    for ours, theirs in zip(back.token_ids(prompts), loaded.token_ids(prompts), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(back.encode_prompts(prompts), loaded.encode_prompts(prompts))


def test_older_versions_find_their_files(clip: CLIPTokenizer, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    write_vocabulary(clip, tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in ("vocab.json", "merges.txt"):
            file.unlink()
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == clip.get_vocab()
    for text in TEXTS:
        assert inner(again, text) == inner(clip, text)
