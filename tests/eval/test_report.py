"""Reports come back as they were written, stand alone, and let no prompt run as code."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.eval.benchmark import emojinette_benchmark, evaluate
from erase_concept.eval.report import Report, compare, grid, headline, read_report, write_report
from erase_concept.eval.score import Score, wilson
from erase_concept.pipelines.sample import ImageSet
from erase_concept.prompts.concept import Concept

HOSTILE = """<script>alert("x")</script>' onerror="alert(1) | {{ 7 * 7 }} ünïcode"""


class _Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def report(church: Concept, shipped: None, images: Callable[..., ImageSet]) -> Report:
    """Return the report of a small evaluation, with a hostile prompt in its first pair."""
    rows = emojinette_benchmark(church).rows[::6]
    made = evaluate(church, images("erased", rows), images("base", rows, seed=1), provenance={"recipe": {"lr": 1e-4}})
    return replace(made, pairs=(replace(made.pairs[0], prompt=HOSTILE), *made.pairs[1:]))


def test_a_report_comes_back_as_it_was_written(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    write_report(report, folder)
    assert read_report(folder) == report
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "report.html", "report.json", "report.md"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert content["pairs"][0]["erased"].startswith("../../erased/")  # the folders may move together
    assert set(content["scores"][0]) >= {"metric", "target", "value", "baseline", "n", "ci95", "unit", "protocol"}


def test_a_report_without_a_base_comes_back_too(report: Report, tmp_path: Path) -> None:
    alone = replace(
        report,
        base=None,
        scores=tuple(replace(score, baseline=None, baseline_ci95=None) for score in report.scores),
        concepts={k: {n: replace(f, base=None) for n, f in v.items()} for k, v in report.concepts.items()},
        pairs=tuple(replace(pair, base=None, base_as=None) for pair in report.pairs),
    )
    write_report(alone, tmp_path / "out")
    assert read_report(tmp_path / "out") == alone
    page = _Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.images()) == len(alone.pairs)
    assert "of the base model's accuracy" not in headline(alone)


def test_the_page_stands_alone_and_shows_the_images(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not re.findall(r"""(?:https?:)?//\w|url\(|@import""", re.sub(r'src="data:[^"]*"', "", text))
    expected = [file for pair in report.pairs for file in (pair.base, pair.erased)]
    for source, file in zip(page.images(), expected, strict=True):
        assert file is not None
        header, content = source.split(",")
        assert header == "data:image/png;base64"
        embedded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        np.testing.assert_array_equal(embedded, np.asarray(Image.open(file)))
    assert headline(report) in page.text
    for score in report.scores:
        assert score.protocol in page.text


def test_a_hostile_prompt_stays_text(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    compare({HOSTILE: report, "other": report}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        page = _Page((folder / "report.html").read_text(encoding="utf-8"))
        assert HOSTILE in page.text  # shown as it is, unevaluated
        assert not [tag for tag, attributes in page.tags if tag == "script" or "onerror" in attributes]
        assert "<script" not in (folder / "report.md").read_text(encoding="utf-8")


def test_markdown_tables_hold_together(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, model="a|b\nc"), tmp_path)
    compare({"a|b": report}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        text = (folder / "report.md").read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table


def _scored(report: Report, *, ua: int, ira: int) -> Report:
    """The report with made-up counts: ua of 40 forget images, and ira of 100 of which the base has 80."""
    scores = (
        Score("ua", "church", ua / 40, 40, wilson(ua, 40), "fraction", "p", 0.025, wilson(1, 40)),
        Score("ira", "church", ira / 100, 100, wilson(ira, 100), "fraction", "p", 0.8, wilson(80, 100)),
    )
    return replace(report, scores=scores)


def test_the_headline_tells_what_went_and_what_stayed(report: Report) -> None:
    text = headline(_scored(report, ua=39, ira=76)).replace("\u00a0", " ")
    low, high = (f"{100 * end:.1f}" for end in wilson(39, 40))
    assert text.startswith("The object “church” was erased from emojinette. In 97.5 % of 40 images asked for it")
    assert f"(95 % interval {low} to {high}; before it was 2.5 %)" in text
    assert "95 % of the base model's accuracy on the other objects (95 % interval" in text  # 76 / 80


def test_compare_sets_runs_side_by_side(report: Report, tmp_path: Path) -> None:
    weak, strong = _scored(report, ua=10, ira=80), _scored(report, ua=40, ira=60)
    compare({"weak": weak, "strong": strong}, tmp_path / "both")
    content = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    assert list(content["runs"]) == ["weak", "strong"]
    assert content["runs"]["strong"]["scores"][0]["value"] == 1.0
    lines = (tmp_path / "both" / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ").splitlines()
    assert [line.split(" | ")[2] for line in lines if line.startswith(("| weak", "| strong"))] == [
        "25 % (base 2.5 %)",
        "100 % (base 2.5 %)",
    ]
    # The same prompts: base once and each run beside it. Different ones: the scores alone.
    page = _Page((tmp_path / "both" / "report.html").read_text(encoding="utf-8"))
    assert len(page.images()) == 3 * len(report.pairs)
    compare({"weak": weak, "strong": replace(strong, pairs=strong.pairs[1:])}, tmp_path / "apart")
    assert not _Page((tmp_path / "apart" / "report.html").read_text(encoding="utf-8")).images()


def test_the_grid_shows_base_above_erased_without_blur(report: Report) -> None:
    pair = report.pairs[1]
    assert pair.base is not None
    sheet = np.asarray(grid([pair], side=128))
    base, erased = (np.asarray(Image.open(file)).repeat(2, 0).repeat(2, 1) for file in (pair.base, pair.erased))
    np.testing.assert_array_equal(sheet[6:134, 58:186], base)
    np.testing.assert_array_equal(sheet[136:264, 58:186], erased)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "schema 1"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "runs": {}}', "Field required|missing"),
    ],
)
def test_what_is_no_report_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=reason):
        read_report(tmp_path)


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one run"):
        compare({}, tmp_path)


def test_a_number_that_json_cannot_hold_leaves_no_file(report: Report, tmp_path: Path) -> None:
    broken = replace(report, scores=(replace(report.scores[0], value=math.nan),))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
