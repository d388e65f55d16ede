"""Reading image files as the detectors do, with OpenCV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from erase_concept.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T")
LARGEST = 16_384  # the side of the largest image in pixels; NudeNet makes a square of it


def image_bytes(file: Path) -> bytes:
    """Return a file's bytes; raises RequestError that names the file."""
    try:
        return file.read_bytes()
    except OSError as problem:
        raise RequestError("image", file, problem.strerror or "cannot be read") from None


def read_bgr(file: Path) -> NDArray[np.uint8]:
    """Read any image as OpenCV's uint8 BGR [h, w, 3]; raises RequestError that names the file.

    Upright by its EXIF tag and scaled from 16 bits to 8, as NudeNet reads it. What is transparent shows white, where
    NudeNet would judge the colour that nobody sees. What OpenCV cannot read, Pillow may.
    """
    import cv2

    from erase_concept.pipelines.pictures import is_transparent, picture_size, read_picture

    content = image_bytes(file)
    if not content:
        raise RequestError("image", file, "is empty")
    picture_size(file, setting="image")  # refuses what is too large to be read
    try:
        image: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if _is_whole(content) else None
    except cv2.error:  # such as more pixels than OpenCV reads
        image = None
    if image is None or is_transparent(file):
        image = np.ascontiguousarray(np.asarray(read_picture(file, setting="image"))[:, :, ::-1])
    height, width = image.shape[:2]
    if max(height, width) > LARGEST:
        raise RequestError("image", file, f"has {width} x {height} pixels; at most {LARGEST} on a side are judged")
    return image


def _is_whole(content: bytes) -> bool:
    """Tell of a PNG whether its parts end within the file: OpenCV makes room for whatever length a part names."""
    place = 8  # after the signature
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return True
    while place + 12 <= len(content) and content[place + 4 : place + 8] != b"IEND":
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return place + 12 <= len(content)


def of_readable(files: Sequence[Path], judge: Callable[[Sequence[Path]], Iterable[_T]]) -> list[_T | None]:
    """Return what a detector says of each image, and None of one that cannot be read."""
    try:
        return list(judge(files))
    except RequestError:
        readable = [file for file in files if _is_readable(file)]
        if len(readable) == len(files):  # then it was something else
            raise
        said = dict(zip(readable, judge(readable), strict=True))
        return [said.get(file) for file in files]


def _is_readable(file: Path) -> bool:
    try:
        read_bgr(file)
    except RequestError:
        return False
    return True
