"""CLIP's tokenizer: read for a checkpoint in one file, and written so that every version of transformers loads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer

from erase_concept.errors import RequestError

TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")  # one of them makes a tokenizer
_CLIP = {"model_max_length": 77, "pad_token": "<|endoftext|>"}


def load_tokenizer(file: Path, name: str, pad_token: str | None) -> CLIPTokenizer:
    """Return CLIP's tokenizer for a checkpoint in one file.

    It comes from the folder ``name`` in the folder that bears the file's name, from the folder ``tokenizer`` beside the
    file, or from the hub. One that is not the model's own gets ``pad_token``, if given: OpenCLIP's tokenizer has the
    same words and pads with another one. Raises RequestError when there is no tokenizer.
    """
    own, shared = file.with_suffix("") / name, file.parent / "tokenizer"
    folder = next(
        (folder for folder in (own, shared) if any((folder / words).is_file() for words in TOKENIZER_FILES)), None
    )
    try:
        if folder is None:
            # By file: the library's own loader asks the hub for many more, and waits for each of them in vain.
            hf_hub_download(TOKENIZER, "merges.txt")
            folder = Path(hf_hub_download(TOKENIZER, "vocab.json")).parent
        options = {} if (folder / "tokenizer_config.json").is_file() else _CLIP
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError):
        how = "put its vocab.json and merges.txt into a folder 'tokenizer' beside the file"
        raise RequestError("model", file, f"needs the tokenizer {TOKENIZER}, which is not here: {how}") from None
    if pad_token is not None and folder != own:
        tokenizer.pad_token = pad_token
    return tokenizer


def copy_vocabulary(tokenizer: Any, name: str, folder: Path) -> None:
    """Copy vocab.json and merges.txt into the tokenizer's folder: transformers 5 writes tokenizer.json alone."""
    source = Path(str(getattr(tokenizer, "name_or_path", "")))
    for words in getattr(tokenizer, "vocab_files_names", {}).values():
        for file in (source / words, source / name / words):
            if file.is_file() and not (folder / words).exists():
                shutil.copyfile(file, folder / words)
