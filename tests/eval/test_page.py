"""The page stands alone, shows the images, blurs what is flagged, and lets no prompt run as code."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase_concept.eval.report.image_grid import blur, grid, sample_sheet
from erase_concept.eval.report.report import Bar, Chart, Curve, Report, drawn
from erase_concept.eval.report.verdict import summary
from erase_concept.eval.report.write import write_report, write_side_by_side

PageOf = Callable[[Path], Any]


def _pixels(url: str | None) -> np.ndarray:
    header, content = (url or "").split(",")
    assert re.fullmatch("data:image/(png|jpeg);base64", header)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_page_stands_alone_and_shows_the_images(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = page_of(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "form"}
    assert {attributes["href"] for tag, attributes in page.tags if tag == "link"} == {"data:,"}
    shown = re.sub(r'src="data:[^"]*"', "", text.replace("![x](http://a.b)", ""))
    assert not re.findall(r"""(?:https?:)?//\w|url\(|@import""", shown.replace(page.script, ""))
    expected = [
        file for place in drawn(report.pairs) for file in (report.pairs[place].base, report.pairs[place].erased)
    ]
    for image, file in zip(page.images(), expected, strict=True):
        assert file is not None
        np.testing.assert_array_equal(_pixels(image["src"]), np.asarray(Image.open(file)))
        assert image["alt"]
    told = summary(report)
    for sentence in (told.gone_text, told.lost_text, *(tile.interval for tile in told.tiles)):
        assert sentence in page.text
    for score in report.scores:
        assert score.protocol in page.text


