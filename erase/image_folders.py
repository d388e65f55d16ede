"""The folders of images that a recipe names: which images they hold, and whether they can be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.files import file_sha256
from erase_concept.methods import METHODS
from erase_concept.pipelines.pictures import SUFFIXES, pictures_in
from erase_concept.prompts.catalog import folder_names
from erase_concept.prompts.concept import Concept, plain_name
from erase_concept.recipe import Recipe


def image_folders(recipe: Recipe) -> list[Path]:
    """Return the folders of images that the recipe names."""
    named = [recipe.data.forget_images, recipe.data.retain_images, *(one.images for one in recipe.concept.parts)]
    return [Path(folder) for folder in named if folder]


def hashes_of_images(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 over the names and bytes of the images in each folder that the recipe names."""
    found = {}
    for folder in image_folders(recipe):
        digest = hashlib.sha256()
        for file in pictures_in(folder, deep=True):
            digest.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
        found[str(folder)] = digest.hexdigest()
    return found


def check_images(recipe: Recipe) -> None:
    """Raise RequestError when a folder of images that the recipe names is not there, not in order, or not needed."""
    data, parts = recipe.data, recipe.data_parts
    for part, folder in (("forget", data.forget_images), ("retain", data.retain_images)):
        if folder is not None and part not in parts:
            raise RequestError(f"data.{part}_images", folder, f"{recipe.method} does not learn from such images")
        if folder is not None:
            image_files(folder, recipe.concept, part=part)
    for one in recipe.concept.parts:
        if one.images and data.forget_images is None:
            if "forget" not in parts:
                able = ", ".join(name for name, method in METHODS.all().items() if "forget" in method.latents)
                problem = f"{recipe.method} does not learn from images of the concept; methods that do: {able}"
                raise RequestError("concept", one.images, problem)
            image_files(Path(one.images), one, part="forget", setting="concept")


def image_files(folder: Path, concept: Concept, *, part: str, setting: str = "") -> dict[Path, str]:
    """Return the images of a folder, in the order of their names, with the name of what each shows.

    Images lie in the folder itself where all of them show one thing: the concept, or the one name that it retains.
    Otherwise they lie in folders named after what they show (``dog/1.png``), or after a class of a known data set
    (``n03028079``), in the folder or in its ``train``. Of a data set the folders of other classes are passed over.
    Raises RequestError when there are no images, of some concept to forget none, or a folder has another name.
    """
    setting = setting or f"data.{part}_images"
    if not folder.is_dir():
        raise RequestError(setting, folder, "no such folder")
    erased = tuple(one.name for one in concept.parts)
    retained = tuple(dict.fromkeys(name for one in concept.parts for name in one.retain))
    names = erased if part == "forget" else retained
    if not names:
        raise RequestError(setting, folder, "cannot be used: the concept retains no name that an image could show")
    outside = pictures_in(folder)
    if outside and len(names) == 1:
        return dict.fromkeys(outside, names[0])
    if "train" not in names and (folder / "train").is_dir():
        folder = folder / "train"
    known = {plain_name(name): name for name in retained}
    known |= {plain_name(name): one.name for one in concept.parts for name in (one.name, *one.synonyms)}
    classes = folder_names()
    found: dict[Path, str] = {}
    strange = []
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        label = plain_name(classes.get(entry.name, entry.name))
        if known.get(label) in names:
            found |= dict.fromkeys(pictures_in(entry), known[label])
        elif label not in known and label not in map(plain_name, classes.values()):
            strange.append(entry.name)
    if strange or (outside and len(names) > 1):
        what = f"a folder {strange[0]!r}" if strange else "images outside of such folders"
        raise RequestError(setting, folder, f"has {what}; needed: a folder each for {', '.join(names)}")
    if found and part == "forget" and (missing := sorted({*names} - {*found.values()})):
        raise RequestError(setting, folder, f"has no image of {', '.join(missing)}, in a folder of that name")
    if not found:
        raise RequestError(setting, folder, f"holds no image of {', '.join(names)} ({', '.join(SUFFIXES)})")
    return found
