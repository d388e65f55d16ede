"""CLIP's tokenizer: read for a single file, made for labels, and written for every version of transformers."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer

from erase_concept.errors import RequestError
from erase_concept.files import read_json

TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")  # one of them makes a tokenizer
_PAD = "<|endoftext|>"
_CLIP = {"model_max_length": 77, "pad_token": _PAD}
_MERGES = 49152 - 256 - 2  # CLIP's vocabulary takes so many of the file's lines, and leaves out the others


def load_tokenizer(file: Path, name: str, pad_token: str | None) -> CLIPTokenizer:
    """Return CLIP's tokenizer for a checkpoint in one file.

    It comes from the folder ``name`` in the folder that bears the file's name, from the folder ``tokenizer`` beside the
    file, from the package open_clip_torch, or from the hub. One that is not the model's own gets ``pad_token``, if
    given: OpenCLIP's tokenizer has the same words and pads with another one. Raises RequestError when there is no
    tokenizer.
    """
    own, shared = file.with_suffix("") / name, file.parent / "tokenizer"
    folder = next(
        (folder for folder in (own, shared) if any((folder / words).is_file() for words in TOKENIZER_FILES)), None
    )
    pads = {"pad_token": pad_token} if pad_token is not None and folder != own else {}
    try:
        return clip_tokenizer(**pads) if folder is None else _read(folder, **pads)
    except (OSError, ValueError):
        how = 'pip install "erase-concept[tokenizer]", or put its vocab.json and merges.txt into a folder '
        how += "'tokenizer' beside the file"
        raise RequestError("model", file, f"needs the tokenizer {TOKENIZER}, which is not here: {how}") from None


def clip_tokenizer(pad_token: str = _PAD) -> CLIPTokenizer:
    """Return CLIP's tokenizer from the package open_clip_torch or, without the package, from the hub.

    It pads to 77 tokens. Stable Diffusion 1.x pads with the end token, OpenCLIP's models with "!", token 0. A "!" in a
    prompt is then token 0 too, as in the folders that diffusers loads. Raises OSError when it is in neither.
    """
    package = find_spec("open_clip")
    words = Path(*package.submodule_search_locations or ()) if package else Path()
    if (merges := words / "bpe_simple_vocab_16e6.txt.gz").is_file():
        with TemporaryDirectory() as folder:
            _write_vocabulary(*_vocabulary(merges), Path(folder))
            tokenizer = _read(Path(folder), pad_token=pad_token)
        tokenizer.name_or_path = TOKENIZER  # the folder is gone
        return tokenizer
    # By file: the library's own loader asks the hub for many more, and waits for each of them in vain.
    hf_hub_download(TOKENIZER, "merges.txt")
    return _read(Path(hf_hub_download(TOKENIZER, "vocab.json")).parent, pad_token=pad_token)


def label_tokenizer(labels: Sequence[str], folder: Path) -> CLIPTokenizer:
    """Return a tokenizer in CLIP's layout whose first tokens are labels, in their order; its files go into a folder.

    Any other word has several tokens, those of its bytes. Raises ValueError for a label that is not one word of small
    letters, and for one that does not become one token: of two labels, one that begins inside the other comes behind.
    """
    for label in labels:
        if not (label.isascii() and label.isalpha() and label.islower()):
            raise ValueError(f"the label {label!r} is not one word of small letters")
    merges = dict.fromkeys(
        f"{label[:end]} {label[end]}{'</w>' if end + 1 == len(label) else ''}"
        for label in labels
        for end in range(1, len(label))
    )
    letters = _byte_characters()
    pieces = (*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges))
    tokens = dict.fromkeys((*(f"{label}</w>" for label in labels), *pieces, "<|startoftext|>", _PAD))
    folder.mkdir(parents=True, exist_ok=True)
    _write_vocabulary({token: number for number, token in enumerate(tokens)}, [*merges], folder)
    tokenizer = _read(folder, model_max_length=4, pad_token=_PAD)
    found = [tokenizer(label).input_ids for label in labels]
    for number, (label, ids) in enumerate(zip(labels, found, strict=True)):
        if ids[1:-1] != [number]:
            raise ValueError(f"the label {label!r} has the tokens {ids[1:-1]}, not the one token {number}")
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a tokenizer.json that is no byte-pair encoding, or has a compiled table of characters.

    CLIP's is one and has none. The library's reader of such a table panics, which no caller can turn into an error.
    """
    if not (folder / "tokenizer.json").exists():
        return
    content = read_json(folder / "tokenizer.json")
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("tokenizer.json is no byte-pair encoding, as CLIP's is")
    level: list[Any] = [value for key, value in content.items() if key != "model"]
    while level:
        if any("precompiled_charsmap" in one for one in level if isinstance(one, dict)):
            raise ValueError("tokenizer.json has a precompiled_charsmap, which CLIP's has not")
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [one for each in inner for one in (each.values() if isinstance(each, dict) else each)]


def limit_tokenizers(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return the components, with tokenizers that give no more tokens than their text encoders have positions.

    Some published tokenizers claim 8,192 or more, or do not say how many.
    """
    found = dict(components)
    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if name.startswith("tokenizer") and positions is not None and tokenizer.model_max_length > positions:
            found[name] = copy.deepcopy(tokenizer)
            found[name].model_max_length = positions
    return found


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json and merges.txt into a saved tokenizer's folder: transformers 5 writes tokenizer.json alone."""
    if (folder / "vocab.json").is_file() or not (folder / "tokenizer.json").is_file():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    # Each merge is a pair, or in older files both parts with a space between them.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write_vocabulary(tokenizer.get_vocab(), merges, folder)


def _read(folder: Path, **options: Any) -> CLIPTokenizer:
    # As an argument: a padding token that is set later is a word among others until the tokenizer is saved and loaded.
    check_tokenizer(folder)
    defaults = {} if (folder / "tokenizer_config.json").is_file() else _CLIP
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **{**defaults, **options})


def _vocabulary(file: Path) -> tuple[dict[str, int], list[str]]:
    """Return CLIP's tokens with their numbers, and its merges, from the file of merges that CLIP was published with.

    The tokens are the 256 bytes, the same at the end of a word, what each merge makes, and the start and the end token
    (openai/CLIP, simple_tokenizer.py).
    """
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    characters = _byte_characters()
    words = [*characters, *(f"{one}</w>" for one in characters), *(merge.replace(" ", "") for merge in merges)]
    tokens = [*words, "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_characters() -> list[str]:
    """Return how CLIP writes the 256 bytes: those that are no visible character as the characters from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in (*visible, *range(256, 512 - len(visible)))]


def _write_vocabulary(vocabulary: dict[str, int], merges: list[str], folder: Path) -> None:
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
