"""Read pictures of any kind as a viewer shows them.

Their files may come from strangers: only these kinds are opened, whatever a file's name says, and only up to a size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from erase_concept.errors import RequestError, first_line
from erase_concept.files import mistaken_for, regular_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow would start Ghostscript for others
MOST_PIXELS = 1 << 26  # 8,192 x 8,192; reading a transparent picture takes 16 bytes for each
_ON_ITS_SIDE = (5, 6, 7, 8)  # the orientations of EXIF that swap width and height


def read_picture(file: Path, *, setting: str = "images") -> Image.Image:
    """Return a picture in RGB, 8 bits a channel.

    It is turned as its EXIF tag says, and what is transparent shows white. 16-bit greys are scaled to 8 bits. Of an
    animation or a file of several pages it is the first picture. Raises RequestError for a file that holds none that
    can be read, and for greys whose range is not known.
    """
    with opened(file, setting) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def picture_size(file: Path, *, setting: str = "images") -> tuple[int, int]:
    """Return width and height of a picture as ``read_picture`` returns it, from the head of its file alone."""
    with opened(file, setting) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE else (width, height)


def is_transparent(file: Path) -> bool:
    """Tell whether a picture's file has an alpha channel or a transparent colour; False where it cannot be read."""
    try:
        with opened(file, "images") as image:
            return image.has_transparency_data
    except RequestError:
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
def opened(file: Path, setting: str) -> Iterator[Image.Image]:
    """Open a picture file; raises RequestError where it holds none that can be read."""
    try:
        regular_size(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of what is odd in their metadata
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read")
                yield image
    except Exception as problem:  # a decoder may raise anything for a file that is no image
        what = mistaken_for(file) or f"no readable image: {first_line(problem)}"
        raise RequestError(setting, file, what) from None