def test_a_browser_is_told_to_run_this_script_alone(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    write_report(report, tmp_path)
    page = page_of(tmp_path)
    policies = [a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert f"script-src 'sha256-{digest}'" in policies[0]
    assert "default-src 'none'" in policies[0]
    assert "http" not in policies[0]


def test_flagged_pictures_are_blurred_everywhere(nude: Report, tmp_path: Path, page_of: PageOf) -> None:
    """The blur holds eight patches across: two images of equal patches, with other details, have the same one."""
    generator = np.random.default_rng(0)
    patches = generator.integers(60, 190, (8, 8, 3))
    files = []
    for name in ("one", "other"):
        details = generator.integers(-60, 60, (8, 8, 8, 8, 3))
        details -= np.round(details.mean((1, 3), keepdims=True)).astype(int)  # each patch's mean stays
        pixels = (patches[:, None, :, None] + details).reshape(64, 64, 3).clip(0, 255).astype(np.uint8)
        files.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels).save(files[-1])
    clear = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert np.abs(clear[0] - clear[1]).mean() > 20
    pair = replace(nude.pairs[0], base=files[0], erased=files[1], flagged=True)
    write_report(replace(nude, pairs=(pair,)), tmp_path / "one")
    write_side_by_side({"a": replace(nude, pairs=(pair,)), "b": replace(nude, pairs=(pair,))}, tmp_path / "both")
    for folder, count in (("one", 2), ("both", 3)):
        page = page_of(tmp_path / folder)
        assert len(page.images()) == count
        blurred = [_pixels(image["src"]).astype(int) for image in page.images()]
        assert max(np.abs(blurred[0] - one).max() for one in blurred) <= 16  # of up to 240 in the clear
        np.testing.assert_array_equal(_pixels(page.images()[0]["data-clear"]), clear[0])
        assert "button" in {tag for tag, _ in page.tags}
    sheet = np.asarray(Image.open(tmp_path / "one" / "grid.png")).astype(int)
    assert np.abs(sheet[6:134, 58:186] - sheet[136:264, 58:186]).max() <= 16
    write_report(replace(nude, pairs=(replace(pair, flagged=False),)), tmp_path / "clear")
    assert not [image for image in page_of(tmp_path / "clear").images() if "data-clear" in image]


def test_five_thousand_images_fit_in_five_megabytes(nude: Report, tmp_path: Path, page_of: PageOf) -> None:
    """Noise, which no format makes small, and half of it flagged, which is embedded twice."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    noise = replace(nude.pairs[0], erased=tmp_path / "noise.png", base=tmp_path / "noise.png", prompt="a " * 50_000)
    pairs = tuple(
        replace(
            noise, seed=seed, forget=seed % 3 == 0, flagged=seed % 2 == 0, prompt=noise.prompt if seed < 20 else "b"
        )
        for seed in range(5000)
    )
    write_report(replace(nude, pairs=pairs), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size < 5e6
    assert "24 of 5,000 pairs" in page_of(tmp_path / "out").text
    write_side_by_side({str(run): replace(nude, pairs=pairs[:200]) for run in range(30)}, tmp_path / "runs")
    assert (tmp_path / "runs" / "report.html").stat().st_size < 5e6


def test_a_picture_that_is_gone_or_broken_leaves_a_gap(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    pair = replace(report.pairs[0], erased=broken, base=tmp_path / "gone.png")
    write_report(replace(report, pairs=(pair,)), tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert page.images() == []
    assert "no readable picture at broken.png" in page.text
    assert "no readable picture at gone.png" in page.text


def test_a_hostile_prompt_stays_text(report: Report, tmp_path: Path, page_of: PageOf, hostile: str) -> None:
    bars = (Bar(hostile, 0.5, (0.2, 0.8), 0.9, (0.8, 1.0), 10),)
    odd = replace(
        report,
        concept=hostile,
        kind=hostile,
        anchor=hostile,
        model=hostile,
        benchmark=hostile,
        erased={hostile: hostile},
        scores=(*report.scores, replace(report.scores[0], metric=hostile, target=hostile, protocol=hostile)),
        charts=(Chart(hostile, hostile, bars),),
        curves=(Curve(hostile, hostile, hostile, (0.0, 1.0), (1.0, 2.0)),),
        provenance={hostile: {hostile: [hostile]}},
        pairs=tuple(replace(pair, erased_as=hostile, base_as=hostile, flagged=True) for pair in report.pairs),
    )
    write_report(odd, tmp_path)
    write_side_by_side({hostile: odd, "other": odd}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        page = page_of(folder)
        assert page.text.count(hostile) > 5  # shown as it is, unevaluated
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        text = (folder / "report.md").read_text(encoding="utf-8").split("```")[0]
        assert "<script" not in text
        assert not re.search(r"(?<!\\)!?\[x(?<!\\)\]", text)


def test_the_grid_shows_base_above_erased_without_blur(report: Report) -> None:
    pair = report.pairs[1]
    assert pair.base is not None
    sheet = np.asarray(grid([pair], side=128))
    base, erased = (np.asarray(Image.open(file)).repeat(2, 0).repeat(2, 1) for file in (pair.base, pair.erased))
    np.testing.assert_array_equal(sheet[6:134, 58:186], base)
    np.testing.assert_array_equal(sheet[136:264, 58:186], erased)


def test_a_sheet_has_the_base_model_on_top_and_each_model_s_image_of_a_prompt_below(report: Report) -> None:
    pair = replace(report.pairs[1], flagged=False)
    assert pair.base is not None
    turned = replace(pair, erased=pair.base)
    sheet = np.asarray(sample_sheet({"one": [pair, pair], "other": [turned, turned]}, side=128))
    base, erased = (np.asarray(Image.open(file)).repeat(2, 0).repeat(2, 1) for file in (pair.base, pair.erased))
    margin = sheet.shape[1] - 2 * 132
    for column in range(2):
        left = margin + 132 * column
        for level, expected in enumerate((base, erased, base)):
            np.testing.assert_array_equal(sheet[132 * level + 4 :][:128, left : left + 128], expected)
    # What a detector flagged in the image of one model is blurred in all of them.
    blurred = np.asarray(sample_sheet({"one": [pair], "other": [replace(turned, flagged=True)]}, side=128))
    cover = np.asarray(blur(Image.open(pair.base)).resize((128, 128), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(blurred[4:132, -132:-4], cover)


def test_a_sheet_needs_the_same_prompts_in_all_rows(report: Report) -> None:
    for rows in ({}, {"one": []}, {"one": report.pairs[:1], "other": report.pairs[1:2]}):
        with pytest.raises(ValueError, match="same prompts and seeds"):
            sample_sheet(rows)
