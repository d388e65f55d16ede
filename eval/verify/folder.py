"""Checks that a model's folder holds the model that was compared, and nothing that a program would load instead of it.

diffusers takes the shards of an index before the one file beside it, and another variant where it is asked for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erase_concept.eval.verify.check import Check, failed
from erase_concept.files import read_json, relative
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.folder import INDEX

# Of files that programs load or run; a licence or a picture beside the model does no harm.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".gguf", ".npz")
_LOADED = (*_WEIGHTS, ".json", ".py", ".yaml", ".yml", ".txt")
_WORDS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER = (*_WORDS, "added_tokens.json")
_CONFIGS = ("config.json", "scheduler_config.json")
_MAY_DIFFER = ("_diffusers_version", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "max_length")
_OF_USE = ("truncation", "padding")  # of tokenizer.json: how it was last asked to cut and fill up
# A tokenizer's defaults, which it writes down once it has been used.
_DEFAULTS = {"pad_to_multiple_of": None, "pad_token_type_id": 0, "padding_side": "right", "stride": 0}
_DEFAULTS |= {"truncation_side": "right", "truncation_strategy": "longest_first"}
_STEMS = ("diffusion_pytorch_model", "model")  # as the libraries call the weights that they write


def check_contents(folder: Path, family: Family, home: Path) -> list[Check]:
    """Return a check that fails for the first file of a model's folder that is no part of the model.

    ``home`` is the certificate's folder.
    """
    what = f"files in {relative(folder, home)}/"
    for fault, file in faults(folder, family):
        return [failed(what, relative(file, home), fault)]
    return [Check(what, True, "are the model's own, and nothing else that could be loaded")]


def first_other(folder: Path, run: Path, family: Family) -> str:
    """Return the first configuration or file of a tokenizer that says something else in two folders; "" for none.

    Versions of the libraries, dtypes and what a tokenizer was last used with may differ.
    """
    names = (INDEX, *(f"{part}/{name}" for part in family.components for name in (*_CONFIGS, *_TOKENIZER)))
    return next((name for name in names if _content(folder / name) != _content(run / name)), "")


def _content(file: Path) -> Any:
    """Return what a file says, None where there is none."""
    if not file.is_file():
        return None
    if file.suffix != ".json":
        return file.read_bytes()
    said = {key: value for key, value in read_json(file).items() if key not in (*_MAY_DIFFER, *_OF_USE)}
    return (_DEFAULTS if file.name == "tokenizer_config.json" else {}) | said


def faults(folder: Path, family: Family) -> Iterator[tuple[str, Path]]:
    """Yield what is wrong in a folder, and where."""
    for part, line in read_json(folder / INDEX).items():
        if isinstance(line, list) and any(line) and part not in family.components:
            yield f"names a component that was not checked: {part}", folder / INDEX
    own = {folder / INDEX, *(file for part in family.components for file in _own(folder / part))}
    for file in loaded_files(folder):
        if file.is_dir():
            yield "is a link to another folder, whose files cannot be certified", file
        elif file not in own:
            yield "is no part of the model that was checked: remove it", file


def loaded_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a model's folder that a program could load or run, and links to other folders."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {".cache"})
        here = Path(place)
        yield from (here / name for name in folders if (here / name).is_symlink())
        for file in (here / name for name in sorted(files)):
            if file.suffix.lower() in _LOADED and (here != folder or file.suffix.lower() != ".txt"):
                yield file


def _own(folder: Path) -> Iterator[Path]:
    """Yield the files that a component may have: its configuration, and its weights in one file or in shards."""
    yield from (folder / name for name in (*_TOKENIZER, *_CONFIGS))
    for stem in _STEMS:
        whole, index = (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
        if whole.is_file():
            yield whole
        elif index.is_file():
            yield index
            shards = read_json(index).get("weight_map")
            names = set(shards.values()) if isinstance(shards, dict) else set()
            yield from (folder / name for name in names if isinstance(name, str) and name.startswith(f"{stem}-"))
