"""Images that other programs made, and our own, matched with the prompts of a set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.pipelines.image_set import read_images
from erase_concept.pipelines.match_images import match_images
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import Sampling, iter_sample
from erase_concept.prompts.promptset import PromptRow, PromptSet


def test_images_come_in_the_order_of_their_places(tmp_path: Path) -> None:
    picture(tmp_path / "100000.png", 1)
    picture(tmp_path / "99999.png", 2)
    lines = [
        {"image": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "prompt": file.name, "seed": 0}
        for file in tmp_path.iterdir()
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "sampling.json").write_text("{}")
    assert [row.prompt for row in read_images(tmp_path).rows] == ["99999.png", "100000.png"]


def picture(file: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    """Write an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


CASES = (3, 7, 12, 20, 101)
ASKED = PromptSet("asked", tuple(PromptRow(f"prompt {n}", n, category="c", case_number=n) for n in CASES))


def matched(folder: Path, names: list[str], prompts: PromptSet = ASKED) -> list[tuple[str, int]]:
    """Write images of these names, match them, and return each name with the case that it was matched with."""
    for seed, name in enumerate(names):
        picture(folder / name, seed)
    found = match_images(folder, prompts)
    assert all(file.parent == folder for file in found.files)
    return [(file.name, row.seed) for file, row in zip(found.files, found.rows, strict=True)]


@pytest.mark.parametrize("name", ["{:05d}.png", "{}.JPG", "case_{}.webp", "Case-{}.jpeg", "{}_0.png", "{:012d}.bmp"])
def test_images_are_matched_by_case_number(tmp_path: Path, name: str) -> None:
    shuffled = [name.format(number) for number in (101, 3, 20, 7, 12)]
    assert matched(tmp_path, shuffled) == [(name.format(number), number) for number in CASES]
    found = match_images(tmp_path, ASKED)
    assert found.rows == ASKED.rows
    assert found.notes == ("matched by case number",)
    assert found.settings == {"matched": "case number"}
    assert found.arrays().shape == (5, 16, 16, 3)


def test_several_images_of_one_case_all_count(tmp_path: Path) -> None:
    names = ["3_10.png", "3_2.png", *(f"{n}_0.png" for n in CASES[1:])]
    assert matched(tmp_path, names)[:3] == [("3_2.png", 3), ("3_10.png", 3), ("7_0.png", 7)]
    picture(tmp_path / "00003_2.jpg", 9)
    with pytest.raises(RequestError, match=r"several images have one case number: .*3_2\.png"):
        match_images(tmp_path, ASKED)


def test_a_part_is_matched_and_told(tmp_path: Path) -> None:
    assert matched(tmp_path / "few", ["12.png", "3.png"]) == [("3.png", 3), ("12.png", 12)]
    assert match_images(tmp_path / "few", ASKED).notes == (
        "matched by case number",
        "of 5 prompts 3 without an image: case number 7, 20, 101",
    )
    more = [f"{n}.png" for n in (*CASES, 4, 5)]
    assert matched(tmp_path / "more", more) == [(f"{n}.png", n) for n in CASES]
    (tmp_path / "more" / "3.txt").write_text("parameters")
    (tmp_path / "more" / "sub").mkdir()
    (tmp_path / "more" / ".hidden").touch()
    Image.new("RGB", (16, 16)).save(tmp_path / "more" / "7.png")
    assert match_images(tmp_path / "more", ASKED).notes == (
        "matched by case number",
        "2 files are no image: 3.txt, sub",
        "2 images are of no prompt of the set: 4.png, 5.png",
        "1 image is of one colour only: 7.png",
    )


@pytest.mark.parametrize(
    "names",
    [
        ["ComfyUI_00001_.png", "ComfyUI_00002_.png", "ComfyUI_00009_.png", "ComfyUI_00010_.png", "ComfyUI_00100_.png"],
        ["00001-77.png", "00002-5.png", "00003-9.png", "00004-1.png", "00005-3.png"],
        ["img1.png", "img2.png", "img10.png", "img11.png", "img100.png"],
        # Numbers that are not the set's case numbers, though two of them are among these.
        ["1.png", "2.png", "3.png", "12.png", "13.png"],
    ],
)
def test_images_of_programs_that_count_are_matched_by_order(tmp_path: Path, names: list[str]) -> None:
    assert matched(tmp_path, names[::-1]) == list(zip(names, CASES, strict=True))
    assert match_images(tmp_path, ASKED).notes == ("matched by file order",)


