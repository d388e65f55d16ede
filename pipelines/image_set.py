"""Images on disk with the prompts that they were made from, and the manifest of a folder of them.

``manifest.jsonl`` has a line for each image: its file name, SHA-256, prompt, seed and labels. ``sampling.json`` holds
the settings of the sampling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write, file_sha256, parse_json, read_json, read_text
from erase_concept.pipelines.pictures import read_picture
from erase_concept.prompts.promptset import PromptRow, row_of

MANIFEST = "manifest.jsonl"
SETTINGS = "sampling.json"
_MOST_LINES = 1_000_000  # of a manifest
_LONGEST_NAME = 256  # more than any file's name has


@dataclass(frozen=True)
class ImageSet:
    """Images on disk and the rows they were made from; ``settings`` of the sampling; ``notes`` on what is unusual."""

    files: tuple[Path, ...]
    rows: tuple[PromptRow, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def arrays(self) -> np.ndarray:
        """Return the images as uint8 [n, h, w, 3]; raises RequestError when they differ in size."""
        found = [np.asarray(read_picture(file)) for file in self.files]
        if len(sizes := sorted({f"{image.shape[1]} x {image.shape[0]}" for image in found})) > 1:
            raise RequestError("images", self.files[0].parent, f"have several sizes: {shortened(sizes)}")
        return np.stack(found)


def read_images(folder: str | Path, *, setting: str = "images") -> ImageSet:
    """Read what ``sample`` wrote.

    Raises RequestError naming ``setting`` when there is no image, or one is missing or differs from the manifest.
    """
    folder = Path(folder)
    try:
        lines = sorted(read_manifest(folder, setting=setting), key=lambda line: natural_order(line["image"]))
        if not lines:
            raise RequestError(setting, folder, "holds no manifest.jsonl with images in it")
        for line in lines:
            if not is_intact(folder, line):
                raise RequestError(setting, folder, f"{line['image']} is missing or differs from the manifest")
        rows = tuple(row_of({k: v for k, v in line.items() if k not in ("image", "sha256")}) for line in lines)
        settings = read_json(folder / SETTINGS)
        if not isinstance(settings, dict):
            raise ValueError(f"{SETTINGS} holds no settings")
    except RequestError:
        raise
    except (OSError, ValueError) as problem:
        raise RequestError(setting, folder, f"not as 'sample' writes it: {problem}") from None
    return ImageSet(tuple(folder / line["image"] for line in lines), rows, settings)


def image_name(place: int) -> str:
    """Return the file name of the image of a prompt, by the prompt's place in its set."""
    return f"{place:05d}.png"


def manifest_name(process: int, processes: int) -> str:
    """Return the name of the manifest that a process writes to; of several processes each has its own."""
    return MANIFEST if processes == 1 else f"manifest-{process}.jsonl"


def manifest_line(file: Path, row: PromptRow) -> str:
    """Return an image's line of the manifest."""
    labels = {key: value for key, value in asdict(row).items() if key == "prompt" or value not in ("", None)}
    return json.dumps({"image": file.name, "sha256": file_sha256(file), **labels}, ensure_ascii=False) + "\n"


def manifests(folder: Path) -> list[Path]:
    """Return the manifest, and those of processes that were killed before they were merged."""
    return [file for file in sorted(folder.glob("manifest*.jsonl")) if re.fullmatch(r"manifest(-\d+)?", file.stem)]


def read_manifest(folder: Path, *, setting: str = "images") -> list[dict[str, Any]]:
    """Return the lines of all manifests of a folder; a line that a kill cut short does not count.

    Nor does one whose image lies elsewhere. Raises RequestError naming ``setting`` for a manifest that is no text or
    too long.
    """
    lines = {}
    for file in manifests(folder):
        try:
            texts = read_text(file).split("\n")
            if len(texts) > _MOST_LINES:
                raise ValueError(f"has more than {_MOST_LINES:,} lines")
        except ValueError as problem:
            raise RequestError(setting, file, str(problem)) from None
        for text in texts:
            try:
                line = parse_json(text)
            except ValueError:
                continue
            name = line.get("image") if isinstance(line, dict) else None
            if isinstance(name, str) and len(name) < _LONGEST_NAME and Path(name).name == name:
                lines[name] = line
    return list(lines.values())


def merge_manifests(folder: Path, rows: Sequence[PromptRow]) -> None:
    """Write one manifest from those of all processes, of the images that are there and intact, in their order."""
    places = {image_name(place): place for place in range(len(rows))}
    parts = manifests(folder)
    intact = sorted(
        places[line["image"]]
        for line in read_manifest(folder, setting="out")
        if line["image"] in places and is_intact(folder, line)
    )
    with atomic_write(folder / MANIFEST) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(manifest_line(folder / image_name(place), rows[place]) for place in intact)
    for part in parts:
        if part.name != MANIFEST:
            part.unlink()


def is_intact(folder: Path, line: dict[str, Any]) -> bool:
    """Tell whether the image of a manifest's line is there, with the SHA-256 that the line has."""
    file = folder / line["image"]
    return file.is_file() and file_sha256(file) == line.get("sha256")


def check_drawn(files: Sequence[Path]) -> None:
    """Raise EraseError when every image is of one colour: a model that draws nothing must not pass for erased."""
    for file in files:
        image = np.asarray(read_picture(file))
        if (image != image[:1, :1]).any():
            return
    if files:
        raise EraseError(f"{files[0].parent}: every image is of one colour: the model is broken, nothing can be judged")


def natural_order(name: str) -> tuple[list[tuple[str, int]], str]:
    """Return a key that sorts names as people do: img2 before img10."""
    return [(text.lower(), int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)], name


def shortened(items: Sequence[object]) -> str:
    """List the first five of many."""
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")
