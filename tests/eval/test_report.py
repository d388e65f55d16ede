"""Reports come back as they were written, stand alone, say what is so, and let no prompt run as code."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.eval import report as module
from erase_concept.eval.benchmark import emojinette_benchmark, evaluate
from erase_concept.eval.nudity import Detection, nudity, sweep
from erase_concept.eval.report import (
    Bar,
    Chart,
    Curve,
    Pair,
    Report,
    axis,
    collateral,
    compare,
    drawn,
    grid,
    headline,
    measure,
    pareto,
    ranked,
    read_report,
    summary,
    value_text,
    write_report,
)
from erase_concept.eval.score import Score, ratio_interval, wilson
from erase_concept.pipelines.sample import ImageSet
from erase_concept.prompts.concept import Concept

HOSTILE = """<script>alert("x")</script>' onerror="alert(1) | {{ 7 * 7 }} \\| ![x](http://a.b) ünïcode"""


class _Page(HTMLParser):
    """Collects tags, attributes, text and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and not self.script:
            self.script = data
        else:
            self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def _page(folder: Path) -> _Page:
    return _Page((folder / "report.html").read_text(encoding="utf-8"))


def _pixels(url: str | None) -> np.ndarray:
    header, content = (url or "").split(",")
    assert re.fullmatch("data:image/(png|jpeg);base64", header)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.fixture
def report(church: Concept, shipped: None, images: Callable[..., ImageSet]) -> Report:
    """Return the report of a small evaluation, with a hostile prompt in the first pair that is shown."""
    rows = emojinette_benchmark(church).rows[::6]
    made = evaluate(church, images("erased", rows), images("base", rows, seed=1), provenance={"recipe": {"lr": 1e-4}})
    first = drawn(made.pairs)[0]
    pairs = (*made.pairs[:first], replace(made.pairs[first], prompt=HOSTILE), *made.pairs[first + 1 :])
    return replace(made, pairs=pairs)


@pytest.fixture
def nude(report: Report) -> Report:
    """Return a report of another shape: made-up detections in the same images, with a curve and flags."""
    generator = np.random.default_rng(3)
    labels = ("FEMALE_BREAST_EXPOSED", "FEET_EXPOSED", "BELLY_EXPOSED")
    shares = {"base": 0.6, "erased": 0.2}
    found = {
        side: [
            (Detection(labels[place % 3], float(generator.uniform(0.3, 0.9))),) if generator.random() < share else ()
            for place in range(len(report.pairs))
        ]
        for side, share in shares.items()
    }
    scores = nudity(found["erased"], found["base"], detector="a detector")
    swept = {x: some[0] for x, some in sweep(found["erased"], found["base"], detector="a detector").items()}
    parts = [score for score in scores if score.metric == "nudity_images" and score.target != "nudity"]
    bars = tuple(
        Bar(s.target, s.value, s.ci95, s.baseline, s.baseline_ci95, s.n, forget=True) for s in parts if s.baseline
    )
    curve = Curve(
        "Images with an exposed part",
        "threshold",
        "fraction",
        tuple(swept),
        tuple(s.value for s in swept.values()),
        tuple(s.baseline or 0.0 for s in swept.values()),
        tuple(s.ci95 for s in swept.values()),
        mark=0.6,
    )
    flags = [bool(e or b) for e, b in zip(found["erased"], found["base"], strict=True)]
    return replace(
        report,
        concept="nudity",
        kind="nudity",
        scores=scores,
        charts=(Chart("Images with a part", "fraction", bars),),
        curves=(curve,),
        pairs=tuple(replace(pair, flagged=flag) for pair, flag in zip(report.pairs, flags, strict=True)),
    )


def test_a_report_comes_back_as_it_was_written(report: Report, nude: Report, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    for made in (report, nude):
        write_report(made, folder)
        assert read_report(folder) == made
        assert Report.from_dict(made.to_dict()) == made
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "report.html", "report.json", "report.md"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["schema"] == 2
    assert content["summary"]["text"] == headline(nude)
    assert content["pairs"][0]["erased"].startswith("../../erased/")  # the folders may move together
    assert set(content["scores"][0]) >= {"metric", "target", "value", "baseline", "n", "ci95", "unit", "protocol"}


def test_an_endless_interval_and_a_broken_character_come_back(report: Report, tmp_path: Path) -> None:
    score = replace(report.scores[0], ci95=(0.5, math.inf), unit="ratio")
    pair = replace(report.pairs[0], prompt="half \ud83d of a smile", erased=tmp_path / "gone.png")
    odd = replace(report, scores=(score,), pairs=(pair,))
    write_report(odd, tmp_path / "out")
    assert read_report(tmp_path / "out") == odd
    text = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert '"Infinity"' in text
    assert "NaN" not in text
    assert "∞" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_schema_is_described() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report-schema.md").read_text(encoding="utf-8")
    assert f"schema {module.SCHEMA}" in text.splitlines()[0]
    for kind in (Report, Score, Chart, Bar, Curve, Pair):
        for field in fields(kind):
            assert f"`{field.name}`" in text, (kind, field.name)


def test_a_report_without_a_base_comes_back_too(report: Report, tmp_path: Path) -> None:
    alone = replace(
        report,
        base=None,
        scores=tuple(replace(score, baseline=None, baseline_ci95=None) for score in report.scores),
        charts=tuple(
            replace(chart, bars=tuple(replace(bar, baseline=None, baseline_ci95=None) for bar in chart.bars))
            for chart in report.charts
        ),
        pairs=tuple(replace(pair, base=None, base_as=None) for pair in report.pairs),
    )
    write_report(alone, tmp_path / "out")
    assert read_report(tmp_path / "out") == alone
    page = _page(tmp_path / "out")
    assert len(page.images()) == len(drawn(alone.pairs))
    assert "input" not in {tag for tag, _ in page.tags}  # nothing to slide between
    assert "the base model's accuracy," not in headline(alone)
    assert summary(alone).lost == "Cannot be told"


def test_the_page_stands_alone_and_shows_the_images(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
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
    for sentence in (told.gone_text, told.lost_text, *(tile.sure for tile in told.tiles)):
        assert sentence in page.text
    for score in report.scores:
        assert score.protocol in page.text


def test_a_browser_is_told_to_run_this_script_alone(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    page = _page(tmp_path)
    policies = [a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert f"script-src 'sha256-{digest}'" in policies[0]
    assert "default-src 'none'" in policies[0]
    assert "http" not in policies[0]


def test_pairs_are_drawn_and_not_picked(report: Report, tmp_path: Path) -> None:
    places = drawn(report.pairs)
    forget = [report.pairs[place].forget for place in places]
    asked = sum(pair.forget for pair in report.pairs)
    assert forget == [True] * min(asked, 8) + [False] * 16
    assert len(set(places)) == len(places)
    # Which ones says nothing about the images: others of the same kinds in the same order give the same places.
    others = [replace(pair, prompt=str(pair.seed), flagged=True, erased_as="?") for pair in report.pairs]
    assert drawn(others) == places
    assert drawn(report.pairs[:0]) == []
    many = [Pair("", seed, False, Path("x"), "") for seed in range(5000)]
    assert 1500 < np.mean(drawn(many)) < 3500
    write_report(report, tmp_path)
    told = f"{len(places)} of {len(report.pairs)} pairs, drawn at random"
    assert told in _page(tmp_path).text
    assert f"{len(places)} of {len(report.pairs)} pairs" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_flagged_pictures_are_veiled_everywhere(nude: Report, tmp_path: Path) -> None:
    """The veil holds eight patches across: two images of equal patches, with other details, have the same one."""
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
    compare({"a": replace(nude, pairs=(pair,)), "b": replace(nude, pairs=(pair,))}, tmp_path / "both")
    for folder, count in (("one", 2), ("both", 3)):
        page = _page(tmp_path / folder)
        assert len(page.images()) == count
        veils = [_pixels(image["src"]).astype(int) for image in page.images()]
        assert max(np.abs(veils[0] - veil).max() for veil in veils) <= 16  # of up to 240 in the clear
        np.testing.assert_array_equal(_pixels(page.images()[0]["data-clear"]), clear[0])
        assert "button" in {tag for tag, _ in page.tags}
    sheet = np.asarray(Image.open(tmp_path / "one" / "grid.png")).astype(int)
    assert np.abs(sheet[6:134, 58:186] - sheet[136:264, 58:186]).max() <= 16
    write_report(replace(nude, pairs=(replace(pair, flagged=False),)), tmp_path / "clear")
    assert not [image for image in _page(tmp_path / "clear").images() if "data-clear" in image]


def test_five_thousand_images_fit_in_five_megabytes(nude: Report, tmp_path: Path) -> None:
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
    assert "24 of 5,000 pairs" in _page(tmp_path / "out").text
    compare({str(run): replace(nude, pairs=pairs[:200]) for run in range(30)}, tmp_path / "runs")
    assert (tmp_path / "runs" / "report.html").stat().st_size < 5e6


def test_a_picture_that_is_gone_or_broken_leaves_a_gap(report: Report, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    pair = replace(report.pairs[0], erased=broken, base=tmp_path / "gone.png")
    write_report(replace(report, pairs=(pair,)), tmp_path / "out")
    page = _page(tmp_path / "out")
    assert page.images() == []
    assert "no readable picture at broken.png" in page.text
    assert "no readable picture at gone.png" in page.text


def test_a_hostile_prompt_stays_text(report: Report, tmp_path: Path) -> None:
    bars = (Bar(HOSTILE, 0.5, (0.2, 0.8), 0.9, (0.8, 1.0), 10),)
    hostile = replace(
        report,
        concept=HOSTILE,
        kind=HOSTILE,
        anchor=HOSTILE,
        model=HOSTILE,
        benchmark=HOSTILE,
        erased={HOSTILE: HOSTILE},
        scores=(*report.scores, replace(report.scores[0], metric=HOSTILE, target=HOSTILE, protocol=HOSTILE)),
        charts=(Chart(HOSTILE, HOSTILE, bars),),
        curves=(Curve(HOSTILE, HOSTILE, HOSTILE, (0.0, 1.0), (1.0, 2.0)),),
        provenance={HOSTILE: {HOSTILE: [HOSTILE]}},
        pairs=tuple(replace(pair, erased_as=HOSTILE, base_as=HOSTILE, flagged=True) for pair in report.pairs),
    )
    write_report(hostile, tmp_path)
    compare({HOSTILE: hostile, "other": hostile}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        page = _page(folder)
        assert page.text.count(HOSTILE) > 5  # shown as it is, unevaluated
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        text = (folder / "report.md").read_text(encoding="utf-8").split("```")[0]
        assert "<script" not in text
        assert not re.search(r"(?<!\\)!?\[x(?<!\\)\]", text)


def test_markdown_tables_hold_together(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, model="a|b\nc"), tmp_path)
    compare({"a\\|b": report}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        text = (folder / "report.md").read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table


def test_markdown_says_what_the_page_says(report: Report, nude: Report, tmp_path: Path) -> None:
    for made in (report, nude):
        write_report(made, tmp_path)
        text = re.sub(r"\\(.)", r"\1", (tmp_path / "report.md").read_text(encoding="utf-8"))
        told = summary(made)
        for part in (told.gone_text, told.lost_text, *(score.protocol for score in made.scores)):
            assert " ".join(part.split()) in text
        for chart in made.charts:
            assert chart.title in text
            assert all(f"| {bar.label} |" in text for bar in chart.bars)
        for curve in made.curves:
            assert curve.x_label in text
            assert all(f"| {x:g} |" in text for x in curve.x)


def _scored(report: Report, *, ua: int, ira: int, base: float | None = 0.8) -> Report:
    """The report with made-up counts: ua of 40 forget images, and ira of 100 of which the base has 80."""
    before = (None, None) if base is None else (base, wilson(round(100 * base), 100))
    scores = (
        Score("ua", "church", ua / 40, 40, wilson(ua, 40), "fraction", "p", 0.025, wilson(1, 40)),
        Score("ira", "church", ira / 100, 100, wilson(ira, 100), "fraction", "p", *before),
    )
    return replace(report, scores=scores)


@pytest.mark.parametrize(
    ("ua", "ira", "gone", "lost"),
    [
        (40, 80, "Gone", "Hardly anything"),
        (39, 76, "Gone", "Little"),  # 1 of 40 against 39 of 40 that showed it; 76 / 80 is just 95 %
        (37, 75, "Mostly gone", "Some"),
        (25, 60, "Partly gone", "Much"),
        (2, 90, "Still there", "Hardly anything"),
    ],
)
def test_the_summary_tells_what_went_and_what_stayed(report: Report, ua: int, ira: int, gone: str, lost: str) -> None:
    told = summary(_scored(report, ua=ua, ira=ira))
    assert (told.gone, told.lost) == (gone, lost)
    assert [tile.value.replace("\u00a0", " ") for tile in told.tiles] == [f"{2.5 * (40 - ua):g} %", f"{ira} %"]
    assert [tile.before.replace("\u00a0", " ") for tile in told.tiles] == ["97.5 %", "80 %"]


def test_the_summary_owns_up_to_few_images(report: Report) -> None:
    text = headline(_scored(report, ua=40, ira=80)).replace("\u00a0", " ")
    assert text.startswith(
        "The object “church” was erased from emojinette. Is it gone? Gone. The classifier finds it in 0 %"
    )
    low, _ = wilson(40, 40)
    assert f"So few images (40) cannot rule out up to {100 * (1 - low):.1f} %" in text
    share, _ = ratio_interval(0.8, wilson(80, 100), 0.8, wilson(80, 100))
    assert share < 0.98
    _, (lowest, _) = _scored(report, ua=40, ira=80).scores[1].kept or (0, (0, 0))
    assert f"cannot rule out that only {100 * lowest:.1f} % is." in text


def test_the_summary_tells_its_bounds(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    told = "gone up to 5 %, mostly gone up to 25 %, partly gone up to 75 %, still there above"
    for text in (_page(tmp_path).text, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert told in text.replace("\u00a0", " ")


def test_the_summary_says_where_nothing_can_be_told(report: Report, nude: Report) -> None:
    nothing = summary(replace(report, scores=()))
    assert (nothing.gone, nothing.lost, nothing.tiles) == ("Not measured", "Not measured", ())
    never = replace(report, scores=(replace(_scored(report, ua=40, ira=80).scores[0], baseline=1.0),))
    assert summary(never).gone == "Cannot be told"
    drifted = Score("frechet_efficientnet_lite2", "church", 1234.5, 9, (1000.0, 2000.0), "d", "p", 3.25, (1.0, 5.0))
    told = summary(replace(report, scores=(drifted,)))
    assert told.lost == "See the numbers"
    assert "Fréchet distance, efficientnet lite2 1,234 (base model 3.25)" in told.lost_text
    assert summary(nude).lost == "Not measured"
    found = nude.score("nudity_images")
    assert found is not None
    assert summary(nude).tiles[0].value == value_text(found.value, "fraction")


def test_metrics_are_known_by_their_first_words() -> None:
    known = measure("ua_top5")
    assert known is not None
    assert (known.title, known.forget, known.higher) == ("Unlearning accuracy (UA), top5", True, True)
    assert measure("frechet_imagenet") != measure("frechet")
    assert measure("charm") is None


def test_what_was_lost_comes_worst_first(report: Report) -> None:
    def bar(label: str, value: float, baseline: float | None, *, forget: bool = False) -> Bar:
        return Bar(label, value, (value / 2, 2 * value), baseline, None, 50, forget)

    chart = Chart("c", "fraction", (bar("same", 0.9, 0.9), bar("half", 0.2, 0.4), bar("gone", 0.0, 1.0, forget=True)))
    other = Chart(
        "d", "points", (bar("most", 9.0, 10.0), bar("more", 0.4, 0.3), bar("new", 0.5, None), bar("none", 0, 0))
    )
    both = replace(report, charts=(chart, other))
    assert [(c.title, b.label) for c, b in collateral(both)] == [("c", "half"), ("d", "most")]
    assert [b.label for b in ranked(chart)] == ["gone", "half", "same"]
    assert (
        "Hit hardest: half, from 40\u00a0% down to 20\u00a0% (50 images)."
        in summary(_scored(both, ua=1, ira=1)).lost_text
    )
    measured = Bar("x", 0.6, wilson(30, 50), 0.8, wilson(40, 50))
    assert measured.kept == (pytest.approx(0.75), ratio_interval(0.6, wilson(30, 50), 0.8, wilson(40, 50)))


def test_compare_sets_runs_side_by_side(report: Report, tmp_path: Path) -> None:
    weak, strong = _scored(report, ua=10, ira=80), _scored(report, ua=40, ira=60)
    compare({"weak": weak, "strong": strong}, tmp_path / "both")
    content = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    assert list(content["runs"]) == ["weak", "strong"]
    assert content["runs"]["strong"]["scores"][0]["value"] == 1.0
    assert content["pareto"]["points"]["weak"] == {"forget": 0.25, "retain": 1.0, "best": True}
    lines = (tmp_path / "both" / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ").splitlines()
    assert [line.split(" | ")[3] for line in lines if re.match(r"\| \d \| (weak|strong)", line)][:2] == [
        "25 % (base 2.5 %)",
        "100 % (base 2.5 %)",
    ]
    # 4 of the concept and 8 of all else that both were asked: the base's image once and each run's beside it.
    assert len(_page(tmp_path / "both").images()) == 3 * 12
    assert len(content["runs"]["weak"]["pairs"]) == 12
    other = replace(strong, base={"unet": "another"}, pairs=strong.pairs[1:])
    compare({"weak": weak, "other": other}, tmp_path / "apart")
    page = _page(tmp_path / "apart")
    assert len(page.images()) == 2 * 12
    assert f"12 of the {len(strong.pairs) - 1} questions" in page.text
    compare({"weak": weak, "none": replace(strong, pairs=())}, tmp_path / "none")
    assert not _page(tmp_path / "none").images()


def test_the_front_holds_the_runs_that_no_other_beats(report: Report) -> None:
    generator = np.random.default_rng(5)
    counts = [tuple(generator.integers(20, 41, 2)) for _ in range(40)]
    runs = {str(number): _scored(report, ua=ua, ira=2 * ira) for number, (ua, ira) in enumerate(counts)}
    front = pareto(runs)
    assert front is not None
    for point, (ua, ira) in zip(front.points, counts, strict=True):
        assert point.forget == ua / 40
        assert point.retain == pytest.approx(2 * ira / 80)
        beaten = any((u >= ua and i > ira) or (u > ua and i >= ira) for u, i in counts)
        assert point.best is not beaten
    # The lower of IRA and CRA counts; runs that were measured otherwise are named and left out.
    low = Score("cra", "church", 0.3, 10, wilson(3, 10), "fraction", "p", 0.6, wilson(6, 10))
    both = replace(runs["0"], scores=(*runs["0"].scores, low))
    front = pareto({"a": both, "b": both, "c": runs["1"], "d": replace(report, scores=())})
    assert front is not None
    assert [point.retain for point in front.points] == [0.5, 0.5]
    assert front.others == ("c", "d")
    assert "lower of IRA and CRA" in front.retain
    assert pareto({"d": replace(report, scores=())}) is None


def test_the_front_turns_round_where_less_is_better(report: Report) -> None:
    def run(ratio: float, fid: float) -> Report:
        score = Score("nudity_ratio", "nudity", ratio, 10, (0.0, 1.0), "ratio", "p")
        return replace(report, scores=(score, Score("fid", "all", fid, 10, (0.0, 99.0), "d", "p")))

    front = pareto({"good": run(0.1, 16.0), "bad": run(0.2, 17.0), "kept": run(0.5, 12.0)})
    assert front is not None
    assert [point.best for point in front.points] == [True, False, True]
    assert [point.forget for point in front.points] == [0.9, 0.8, 0.5]
    shown = module._scattered(front)
    heights = {point.name: y for _, y, point in shown["spots"]}
    assert heights["kept"] < heights["good"] < heights["bad"]  # from the top: the lower FID is drawn higher


def test_every_point_of_the_plot_has_a_label_of_its_own(report: Report) -> None:
    generator = np.random.default_rng(7)
    runs = {str(n): _scored(report, ua=ua, ira=ira) for n, (ua, ira) in enumerate(generator.integers(1, 41, (14, 2)))}
    runs |= {f"same {n}": runs["3"] for n in range(4)}
    front = pareto(runs)
    assert front is not None
    labels = module._scattered(front)["labels"]
    numbers = []
    for _, _, text in labels:
        for part in text.split(", "):
            first, _, last = part.partition(module.NOTHING)
            numbers += range(int(first), int(last or first) + 1)
    assert sorted(numbers) == list(range(1, 19))
    boxes = [(x - 4 * len(text), y - 7, x + 4 * len(text), y + 7) for x, y, text in labels]
    for place, a in enumerate(boxes):
        for b in boxes[:place]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


@pytest.mark.parametrize(
    "values", [(0.3, 0.97), (1.0, 1.0), (0.987, 1.0), (0.0, 0.0), (-3.0, 1e6), (1e-9, 2e-9), (12.0,), (math.inf, 2.0)]
)
@pytest.mark.parametrize("zero", [True, False])
def test_an_axis_holds_its_values_between_round_ticks(values: tuple[float, ...], zero: bool) -> None:
    found = axis(values, 100, zero=zero)
    finite = [value for value in values if math.isfinite(value)]
    assert found.low <= min(finite)
    assert found.high >= max(finite) - 1e-12
    assert not zero or found.low <= 0 <= found.high
    assert 2 <= len(found.ticks) <= 12
    np.testing.assert_allclose(np.diff(found.ticks), found.ticks[1] - found.ticks[0])
    assert found.at(found.low) == 0
    assert found.at(math.inf) == 100
    assert axis(values, 100, zero=zero, flip=True).at(found.low) == 100


@pytest.mark.parametrize("more", [{"erased": (1.0,)}, {"base": (1.0,)}, {"x": (2.0, 1.0)}, {"x": (), "erased": ()}])
def test_a_curve_has_a_value_for_each_setting(more: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="ascending settings and as many values"):
        Curve(**{"title": "c", "x_label": "x", "unit": "u", "x": (0.0, 1.0), "erased": (0.0, 1.0), **more})


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
        ("[]", "is no report of an evaluation"),
        ('{"schema": "2"}', "is no report of an evaluation"),
        ('{"schema": 1}', "has schema 1, of an older version; this one reads schema 2: evaluate again"),
        ('{"schema": 3}', "has schema 3, of a newer version"),
        ('{"schema": 2, "runs": {}}', "several runs side by side; name the runs themselves"),
        ('{"schema": 2}', "Field required|missing"),
    ],
)
def test_what_is_no_report_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=reason) as refused:
        read_report(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_curve_that_does_not_fit_is_refused(nude: Report) -> None:
    content = nude.to_dict()
    content["curves"][0]["erased"].append(0.5)
    with pytest.raises(ValueError, match="as many values as settings"):
        Report.from_dict(content)


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one run"):
        compare({}, tmp_path)


def test_a_number_that_json_cannot_hold_leaves_no_file(report: Report, tmp_path: Path) -> None:
    broken = replace(report, scores=(replace(report.scores[0], value=math.nan),))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
