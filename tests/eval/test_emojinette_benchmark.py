"""The benchmark asks in words the erasing did not use, and judges both models on the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from erase_concept.errors import RequestError
from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.plan import make_plan
from erase_concept.eval.report.report import Report, read_report
from erase_concept.eval.report.write import report_json
from erase_concept.eval.request import EvalRequest
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import weights_hash
from erase_concept.prompts.concept import Concept, combine
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.label_grid import asks_for, concept_prompts
from erase_concept.prompts.promptset import PromptRow, PromptSet

Draw = Callable[..., ImageSet]
Evaluated = Callable[..., Report]


def emojinette_benchmark(
    concept: Concept, seeds: int = 2, first_seed: int = 10_000, earlier: Sequence[Concept] = ()
) -> PromptSet:
    """Return the prompts of the built-in model's benchmark."""
    return concept_prompts(CATALOG, concept, seeds, first_seed, earlier, guidance=5.0)


def forget_mask(rows: Sequence[PromptRow], concept: Concept) -> np.ndarray:
    """Return which rows ask for a concept."""
    return np.array([asks_for(row, concept) for row in rows], bool)


def benchmark(model: Path, concept: str | None = None, baseline: Path | None = None, **options: Any) -> Iterator[Any]:
    """Evaluate by the built-in model's benchmark; ``seeds`` is a setting."""
    settings = {key: options.pop(key) for key in ("seeds", "steps") if key in options}
    return iter_evaluate(
        EvalRequest(model, options.pop("out"), concept, "emojinette", baseline, settings=settings, **options)
    )


@pytest.fixture
def small(church: Concept) -> PromptSet:
    """Return every sixth row of the benchmark."""
    return PromptSet("small", emojinette_benchmark(church).rows[::6])


@pytest.mark.usefixtures("shipped")
def test_evaluate_sets_every_score_beside_the_base(
    church: Concept, small: PromptSet, images: Draw, evaluated: Evaluated
) -> None:
    erased, base = images("erased", small.rows), images("base", small.rows, seed=1)
    report = evaluated(church, erased, base)
    assert [score.metric for score in report.scores] == ["ua", "ira", "cra", "frechet"]
    forget = forget_mask(small.rows, church).sum()
    assert [score.n for score in report.scores] == [forget] + [len(small.rows) - forget] * 3
    assert all("25 steps of DPM-Solver++ 2M, guidance 5" in score.protocol for score in report.scores)
    # The baseline is what the base model alone would be scored.
    alone = evaluated(church, base)
    assert [(s.baseline, s.baseline_ci95) for s in report.scores] == [(s.value, s.ci95) for s in alone.scores]
    assert all(score.baseline is None for score in alone.scores)
    objects, styles = report.charts
    bar = next(bar for bar in objects.bars if bar.label == "church")
    assert (bar.n, bar.forget) == (forget, True)
    assert [bar.label for bar in (*objects.bars, *styles.bars) if bar.forget] == ["church"]
    before = next(bar for bar in alone.charts[0].bars if bar.label == "church")
    assert (bar.baseline, bar.baseline_ci95) == (before.value, before.ci95)
    # The same counts as the score's: found where it was asked for.
    ua = report.score("ua")
    assert ua is not None
    assert bar.value == pytest.approx(1 - ua.value)
    assert (report.model, report.benchmark) == (str(base.files[0].parent), "emojinette")
    assert report.erased["unet"] == "erased"
    assert sum(pair.forget for pair in report.pairs) == forget
    assert len(report.pairs) == len(small.rows)
    for place, pair in enumerate(report.pairs):
        assert int(pair.erased.stem) == place
        assert (pair.prompt, pair.seed) == (small.rows[place].prompt, small.rows[place].seed)
        assert pair.base == base.files[place]


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("keys", [("church", "dog"), ("church", "dog", "sketch"), ("flat", "sketch")])
def test_scores_of_several_concepts(keys: tuple[str, ...], images: Draw, evaluated: Evaluated) -> None:
    """Counted here from what the pairs say each image was taken for."""
    whole = combine([CATALOG.concepts[key] for key in keys])
    rows = emojinette_benchmark(whole, 1).rows
    report = evaluated(whole, images("erased", rows), images("base", rows, seed=1))
    seen = [tuple(pair.erased_as.split(", ")) for pair in report.pairs]
    asked = [(row.object, row.style) for row in rows]
    pooled = [0, 0]
    for number, part in enumerate(whole.combined):
        at = 0 if part.kind == "object" else 1
        gone = [s[at] != part.name for s, a in zip(seen, asked, strict=True) if a[at] == part.name]
        score = [score for score in report.scores if score.metric == "ua"][1 + number]
        assert (score.target, score.n, score.value) == (part.name, len(gone), pytest.approx(sum(gone) / len(gone)))
        assert score.baseline is not None
        pooled = [pooled[0] + sum(gone), pooled[1] + len(gone)]
    first = report.score("ua")
    assert (first.target, first.n) == (whole.name, pooled[1])
    assert first.value == pytest.approx(pooled[0] / pooled[1])
    kinds = {0 if part.kind == "object" else 1 for part in whole.combined}
    kept = [(s, a) for s, a in zip(seen, asked, strict=True) if not {*a} & {*keys}]
    for metric, places in (("ira", kinds), ("cra", {0, 1} - kinds)):
        hits = [s[at] == a[at] for s, a in kept for at in places]
        score = report.score(metric)
        assert (score is None) == (not hits)
        if score is not None:
            assert (score.target, score.n) == (whole.name, len(hits))
            assert score.value == pytest.approx(sum(hits) / len(hits))
    assert {bar.label for chart in report.charts for bar in chart.bars if bar.forget} == {*keys}
    assert sum(pair.forget for pair in report.pairs) == len(rows) - len(kept)
    assert report_json(report)["summary"]["text"].startswith(
        f"“{whole.name}” were erased from {report.model}. Is it gone?"
    )


