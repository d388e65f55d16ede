"""Read pictures of any kind as a viewer shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from erase_concept.errors import RequestError
from erase_concept.files import mistaken_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ON_ITS_SIDE = (5, 6, 7, 8)  # the orientations of EXIF that swap width and height


def read_picture(file: Path, *, setting: str = "images") -> Image.Image:
    """Return a picture in RGB, 8 bits a channel.

    It is turned as its EXIF tag says, and what is transparent shows white. 16-bit greys are scaled to 8 bits. Of an
    animation or a file of several pages it is the first picture. Raises RequestError for a file that holds none that
    can be read, and for greys whose range is not known.
    """
    with _opened(file, setting) as image:
        return _rgb(ImageOps.exif_transpose(image))


def picture_size(file: Path, *, setting: str = "images") -> tuple[int, int]:
    """Return width and height of a picture as ``read_picture`` returns it, from the head of its file alone."""
    with _opened(file, setting) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE else (width, height)


def is_transparent(file: Path) -> bool:
    """Tell whether a picture's file has an alpha channel or a transparent colour; False where it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.has_transparency_data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def pictures_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the pictures of a folder, or with ``deep`` of all folders in it too, without hidden files."""
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.is_file())


def hidden_pictures(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the files of a folder that ``pictures_in`` leaves out, such as the ``._1.png`` that macOS leaves."""
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] == "." and file.is_file())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its greys are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its greys have 32 bits; 8 or 16 are allowed")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return image.convert("RGB")


@contextmanager
def _opened(file: Path, setting: str) -> Iterator[Image.Image]:
    """Open a picture file; raises RequestError where it holds none that can be read."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        what = mistaken_for(file) or f"no readable image: {problem}"
        raise RequestError(setting, file, what) from None
