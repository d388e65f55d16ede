"""The metadata that model managers read: ModelSpec's keys and kohya's, with a hash of the tensors that is true.

ModelSpec is Stability AI's standard (https://github.com/Stability-AI/ModelSpec), kohya's keys are those of sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from erase_concept.files import stream_sha256
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.prediction import Prediction, prediction_metadata

_UNKNOWN = "0" * 64  # stands for a hash until the tensors are written
# What an erased model shares with its base: everything else of ModelSpec names the base itself.
_OF_ANY = {f"modelspec.{key}" for key in ("license", "usage_hint", "trigger_phrase", "timestep_range", "encoder_layer")}


def model_name(source: str) -> str:
    """Return a model's name without the folders of this machine: a hub id, or a file's or folder's own name."""
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source, re.ASCII) and not Path(source).exists()
    if hub and not source.endswith((".safetensors", ".ckpt")):
        return source
    name = re.split(r"[\\/]", source.rstrip("\\/"))[-1]
    return re.sub(r"\.(safetensors|ckpt)$", "", name, flags=re.IGNORECASE)


def modelspec(
    family: Family, prediction: Prediction, size: int, *, title: str, description: str, base: str, lora: bool = False
) -> dict[str, str]:
    """Return ModelSpec's keys of an erased model, or of a LoRA that erases; ``size`` is the images' side in pixels.

    ``hash_sha256`` is all zeros until ``write_content_hash`` puts in the true one.
    """
    names = family.single_file.architectures if family.single_file else {}
    architecture = names.get(prediction.type or "", names.get("", family.name))
    now = datetime.now(timezone.utc).replace(microsecond=0, tzinfo=None)
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora" if lora else architecture,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "description": description,
        "date": f"{now.isoformat()}Z",
        "resolution": f"{size}x{size}",
        "merged_from": base,
        "hash_sha256": f"0x{_UNKNOWN}",
    }
    return {f"modelspec.{key}": value for key, value in values.items()} | prediction_metadata(prediction)


def kohya_base(family: Family, prediction: Prediction) -> dict[str, str]:
    """Return kohya's keys of a LoRA for its base model; ``sd_v2_v`` is one with v-prediction."""
    base = dict(family.single_file.lora_metadata) if family.single_file else {}
    version = base.get("ss_base_model_version", "")
    if prediction.type == "v_prediction" and version.startswith("sd_v"):
        base["ss_base_model_version"] = f"{version}_v"
    return base | {"ss_zero_terminal_snr": str(prediction.zero_snr)}


def kohya_network(rank: int) -> dict[str, str]:
    """Return kohya's keys of a LoRA for its network, and for a hash of its tensors."""
    network = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return network | {"sshs_model_hash": _UNKNOWN}


def of_any_model(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a base model's metadata that is true of the erased one: no title, author, picture or hash."""
    return {
        key: value
        for key, value in metadata.items()
        if key in _OF_ANY or not (key.startswith(("modelspec.", "sshs_")) or "hash" in key or "thumbnail" in key)
    }


def content_hash(file: Path) -> str:
    """Return the SHA-256 of all tensors' bytes, as they lie in a safetensors file."""
    with file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little"), 1)
        return stream_sha256(stream)


def write_content_hash(file: Path) -> None:
    """Put the SHA-256 of all tensors' bytes, as they lie in the file, in the place of the zeros in its metadata.

    Both ModelSpec's ``hash_sha256`` and kohya's ``sshs_model_hash`` are this hash.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size)
        if _UNKNOWN.encode() in header:
            found = stream_sha256(stream).encode()
            stream.seek(8)
            stream.write(header.replace(_UNKNOWN.encode(), found))
