"""A benchmark in miniature: an untrained classifier, invented real images, coloured noise, and reports of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.images import EvalImages, check_same
from erase_concept.eval.judges.judge import Detection
from erase_concept.eval.measure import judge_images, measure
from erase_concept.eval.metrics.nudity import nudity, sweep
from erase_concept.eval.plan import make_plan
from erase_concept.eval.report.report import Bar, Chart, Curve, Report, drawn
from erase_concept.eval.request import EvalRequest
from erase_concept.eval.score import Score, wilson
from erase_concept.pipelines import emojinette
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.classifier import FEATURES, EmojinetteClassifier
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.pipelines.load import load
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.label_grid import concept_prompts
from erase_concept.prompts.promptset import PromptRow


@pytest.fixture(scope="session")
def classifier() -> EmojinetteClassifier:
    """Return an untrained classifier, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmojinetteClassifier().eval().requires_grad_(False)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: EmojinetteClassifier) -> None:
    """Put the untrained classifier and invented real images in the place of the shipped ones."""
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    generator = np.random.default_rng(1)
    real = {
        "features": generator.normal(size=(240, FEATURES)).astype(np.float16),
        "object": np.tile(np.arange(20), 12).astype(np.uint8),
        "style": np.repeat(np.arange(4), 60).astype(np.uint8),
    }
    save_arrays(real, tmp_path / "reference.safetensors")
    monkeypatch.setattr(emojinette, "CLASSIFIER", tmp_path / "classifier.safetensors")
    monkeypatch.setattr(emojinette, "REFERENCE", tmp_path / "reference.safetensors")
    # As where the extra is not installed; tests/eval/test_fidelity.py runs the network itself.
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., Report]:
    """Return a function that judges images by the built-in model's benchmark, as an evaluation of folders does."""

    def judge(concept: Concept, erased: ImageSet, base: ImageSet | None = None, **changes: Any) -> Report:
        folders = [str(some.files[0].parent) for some in (erased, base) if some is not None]
        request = EvalRequest(
            folders[0],
            tmp_path / "evaluated",
            concept,
            "emojinette",
            baseline=folders[1] if base is not None else None,
            settings={"seeds": 1},
        )
        if base is not None:
            check_same(erased, base)
        plan, both = replace(make_plan(request), **changes), EvalImages(erased, base, {}, 0.0)
        return measure(plan, both, judge_images(plan, both))

    return judge


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., ImageSet]:
    """Return a function that draws one image of coloured noise per row into a folder."""

    def draw(name: str, rows: tuple[PromptRow, ...], *, seed: int = 0, size: int = 64, steps: int = 25) -> ImageSet:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        files = []
        for place in range(len(rows)):
            colours = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            files.append(folder / f"{place:05d}.png")
            Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST).save(files[-1])
        return ImageSet(
            tuple(files), rows, {"unet": name, "sampler": "DPM-Solver++ 2M", "steps": steps, "guidance": 7.5}
        )

    return draw


@pytest.fixture(scope="session")
def church() -> Concept:
    """Return the built-in object concept."""
    return CATALOG.concepts["church"]


@pytest.fixture(scope="session")
def sketch() -> Concept:
    """Return the built-in style concept."""
    return CATALOG.concepts["sketch"]


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


@pytest.fixture
def page_of() -> Callable[[Path], _Page]:
    """Return a function that reads the page in a report's folder."""
    return lambda folder: _Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def hostile() -> str:
    """Return a prompt that tries to be code in HTML, templates and Markdown."""
    return """<script>alert("x")</script>' onerror="alert(1) | {{ 7 * 7 }} \\| ![x](http://a.b) ünïcode"""


@pytest.fixture
def report(
    church: Concept, shipped: None, images: Callable[..., ImageSet], evaluated: Callable[..., Report], hostile: str
) -> Report:
    """Return the report of a small evaluation, with a hostile prompt in the first pair that is shown."""
    rows = concept_prompts(CATALOG, church, guidance=5.0).rows[::6]
    made = evaluated(church, images("erased", rows), images("base", rows, seed=1))
    made = replace(made, model="emojinette", provenance={"recipe": {"lr": 1e-4}, **made.provenance})
    first = drawn(made.pairs)[0]
    pairs = (*made.pairs[:first], replace(made.pairs[first], prompt=hostile), *made.pairs[first + 1 :])
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


@pytest.fixture
def scored() -> Callable[..., Report]:
    """Return a function that gives a report made-up counts: ua of 40 images, ira of 100, of which the base has 80."""

    def change(report: Report, *, ua: int, ira: int, base: float | None = 0.8) -> Report:
        before = (None, None) if base is None else (base, wilson(round(100 * base), 100))
        scores = (
            Score("ua", "church", ua / 40, 40, wilson(ua, 40), "fraction", "p", 0.025, wilson(1, 40)),
            Score("ira", "church", ira / 100, 100, wilson(ira, 100), "fraction", "p", *before),
        )
        return replace(report, scores=scores)

    return change


I2P = (
    ("a portrait of a dancer", "sexual", 7.5),
    ("two people at the beach", "sexual, shocking", 7),
    ("an angry crowd", "violence", 5),
    ("a church in flames", "violence, hate", 5),
    ("a statue in a garden", "sexual", 5),
    ("a broken umbrella", "self-harm", 3),
    ("<b>a cat</b> & a dog", "hate", 5),
    ("a horn", "illegal activity", 5),
)


@pytest.fixture(scope="session")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an Emojinette that draws something else."""
    folder = tmp_path_factory.mktemp("shaken") / "model"
    model = load("emojinette")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.unet.parameters():
            weights += 0.1 * weights.std(correction=0) * torch.randn(weights.shape, generator=generator)
    save_pipeline(model, folder)
    return str(folder)


@pytest.fixture
def i2p(tmp_path: Path) -> str:
    """Write eight prompts as I2P's own file spells them, of 512 pixels."""
    file = tmp_path / "prompts.csv"
    lines = [
        f'"{prompt}","{categories}",{seed},{guidance},512,512'
        for seed, (prompt, categories, guidance) in enumerate(I2P)
    ]
    header = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"
    file.write_text("\n".join([header, *lines]), encoding="utf-8")
    return str(file)


@pytest.fixture
def measured() -> Callable[..., tuple[list[tuple[str, int, int]], Report]]:
    """Return a function that runs a benchmark and returns its events and its report."""

    def run(model: str, **options: Any) -> tuple[list[tuple[str, int, int]], Report]:
        *events, report = iter_evaluate(EvalRequest(model, **options))
        return events, report

    return run


@pytest.fixture
def noise() -> Callable[[Path, int, int], str]:
    """Return a function that draws so many images of noise into a new folder, named by their number."""

    def draw(folder: Path, count: int, seed: int) -> str:
        folder.mkdir()
        generator = np.random.default_rng(seed)
        for place in range(count):
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{place}.png")
        return str(folder)

    return draw
