"""From requests to plans: which benchmark, which concept, whose settings, and which weights of the base model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.choose import is_nudity
from erase_concept.eval.evaluate import evaluate, iter_evaluate
from erase_concept.eval.plan import make_plan
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.verdict import summary
from erase_concept.eval.request import EvalRequest
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import ema_key, save_original
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.find import find_concept

Measured = Callable[..., tuple[list[tuple[str, int, int]], Report]]
Noise = Callable[[Path, int, int], str]


@pytest.mark.parametrize(
    ("model", "concept", "benchmark"),
    [
        ("emojinette", "church", "emojinette"),
        ("emojinette", "nudity", "emojinette"),  # its own benchmark, which then says that it does not know it
        ("images", "nudity", "i2p"),
        ("images", "unsafe:naked people", "i2p"),
    ],
)
def test_the_model_or_the_concept_names_the_benchmark(model: str, concept: str, benchmark: str, tmp_path: Path) -> None:
    from erase_concept.eval.choose import choose_benchmark
    from erase_concept.eval.request import ErasedRun

    request = EvalRequest(model, tmp_path / "out", concept)
    assert choose_benchmark(request, ErasedRun()).name == benchmark
    # A run on a run of the built-in model is one of the built-in model's.
    run = ErasedRun({"base": {"source": "runs/a", "unet": ""}, "earlier": [{"base": "emojinette"}]}, {})
    assert choose_benchmark(request, run).name == "emojinette"


@pytest.mark.parametrize(
    ("concept", "words"),
    [
        ("object:blue rocket", "benchmark (not given): none is made for 'blue rocket' (object); choose one of: coco"),
        (None, "benchmark (not given): neither a run nor a concept is given; choose one of: coco"),
    ],
)
def test_where_nothing_names_a_benchmark_it_is_asked_for(
    concept: str | None, words: str, noise: Noise, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as refused:
        make_plan(EvalRequest(noise(tmp_path / "images", 2, 0), tmp_path / "out", concept))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("nudity", True), ("naked people", True), ("NSFW content", True), ("blue rocket", False), ("Essex", False)],
)
def test_nudity_is_told_in_the_words_of_a_user(words: str, expected: bool) -> None:
    assert is_nudity(find_concept(words if words == "nudity" else f"object:{words}")) == expected


def test_a_nudity_benchmark_does_not_say_that_something_else_is_gone(
    i2p: str, noise: Noise, tmp_path: Path, measured: Measured
) -> None:
    pytest.importorskip("nudenet")
    erased, base = noise(tmp_path / "erased", 8, 0), noise(tmp_path / "base", 8, 1)
    asked = {"benchmark": "i2p", "prompts": i2p, "baseline": base}
    _, report = measured(erased, out=tmp_path / "rocket", concept="object:blue rocket", **asked)
    assert (report.concept, report.looks_for) == ("blue rocket", "nudity")
    assert not any(pair.forget for pair in report.pairs)
    assert report.score("nudity_images").target == "nudity"
    told = summary(report)
    assert told.gone == "Not measured"
    words = "This benchmark looks for nudity, which was not erased: 0\u00a0% of the images show"
    assert told.gone_text.startswith(words)
    assert report.provenance["looks for"] == "nudity"
    # Nudity may be one of several concepts, and have other words.
    both = [find_concept("nudity"), find_concept("object:blue rocket")]
    _, report = measured(erased, out=tmp_path / "both", concept=both, **asked)
    assert (report.looks_for, summary(report).gone) == ("", "Cannot be told")
    assert all(pair.forget for pair in report.pairs)
    _, report = measured(erased, out=tmp_path / "naked", concept="unsafe:naked people", **asked)
    assert (report.concept, report.looks_for) == ("naked people", "")
    assert all(pair.forget for pair in report.pairs)
    assert summary(report).gone != "Not measured"


def test_the_base_has_the_weights_that_the_run_took(
    tiny: Diffusion, square: Concept, tmp_path: Path, measured: Measured
) -> None:
    """Of a file with averaged and live weights the run took the live ones."""
    file, unet = tmp_path / "model.safetensors", "model.diffusion_model."
    save_original(tiny, file, torch.float32, {})
    save_pipeline(tiny, tmp_path / "model")  # whose configurations are the file's
    tensors = load_file(file)
    save_file(tensors | {ema_key(k): v + 1 for k, v in tensors.items() if k.startswith(unet)}, file)
    live, averaged = (weights_hash(load(file, ema=ema).unet) for ema in (False, True))
    assert live != averaged
    (tmp_path / "prompts.csv").write_text("prompt,object\na,square\nb,line\n")
    own = tmp_path / "own.yaml"
    own.write_text("prompts: prompts.csv\nmetrics: [pixel_distance]\nsettings: {steps: 1}\nblur: false\n")
    for name, ema, base in (("live", False, live), ("averaged", True, averaged)):
        run = tmp_path / name
        save_pipeline(tiny, run / "pipeline")
        (run / "run.json").write_text(json.dumps({"base": {"source": str(file), "unet": base}}))
        (run / "recipe.yaml").write_text(yaml.safe_dump({"concept": square.to_dict(), "ema": ema}))
        report = next(reversed(list(iter_evaluate(EvalRequest(run, tmp_path / f"out-{name}", benchmark=str(own))))))
        assert report.base["unet"] == base
    # A run whose file has changed since is refused before anything is sampled.
    (tmp_path / "live" / "recipe.yaml").write_text(yaml.safe_dump({"concept": square.to_dict(), "ema": True}))
    with pytest.raises(
        RequestError, match=r"baseline .*model\.safetensors: is not the model that this run erased from"
    ):
        measured(tmp_path / "live", out=tmp_path / "again", benchmark=str(own))
    assert not (tmp_path / "again").exists()


def test_settings_of_judges_and_metrics(i2p: str, noise: Noise, tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    folder = noise(tmp_path / "images", 8, 0)

    def threshold(**settings: object) -> float:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        plan = make_plan(EvalRequest(folder, tmp_path, "nudity", "i2p", prompts=i2p, settings=given))
        return plan.prepared.judges["nudenet"].settings.threshold

    assert threshold() == 0.6
    assert threshold(judge__threshold=0.5) == 0.5
    assert threshold(judge__nudenet__threshold="0.25") == 0.25
    own = tmp_path / "own.yaml"
    own.write_text(f"prompts: {i2p}\nmetrics: [nudity_images]\nsettings: {{judge.threshold: 0.3}}\n")
    plan = make_plan(EvalRequest(folder, tmp_path, "nudity", str(own)))
    assert plan.prepared.judges["nudenet"].settings.threshold == 0.3  # the metric brings its judge
    with pytest.raises(RequestError, match=r"judge\.size 3: nothing here takes it; there are: judge\.nudenet\.labels"):
        threshold(judge__size=3)
    with pytest.raises(RequestError, match=r"judge\.other\.threshold 0\.5: did you mean judge\.nudenet\.threshold"):
        threshold(judge__other__threshold=0.5)


def test_two_judges_of_one_setting_are_named(tmp_path: Path, i2p: str, noise: Noise) -> None:
    folder = noise(tmp_path / "images", 8, 0)
    judges = ("torchvision:resnet18=a.pth", "torchvision:resnet50=b.pth")
    request = EvalRequest(
        folder, tmp_path, "church", "imagenette", prompts=i2p, judges=judges, settings={"judge.model": "x"}
    )
    with pytest.raises(
        RequestError, match=r"judge\.model x: name the judge: judge\.torchvision:resnet18=a\.pth\.model or"
    ):
        make_plan(request)


def test_ssim_and_lpips_are_metrics_like_any_other(
    i2p: str, noise: Noise, tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    erased, base = noise(tmp_path / "erased", 8, 0), noise(tmp_path / "base", 8, 1)
    asked = {"benchmark": "coco", "prompts": i2p, "concept": "church", "baseline": base}
    _, report = measured(erased, out=tmp_path / "out", metrics=("pixel_distance", "ssim", "lpips"), **asked)
    assert -1 <= report.score("ssim").value < 0.1  # noise against other noise
    assert report.score("lpips") is None
    reason = report.provenance["not measured"]["lpips"]
    assert "needs lpips: pip install lpips" in reason or "needs AlexNet's weights" in reason
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    own = tmp_path / "own.yaml"
    own.write_text(f"prompts: {i2p}\nmetrics: [ssim]\n")
    with pytest.raises(RequestError, match="metric ssim: needs scikit-image: pip install scikit-image"):
        measured(erased, out=tmp_path / "no", concept="church", baseline=base, benchmark=str(own))


def test_evaluating_a_model_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"out \(not given\): needed, for emojinette is no run folder"):
        evaluate("emojinette", "church")


def test_from_python_everything_of_a_request_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvalRequest] = []
    monkeypatch.setattr("erase_concept.eval.evaluate.run_evaluation", asked.append)
    with pytest.raises(EraseError, match="the main one alone"):
        evaluate("a.safetensors", "church", out=tmp_path, benchmark="i2p", ema=False, fail_if=("ua<0.9",))
    request = EvalRequest("a.safetensors", tmp_path, "church", benchmark="i2p", ema=False, fail_if=("ua<0.9",))
    assert asked == [request]
    with pytest.raises(TypeError, match="unexpected keyword argument 'emma'"):
        evaluate("a.safetensors", "church", out=tmp_path, emma=True)
