"""Pictures as a viewer shows them, whatever their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from erase_concept.errors import RequestError
from erase_concept.pipelines.pictures import picture_size, pictures_in, read_picture


def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path: Path) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255  # the left half is white
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise: the left side comes to the top
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(read_picture(tmp_path / "a.png"))
    assert shown.shape == (16, 8, 3)
    assert shown[:8].min() == 255
    assert shown[8:].max() == 0
    assert picture_size(tmp_path / "a.png") == (8, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(tmp_path: Path, mode: str) -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))  # red that nobody sees
    image = hidden.convert(mode) if mode != "P" else hidden.quantize(4)
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getcolors() == [(16, (255, 255, 255))]


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getcolors() == [(4, (127, 127, 127))]


def test_16_bit_greys_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png"])
def test_of_several_frames_the_first(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / f"a.{kind}").getcolors() == [(16, (255, 255, 255))]
    assert pictures_in(tmp_path) == [tmp_path / f"a.{kind}"]


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    floats = Image.fromarray(np.zeros((2, 2), np.float32))
    floats.save(tmp_path / "floats.tiff")
    contents = {
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        "page.png": (b"<!DOCTYPE html><html></html>", "an HTML page"),
        "torn.png": (b"\x89PNG\r\n", "no readable image"),
        "floats.tiff": (None, "range is not known"),
    }
    for name, (content, said) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=said):
            read_picture(tmp_path / name)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".b.png", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.png").mkdir()
    assert pictures_in(tmp_path) == [tmp_path / "a.png"]