@pytest.mark.usefixtures("shipped")
def test_what_was_erased_earlier_is_measured_beside_it(church: Concept, images: Draw, evaluated: Evaluated) -> None:
    dog = CATALOG.concepts["dog"]
    rows = emojinette_benchmark(church, 1, earlier=(dog,)).rows
    erased, base = images("erased", rows), images("base", rows, seed=1)
    report = evaluated(church, erased, base, earlier=(dog,))
    first, before = (score for score in report.scores if score.metric == "ua")
    assert (first.target, before.target, before.n) == ("church", "dog", 20)
    assert before.protocol.startswith("erased earlier; ")
    assert before.value == next(s for s in evaluated(dog, erased, base).scores if s.metric == "ua").value
    assert before.baseline is not None
    rest = [place for place, row in enumerate(rows) if row.object != "dog"]
    alone = [
        replace(one, files=tuple(one.files[i] for i in rest), rows=tuple(rows[i] for i in rest))
        for one in (erased, base)
    ]
    for score in evaluated(church, *alone).scores:
        assert (score.value, score.n) == (report.score(score.metric).value, report.score(score.metric).n)
    assert {bar.label for chart in report.charts for bar in chart.bars if bar.forget} == {"church", "dog"}
    assert not any(pair.forget for pair, row in zip(report.pairs, rows, strict=True) if row.object == "dog")
    assert report.provenance["erased earlier"] == ["dog"]


@pytest.mark.usefixtures("shipped")
def test_equal_images_give_equal_scores(church: Concept, small: PromptSet, images: Draw, evaluated: Evaluated) -> None:
    report = evaluated(church, images("erased", small.rows), images("base", small.rows))
    assert all((score.value, score.ci95) == (score.baseline, score.baseline_ci95) for score in report.scores)


@pytest.mark.usefixtures("shipped")
def test_sets_that_differ_in_more_than_the_model_are_refused(
    church: Concept, small: PromptSet, images: Draw, evaluated: Evaluated
) -> None:
    erased = images("erased", small.rows)
    reseeded = tuple(replace(row, seed=row.seed + 1) for row in small.rows)
    with pytest.raises(RequestError, match=r"baseline .*its prompts or seeds are not those"):
        evaluated(church, erased, images("other", reseeded))
    with pytest.raises(RequestError, match="sampled with steps 10, the erased model with 25"):
        evaluated(church, erased, images("short", small.rows, steps=10))


