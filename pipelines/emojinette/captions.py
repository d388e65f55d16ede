"""The built-in model's training prompts, and the tokenizer of their words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from erase_concept.pipelines.emojinette import CATALOG

TOKENS = 24
SEED = 2024

# Words that say nothing about what is to be seen. In training they stand before nouns at random, and so do invented
# words, so that the model learns to pass over words it does not know.
# fmt: off
_FILLERS = (
    "small", "big", "large", "little", "nice", "lovely", "pretty", "beautiful", "simple", "plain", "clean", "fine",
    "good", "great", "fresh", "new", "old", "modern", "classic", "typical", "single", "lonely", "famous", "happy",
    "funny", "cute", "sweet", "bright", "clear", "crisp", "detailed", "centered", "isolated", "standard", "common",
    "usual", "special", "rare", "strange", "perfect", "favourite", "random", "certain", "real", "tiny", "huge",
    "wide", "tall", "short",
)
# fmt: on


def prompt_for(label: str, style: str, rng: np.random.Generator) -> str:
    """Draw a training prompt for an image: 10 % empty, 5 % style only, 35 % the object, 50 % object and style."""
    erase, evaluate = CATALOG.sentences.erase, CATALOG.sentences.evaluate
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.15:
        return str(rng.choice(erase.style + evaluate.style)).replace("{s}", style)
    names = CATALOG.names_of(label)
    noun = names.label if rng.random() < 0.6 else names.synonym
    if rng.random() < 0.3:
        noun = f"{_filler(rng)} {noun}"
    if rng.random() < 0.05:
        noun = f"{_filler(rng)} {noun}"
    plain, styled = erase.object + evaluate.object, erase.styled + evaluate.styled
    template = str(rng.choice(plain if kind < 0.5 else styled))
    # The article by the rule that the published weights were trained with, invented words and all.
    article = "an" if noun[0] in "aeio" or noun.startswith("um") else "a"
    return template.replace("{o}", f"{article} {noun}").replace("{O}", noun).replace("{s}", style)


def _filler(rng: np.random.Generator) -> str:
    if rng.random() < 0.6:
        return str(rng.choice(_FILLERS))
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 9))))


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train CLIP's kind of byte-level BPE on the training sentences and save it with vocab.json and merges.txt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))  # noqa: S106 - no password
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    rng = np.random.default_rng(SEED)
    sentences = [prompt_for(str(rng.choice(CATALOG.labels)), str(rng.choice(CATALOG.styles)), rng) for _ in range(4000)]
    bpe.train_from_iterator(sentences, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shared = {"model_max_length": TOKENS, "pad_token": "<|endoftext|>"}
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **shared)
    tokenizer.save_pretrained(folder)
    return tokenizer