def test_a_set_without_case_numbers_counts_its_places(tmp_path: Path) -> None:
    plain = PromptSet("plain", tuple(PromptRow("p", seed) for seed in (50, 51, 52)))
    assert matched(tmp_path, ["00002.png", "00000.png"], plain) == [("00000.png", 50), ("00002.png", 52)]
    twice = PromptSet("twice", tuple(replace(row, case_number=0) for row in plain.rows))
    picture(tmp_path / "00001.png", 7)
    assert [row.seed for row in match_images(tmp_path, twice).rows] == [50, 51, 52]  # by order


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["3.png", "7.png", "12.png", "20.png", "grid.png"], r"grid\.png is not named by a case number, as the others"),
        (
            ["3.png", "4.png"],
            r"2 images for 5 prompts, .*\(strange: 4; missing: 7, 12, 20, 101\); name them .*00003\.png",
        ),
        (["ComfyUI_00003_.png"], "1 images for 5 prompts, and their names are no case numbers of the set; name them"),
    ],
)
def test_images_that_fit_no_prompt_are_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as raised:
        matched(tmp_path, names)
    assert str(raised.value).startswith(f"images {tmp_path}: ")
    assert "\n" not in str(raised.value)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        match_images(tmp_path / "absent", ASKED)
    (tmp_path / "2024-01-01").mkdir()
    with pytest.raises(RequestError, match=r"holds no images \(\.png, .*\), only 2024-01-01"):
        match_images(tmp_path, ASKED)


def test_unreadable_images_are_all_named(tmp_path: Path) -> None:
    matched(tmp_path, [f"{number}.png" for number in CASES])
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "7.png").write_text("<html>")
    (tmp_path / "12.png").write_bytes((tmp_path / "20.png").read_bytes()[:-300])
    with pytest.raises(RequestError, match="3 images cannot be read") as raised:
        match_images(tmp_path, ASKED)
    told = str(raised.value)
    assert "3.png (an empty file), 7.png (is an HTML page" in told
    assert "20.png" not in told
    assert "\n" not in told


def test_hidden_files_are_left_out_and_told(tmp_path: Path) -> None:
    matched(tmp_path, [f"{number}.png" for number in CASES])
    (tmp_path / f"._{CASES[0]}.png").write_bytes(b"what a Mac leaves")
    assert f"1 file is hidden and left out: ._{CASES[0]}.png" in match_images(tmp_path, ASKED).notes


def test_images_of_several_sizes_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "101.png", 0, (16, 24))
    matched(tmp_path, [f"{number}.png" for number in CASES[:-1]])
    with pytest.raises(RequestError, match="have several sizes: 16 x 16, 24 x 16"):
        match_images(tmp_path, ASKED).arrays()


def test_our_own_folders_are_matched_by_their_manifest(tiny: Diffusion, tmp_path: Path) -> None:
    list(iter_sample(tiny, ASKED, tmp_path, Sampling(steps=1)))
    part = PromptSet("part", (ASKED.rows[3], replace(ASKED.rows[1], object="church"), PromptRow("another", 1)))
    found = match_images(tmp_path, part)
    assert [file.name for file in found.files] == ["00003.png", "00001.png"]
    assert [row.object for row in found.rows] == ["", "church"]
    assert found.settings == read_images(tmp_path).settings
    assert found.notes == (
        "matched by manifest",
        "of 3 prompts 1 without an image: case number 2",
        "3 images are of no prompt of the set: 00000.png, 00002.png, 00004.png",
    )
    other = PromptSet("other", tuple(replace(row, seed=row.seed + 1) for row in ASKED.rows))
    with pytest.raises(RequestError, match=r"no line of its manifest\.jsonl is a prompt of other"):
        match_images(tmp_path, other)
    (tmp_path / "00002.png").write_bytes(b"changed")
    with pytest.raises(RequestError, match=r"00002\.png is missing or differs"):
        match_images(tmp_path, part)