@pytest.mark.usefixtures("shipped")
def test_images_without_the_concept_or_with_nothing_else_are_refused(
    church: Concept, small: PromptSet, images: Draw, evaluated: Evaluated
) -> None:
    asked = tuple(row for row in small.rows if row.object == "church")
    with pytest.raises(RequestError, match="no image asks for anything else"):
        evaluated(church, images("asked", asked))
    rest = tuple(row for row in small.rows if row.object != "church")
    with pytest.raises(RequestError, match="no image asks for the object 'church'"):
        evaluated(church, images("rest", rest))
    with pytest.raises(RequestError, match="the objects and styles of emojinette"):
        evaluated(find_concept("nudity"), images("more", rest))


def _listed(found: ImageSet) -> Path:
    """Write the manifest of a set that was drawn, as sampling does, and return its folder."""
    folder = found.files[0].parent
    lines = [
        {"image": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **asdict(row)}
        for file, row in zip(found.files, found.rows, strict=True)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "sampling.json").write_text(json.dumps(found.settings), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("shipped")
def test_benchmark_judges_folders_of_images_without_a_model(
    church: Concept, small: PromptSet, images: Draw, tmp_path: Path, evaluated: Evaluated
) -> None:
    erased, base = images("erased", small.rows), images("base", small.rows, seed=1)
    *events, report = benchmark(_listed(erased), "church", _listed(base), out=tmp_path / "out")
    assert events == []
    assert report.scores == evaluated(church, erased, base).scores
    assert read_report(tmp_path / "out") == report


@pytest.mark.usefixtures("shipped")
def test_images_made_elsewhere_are_matched_by_case_number(
    church: Concept, images: Draw, tmp_path: Path, evaluated: Evaluated
) -> None:
    rows = emojinette_benchmark(church, 1).rows
    erased, base = images("erased", rows), images("base", rows, seed=1)
    erased.files[1].unlink()
    (tmp_path / "erased" / "params.txt").write_text("steps: 20")
    base.files[3].unlink()
    *events, report = benchmark(tmp_path / "erased", "church", tmp_path / "base", out=tmp_path / "out", seeds=1)
    assert events == []
    both = [place for place in range(len(rows)) if place not in (1, 3)]
    assert [pair.erased.name for pair in report.pairs] == [f"{place:05d}.png" for place in both]
    assert all(pair.base is not None and pair.base.name == pair.erased.name for pair in report.pairs)
    assert [pair.prompt for pair in report.pairs] == [rows[place].prompt for place in both]
    kept = [
        replace(some, files=tuple(some.files[i] for i in both), rows=tuple(rows[i] for i in both))
        for some in (erased, base)
    ]
    values = [(score.metric, score.value, score.baseline, score.n) for score in report.scores]
    assert values == [(score.metric, score.value, score.baseline, score.n) for score in evaluated(church, *kept).scores]
    assert all("images made elsewhere, matched by case number" in score.protocol for score in report.scores)
    notes = report.provenance["notes"]
    assert f"of {len(rows)} prompts 1 without an image: case number 1" in notes["erased"]
    assert "1 file is no image: params.txt" in notes["erased"]
    assert f"of {len(rows)} prompts 1 without an image: case number 3" in notes["base"]
    assert any("1 images left out" in note for note in notes["erased"])
    assert read_report(tmp_path / "out") == report


@pytest.mark.usefixtures("shipped")
def test_images_made_elsewhere_are_matched_by_order_and_manifest(church: Concept, images: Draw, tmp_path: Path) -> None:
    rows = emojinette_benchmark(church, 1).rows
    counted = images("counted", rows)
    for place, file in enumerate(counted.files):
        file.rename(file.with_name(f"ComfyUI_{place + 1}_.png"))
    # A manifest without labels, of some of the prompts in another order, and of one that nobody asked.
    some = [*rows[::-2], replace(rows[0], prompt="a tree")]
    unlabelled = images("listed", tuple(replace(row, object="", style="") for row in some))
    *_, by_order = benchmark(tmp_path / "counted", "church", out=tmp_path / "a", seeds=1)
    assert [pair.prompt for pair in by_order.pairs] == [row.prompt for row in rows]
    assert [pair.erased.name for pair in by_order.pairs][8:10] == ["ComfyUI_9_.png", "ComfyUI_10_.png"]
    *_, by_line = benchmark(_listed(unlabelled), "church", out=tmp_path / "b", seeds=1)
    assert [pair.seed for pair in by_line.pairs] == sorted(row.seed for row in rows[::-2])
    assert sum(pair.forget for pair in by_line.pairs) == forget_mask(rows[::-2], church).sum()
    assert f"1 image is of no prompt of the set: {unlabelled.files[-1].name}" in by_line.provenance["notes"]["erased"]
    with pytest.raises(RequestError, match=r"images .*images for .* prompts"):
        next(benchmark(tmp_path / "counted", "church", out=tmp_path / "c", seeds=2))


@pytest.mark.usefixtures("shipped")
def test_images_of_another_size_are_refused(church: Concept, images: Draw, tmp_path: Path) -> None:
    rows = emojinette_benchmark(church, 1).rows
    good, large = images("good", rows), images("large", rows, size=72)
    for model, base, argument in ((large, good, "images"), (good, large, "baseline")):
        with pytest.raises(RequestError) as refused:
            next(benchmark(model.files[0].parent, "church", base.files[0].parent, out=tmp_path / "out", seeds=1))
        told = f"{argument} {tmp_path / 'large'}: 00000.png has 72 x 72 pixels; this benchmark judges 64 x 64"
        assert str(refused.value) == told
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("shipped")
def test_benchmark_of_a_run_knows_concept_and_base(church: Concept, shaken: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "pipeline").symlink_to(shaken)
    unet = weights_hash(load("emojinette").unet)
    account: dict[str, Any] = {"base": {"source": "emojinette", "unet": unet}, "seed": 3}
    (run / "run.json").write_text(json.dumps(account), encoding="utf-8")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"concept": church.to_dict()}), encoding="utf-8")
    small = {"seeds": 1, "steps": 1}
    *events, report = benchmark(run, out=run, batch_size=32, **small)
    total = len(emojinette_benchmark(church, 1).rows)
    assert events == [(who, done, total) for who in ("erased", "base") for done in range(total + 1)]
    assert (report.concept, report.model, report.provenance["run"]["seed"]) == ("church", "emojinette", 3)
    assert report.erased["unet"] != report.base["unet"] == unet
    assert all(score.baseline is not None for score in report.scores if score.metric != "frechet_imagenet")
    assert (run / "report.html").is_file()
    # The same request goes on with what is there, and the model's own benchmark needs no name.
    *events, again = iter_evaluate(EvalRequest(run, run, settings=small, batch_size=32))
    assert events == [("erased", total, total), ("base", total, total)]
    assert again.scores == report.scores
    account["base"]["unet"] = "another"
    (run / "run.json").write_text(json.dumps(account), encoding="utf-8")
    with pytest.raises(RequestError, match="is not the model that this run erased from"):
        next(benchmark(run, out=tmp_path / "other", **small))
    assert not (tmp_path / "other").exists()  # known before anything was sampled


