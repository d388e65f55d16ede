"""Evaluations of many prompts and of many images, for ``load.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.images import gather
from erase_concept.eval.judgements import Judged, read_judgements, save_judgements
from erase_concept.eval.judges.judge import Detection, Judgement, LoadedJudge
from erase_concept.eval.judges.nudenet import LABELS as PARTS
from erase_concept.eval.measure import measure
from erase_concept.eval.metrics.metric import JudgedImages
from erase_concept.eval.plan import make_plan
from erase_concept.eval.report.report import read_report
from erase_concept.eval.report.write import write_report
from erase_concept.eval.request import EvalRequest
from erase_concept.files import file_sha256
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.prompts.promptset import PromptRow, PromptSet, read_prompts

STYLES = ("flat", "3d", "sketch", "pixel")
LABELS = ("church", "dog", "house", "truck", "guitar", "tree", "cat", "parachute")
DISTINCT = 64  # pictures of a folder; the others are hard links to them
_METRICS = "ua, ira, cra, accuracy, nudity_images, nudity_parts, nudity_ratio, nudity_counts"
OF_VERDICTS = f"prompts: prompts.csv\nforget: label\njudges: [emojinette, nudenet]\nmetrics: [{_METRICS}]\nsize: 64\n"
OF_IMAGES = "prompts: prompts.csv\nforget: label\njudges: [emojinette]\nmetrics: [ua, ira, cra, frechet, accuracy]\n"
OF_IMAGES += "settings: {metric.frechet.reference: held-out}\nsize: 64\nblur: false\n"


def rows_of(size: int) -> tuple[PromptRow, ...]:
    """Return so many prompts, each of which asks for one of the labels and one of the styles."""
    rows = []
    for place in range(size):
        label, style = LABELS[place % len(LABELS)], STYLES[place // len(LABELS) % len(STYLES)]
        text = f"a {style} picture of the {label} number {place}, in the morning"
        rows.append(PromptRow(text, place, object=label, style=style, case_number=place))
    return tuple(rows)


def pictures(size: int, folder: Path) -> list[Path]:
    """Fill a folder with pictures of 64 x 64 pixels, named by case number, and return them in order."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    files = [folder / f"{place:06}.png" for place in range(size)]
    for place, file in enumerate(files):
        if place < DISTINCT:
            pixels = np.kron(generator.integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
            Image.fromarray(pixels).save(file)
        else:
            os.link(files[place % DISTINCT], file)
    return files


def prompts(size: int, folder: Path) -> Iterator[str]:
    """Evaluate so many prompts whose images were judged already, from the prompts' file to the report."""
    rows = rows_of(size)
    folder.mkdir()
    PromptSet("prompts", rows).save(folder / "prompts.csv")
    for who in ("erased", "base"):
        files = pictures(size, folder / who)
        hashes = [file_sha256(file) for file in files[:DISTINCT]]
        with (folder / who / "manifest.jsonl").open("w") as stream:
            for place, (file, one) in enumerate(zip(files, rows, strict=True)):
                line = {"image": file.name, "sha256": hashes[place % DISTINCT], "prompt": one.prompt, "seed": one.seed}
                stream.write(json.dumps(line | {"object": one.object, "style": one.style, "case_number": place}) + "\n")
        (folder / who / "sampling.json").write_text('{"sampler": "DDIMScheduler", "steps": 50, "guidance": 7.5}')
    (folder / "own.yaml").write_text(OF_VERDICTS)
    del rows, files
    yield "start"
    read_prompts(folder / "prompts.csv")
    yield "prompts read"
    models = {"model": folder / "erased", "baseline": folder / "base"}
    plan = make_plan(EvalRequest(**models, out=folder / "out", concept="church", benchmark=str(folder / "own.yaml")))
    yield "planned"
    steps = gather(plan)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        found = end.value
    yield "images gathered"
    sides = {"erased": found.erased, "base": found.base}
    drawn = {who: JudgedImages(side, _verdicts(side, plan.prepared.judges)) for who, side in sides.items()}
    (folder / "out").mkdir()
    yield ""
    save_judgements(Judged(drawn["erased"], drawn["base"]), folder / "out")
    yield "verdicts kept"
    del drawn
    judged = read_judgements(folder / "out", sides)
    yield "verdicts read"
    report = measure(plan, found, judged)
    yield "scores counted"
    del judged
    write_report(report, folder / "out")
    yield "report written"
    del report
    read_report(folder / "out")
    yield "report read"


def _verdicts(images: ImageSet, judges: dict[str, LoadedJudge]) -> dict[str, Judgement]:
    """Return random verdicts of Emojinette's classifier and of NudeNet."""
    generator = np.random.default_rng(len(images.files[0].parent.name))
    count = len(images.files)
    labels = judges["emojinette"].labels
    scores = generator.random((count, len(labels)), np.float32)
    words = tuple(labels[place] for place in scores[:, :20].argmax(1))
    found = generator.random((count, len(PARTS)), np.float32)
    detections = tuple(
        tuple(Detection(label, float(score)) for label, score in zip(PARTS, one, strict=True) if score > 0.9)
        for one in found
    )
    nude = found.max(1, keepdims=True)
    return {
        "emojinette": Judgement(labels, scores, judges["emojinette"].kinds, words=words),
        "nudenet": Judgement(
            judges["nudenet"].labels,
            nude,
            judges["nudenet"].kinds,
            0.9,
            flagged=nude[:, 0] > 0.9,
            detections=detections,
        ),
    }


def images(size: int, folder: Path) -> Iterator[str]:
    """Evaluate so many images of either model that were made elsewhere, by the ordinary call."""
    rows = rows_of(size)
    folder.mkdir()
    PromptSet("prompts", rows).save(folder / "prompts.csv")
    for who in ("erased", "base"):
        pictures(size, folder / who)
    (folder / "own.yaml").write_text(OF_IMAGES)
    asked = EvalRequest(
        model=folder / "erased",
        baseline=folder / "base",
        out=folder / "out",
        concept="church",
        benchmark=str(folder / "own.yaml"),
        fail_if=("ua<0.5",),
    )
    yield "start"
    for _ in iter_evaluate(replace(asked, model=str(asked.model), baseline=str(asked.baseline))):
        pass
    yield "evaluated"
    read_report(folder / "out")
    yield "report read"