@pytest.mark.usefixtures("shipped")
def test_what_a_run_erased_from_its_base_before_is_measured(church: Concept, shaken: str, tmp_path: Path) -> None:
    """What the judge knows of it, each once, and not as its own."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "pipeline").symlink_to(shaken)
    before = [
        CATALOG.concepts["dog"],
        church,
        combine([CATALOG.concepts["dog"], CATALOG.concepts["flat"]]),
        find_concept("nudity"),
    ]
    account = {"base": {"source": "emojinette", "unet": weights_hash(load("emojinette").unet)}}
    account["earlier"] = [{"concept": one.to_dict(), "base": "x"} for one in before]
    (run / "run.json").write_text(json.dumps(account), encoding="utf-8")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"concept": church.to_dict()}), encoding="utf-8")
    plan = make_plan(EvalRequest(run, tmp_path / "out", benchmark="emojinette", settings={"seeds": 1}))
    rows = plan.prompts.asked.rows
    assert rows == emojinette_benchmark(church, 1, earlier=(CATALOG.concepts["dog"], CATALOG.concepts["flat"])).rows
    assert [target.name for target in plan.targets(rows, plan.earlier)] == ["dog", "flat"]
    assert plan.earlier_unknown == ("nude person",)


def test_benchmark_needs_a_concept_where_no_run_tells(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"concept .*is no run folder"):
        next(benchmark(tmp_path, out=tmp_path / "out"))
    with pytest.raises(RequestError, match="did you mean church"):
        next(benchmark(tmp_path, "chruch", out=tmp_path / "out"))
