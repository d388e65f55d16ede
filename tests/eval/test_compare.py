"""What a trial is, what it depends on, and one real comparison from the command to its pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erase_concept.cli.compare import split_methods
from erase_concept.errors import RequestError
from erase_concept.eval.compare.compare import CompareProgress, compare, iter_compare
from erase_concept.eval.compare.comparison import CompareRequest, Comparison
from erase_concept.eval.compare.keys import base_weights, code_version, source_hash, trial_key
from erase_concept.eval.compare.sweep import append_result, read_results
from erase_concept.eval.compare.trials import (
    PRESETS,
    Trial,
    TrialContext,
    TrialResult,
    _sampled,
    plan_of,
    read_examples,
    recipe_of,
    split_settings,
)
from erase_concept.eval.report.report import read_report
from erase_concept.eval.score import Score
from erase_concept.files import append_lines
from erase_concept.methods import METHODS
from erase_concept.pipelines.emojinette import MODEL
from erase_concept.pipelines.image_set import manifest_line
from erase_concept.pipelines.load import load
from erase_concept.recipe import with_settings

CONTEXT = TrialContext("emojinette", "weights", "code", "emojinette", Path("nowhere"))


def test_methods_are_names_with_settings_in_brackets() -> None:
    assert split_settings("esd-x") == ("esd-x", {})
    assert split_settings("salun[lr=1.0e-3, remap=random]") == ("salun", {"settings": {"lr": 1e-3, "remap": "random"}})
    assert split_settings("default[mask.sparsity=0.9,steps=3,lr=1e-4]") == (
        "default",
        {"settings": {"steps": 3, "lr": 1e-4}, "mask": {"sparsity": 0.9}},
    )
    assert split_methods("default,esd-x[eta=2,steps=5], uce") == ("default", "esd-x[eta=2,steps=5]", "uce")
    for wrong in ("", "a b", "esd-x[eta]", "esd-x[eta=1", "[eta=1]"):
        with pytest.raises(RequestError, match=r"methods .*must be (NAME or NAME\[)?KEY=VALUE"):
            split_settings(wrong)


@pytest.mark.parametrize("method", [*PRESETS, *METHODS.all()])
@pytest.mark.parametrize("concept", ["church", "flat"])
def test_every_method_has_a_recipe_whose_tuned_setting_is_multiplied(method: str, concept: str) -> None:
    own, double = (recipe_of("emojinette", Trial(method, concept, 0, multiplier=factor)) for factor in (1.0, 2.0))
    tuned_setting = METHODS.find(own.method).tuned_setting
    before, after = (getattr(recipe.settings, tuned_setting) for recipe in (own, double))
    assert after == pytest.approx(2 * before)
    assert before > 0
    same = with_settings(own, **{tuned_setting: after})
    assert same.to_dict() == double.to_dict()


def test_a_trial_s_key_is_of_all_that_its_result_depends_on(tmp_path: Path) -> None:
    trials = [
        Trial("salun", "church", 0),
        Trial("salun", "church", 1),
        Trial("salun", "dog", 0),
        Trial("salun", "church", 0, "random"),
        Trial("salun", "church", 0, multiplier=2.0),
        Trial("salun[alpha=0.3]", "church", 0),
        Trial("uce", "church", 0),
        Trial("safree", "church", 0),
    ]
    benchmark = tmp_path / "own.yaml"
    benchmark.write_text("metrics: [ua, ira]", encoding="utf-8")
    contexts = [
        CONTEXT,
        replace(CONTEXT, weights="a retrained model's"),
        replace(CONTEXT, code="a newer version"),
        replace(CONTEXT, benchmark=str(benchmark)),
    ]
    keys = {trial_key(context, trial) for context in contexts for trial in trials}
    assert len(keys) == len(contexts) * len(trials)
    benchmark.write_text("metrics: [frechet]", encoding="utf-8")
    assert trial_key(contexts[-1], trials[0]) not in keys
    # Nor do other weights or other code share images, latents and masks.
    assert len({context.shared for context in contexts[:3]}) == 3
    # The name under which a recipe is asked for is no part of it.
    assert trial_key(CONTEXT, trials[0]) == trial_key(CONTEXT, Trial("salun", "church", 0, "salient"))


def test_a_changed_mask_file_is_another_mask(tmp_path: Path) -> None:
    file = tmp_path / "mask.safetensors"
    file.write_bytes(b"one")
    first = trial_key(CONTEXT, Trial("salun", "church", 0, str(file)))
    file.write_bytes(b"another")
    assert trial_key(CONTEXT, Trial("salun", "church", 0, str(file))) != first


def test_a_retrained_model_has_other_weights(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    before = base_weights(str(tmp_path / "model"))
    assert before == base_weights("emojinette")
    for part in ("unet", "vae"):
        (file,) = (tmp_path / "model" / part).glob("*.safetensors")
        weights = load_file(file)
        name = sorted(weights)[0]
        weights[name] = torch.nextafter(weights[name], torch.full_like(weights[name], torch.inf))
        save_file(weights, file, {"format": "pt"})
        after = base_weights(str(tmp_path / "model"))
        assert after != before
        before = after
    for file, changed in (
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}),
    ):
        told = json.loads((tmp_path / "model" / file).read_text())
        (tmp_path / "model" / file).write_text(json.dumps(told | changed))
        after = base_weights(str(tmp_path / "model"))
        assert after != before
        before = after


def test_changed_code_is_another_version(tmp_path: Path) -> None:
    files = {"methods/uce.py": "SCALE = 1", "eval/judges/nudenet.py": "", "compare/trials.py": "", "prompts/a.csv": "b"}
    words = {"cli/main.py": "help", "report/html.py": "<html>", "compare/pages.py": "table"}
    for name, text in {**files, **words, "methods/__pycache__/uce.pyc": "x"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    first = source_hash({"package": tmp_path})
    for name in words:
        (tmp_path / name).write_text("other words", encoding="utf-8")
    assert source_hash({"package": tmp_path}) == first  # of which no score depends
    found = [first]
    for name in files:
        (tmp_path / name).write_text("SCALE = 2", encoding="utf-8")
        found.append(source_hash({"package": tmp_path}))
    (tmp_path / "methods" / "new.py").write_text("", encoding="utf-8")
    found.append(source_hash({"package": tmp_path}))
    assert len({*found}) == len(found)


def test_the_version_is_of_the_code_of_every_floor() -> None:
    version, hashed = code_version().split("+")
    assert version[0].isdigit()
    assert len(hashed) == 12
    # An installed package has its floors in one folder; they hash as in the repository, where they stand apart.
    top = Path(__file__).parents[2]
    apart = {"erase_concept": top / "erase"} | {
        f"erase_concept.{name}": top / name for name in ("pipelines", "prompts", "eval")
    }
    assert source_hash(apart)[:12] == hashed


def result_of(trial: Trial, key: str, **more: object) -> TrialResult:
    score = Score("ua", trial.concept, 0.95, 20, (0.76, 0.99), "fraction", "by a classifier", 0.0, (0.0, 0.16))
    return replace(TrialResult(trial, key, "1.0", "object", "lr", 1e-4, 1.0, 2.0, scores=(score,)), **more)


def test_a_result_comes_back_from_its_line_and_one_that_a_kill_cut_short_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    assert read_results(file) == []
    first = result_of(Trial("uce", "gas pump", 0, "random", 0.5), "a", losses=(2.0, 1.0))
    append_result(file, first)
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"trial": {"method": "uce"}, "key": "b", "sec')
    assert read_results(file) == [first]
    others = [
        result_of(Trial("uce", "dog", 1), "c", failed="the loss is nan", scores=()),
        result_of(Trial("é", "x", 0), "d"),
    ]
    for one in others:
        append_result(file, one)
    assert read_results(file) == [first, *others]


def test_the_published_results_are_readable() -> None:
    """The tables of docs/comparison.md can be made of them at any time."""
    file = Path(__file__).parents[2] / "docs" / "comparison" / "trials.jsonl"
    results = read_results(file)
    assert len(results) == len(file.read_text(encoding="utf-8").splitlines()) > 1000
    assert {result.version for result in results} == {"0.1.0"}
    assert len({result.trial for result in results}) == len(results)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no/such/folder"}, "model no/such/folder: "),
        ({"benchmark": "i2p"}, "benchmark i2p: tells no share of what is forgotten, or none"),
        ({"benchmark": "no-such"}, "(--)?benchmark no-such: unknown benchmark"),
        ({"benchmark": "imagenette", "concepts": ("cat",)}, "(--)?concept cat: no prompt of imagenette"),
        ({"methods": ("no-such",)}, "method no-such: allowed: .*esd-x"),
        ({"methods": ("esd-x[no=1]",)}, "settings.no 1: no such setting"),
        ({"concepts": ("nudity",)}, "(--)?concept .*objects and styles of emojinette are"),
        ({"tune_on": ("church",)}, "tune church: is compared on too"),
        ({"masks": ("absent.safetensors",)}, "masks absent.safetensors"),
        ({"masks": ("random@0",)}, "masks random@0: the factor must be a number above 0"),
        ({"masks": ("random@much",)}, "masks random@much: the factor must be a number above 0"),
        ({"methods": ()}, r"methods \(not given\): needed"),
        ({"seeds": ()}, r"seeds \(not given\): needed"),
        ({"model": str(MODEL)}, r"benchmark \(not given\): needed"),
        ({"masks": ("absent@2",)}, "masks absent@2: "),
    ],
)
def test_a_request_that_cannot_be_followed_measures_nothing(tmp_path: Path, options: dict, said: str) -> None:
    request = CompareRequest("emojinette", ("uce",), tmp_path / "out", ("church",), seeds=(0,))
    with pytest.raises(RequestError, match=said):
        compare(replace(request, **options))
    assert not (tmp_path / "out").exists()


def test_images_whose_manifest_was_edited_are_refused(tmp_path: Path) -> None:
    """They would be laid beside those of other prompts."""
    trial = Trial("uce", "church", 0)
    plan = plan_of("emojinette", recipe_of("emojinette", trial), trial, tmp_path)
    (tmp_path / "sampling.json").write_text("{}")
    lines = []
    for place, row in enumerate(plan.prompts.asked.rows):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{place:05d}.png")
        lines.append(manifest_line(tmp_path / f"{place:05d}.png", row))
    manifest, model = tmp_path / "manifest.jsonl", load("emojinette")
    for edited, said in (
        (lines, ""),
        (lines[1:], "its lines are not those that were written: remove the folder"),
        ([lines[0].replace('"prompt": "', '"prompt": "no '), *lines[1:]], "its lines are not those"),
        (["\xff", *lines], "is no text in UTF-8"),
        ([lines[0].replace('"seed": ', '"seed": "x", "width": '), *lines[1:]], "not as 'sample' writes it: seed: "),
    ):
        manifest.write_bytes("".join(edited).encode("latin-1"))
        if not said:
            assert _sampled(model, plan, tmp_path, guarded=False).rows == plan.prompts.asked.rows
            continue
        with pytest.raises(RequestError, match=said):
            _sampled(model, plan, tmp_path, guarded=False)


def test_the_pairs_that_were_kept_of_a_trial_are_read_or_refused(tmp_path: Path) -> None:
    pair = {"prompt": "a \u2028 b", "seed": 1, "forget": True, "erased": "0.png", "erased_as": "", "base": "../b.png"}
    file = tmp_path / "samples" / "k" / "pairs.jsonl"
    assert read_examples(tmp_path, "k") == []
    append_lines(file, [json.dumps(pair, ensure_ascii=False) + "\n"])
    (read,) = read_examples(tmp_path, "k")
    assert (read.prompt, read.erased, read.base) == ("a \u2028 b", file.parent / "0.png", file.parent / "../b.png")
    for damaged in ("{", "[1]", '{"prompt": "a"}', json.dumps(pair | {"seed": "x"})):
        file.write_text(f"{json.dumps(pair)}\n{damaged}\n")
        with pytest.raises(RequestError, match=r"pairs\.jsonl, line 2: is no pair of images: remove the file"):
            read_examples(tmp_path, "k")


@pytest.mark.slow
def test_a_comparison_from_the_methods_to_the_page_goes_on_where_it_stopped(tmp_path: Path) -> None:
    benchmark = tmp_path / "quick.yaml"  # Emojinette's own, with fewer images and steps
    benchmark.write_text(
        "{catalog: emojinette, forget: label, judges: [emojinette], metrics: [ua, ira, cra], size: 64,"
        " settings: {seeds: 1, guidance: 5.0, steps: 12}}"
    )
    request = CompareRequest("emojinette", ("uce",), tmp_path, ("church",), str(benchmark), seeds=(0,))
    progress, first = iter_compare(request)
    assert progress == CompareProgress("uce__1_church_0", 1, 1)
    assert isinstance(first, Comparison)
    line = (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
    once, twice = (f"salun[steps=2,lr={rate},data.forget=8,data.retain=8]" for rate in ("1.0e-9", "2.0e-9"))
    both = compare(replace(request, methods=("uce", once)))
    lines = (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
    assert lines.startswith(line)  # the first trial was not measured again
    edited, _ = both.results
    assert list(both.results) == read_results(tmp_path / "trials.jsonl")
    assert first.results == (edited,)
    assert edited.version == code_version()
    erased, left = ({score.metric: score for score in one.scores} for one in both.results)
    assert erased["ua"].n == 20
    assert erased["ua"].value > 0.5
    assert 0 < edited.changed < 0.1  # keys and values of cross-attention alone
    assert left["ua"].value == 0  # nothing was erased with such a rate
    assert left["ira"].value == left["ira"].baseline
    assert 0.2 < edited.peak_gib < 8
    pairs = read_examples(tmp_path, edited.key)
    assert len(pairs) == 12
    assert all(pair.erased.is_file() and pair.base is not None for pair in pairs)
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| uce | " in table
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["methods"]["uce"]["forgotten"]["value"] == erased["ua"].value
    with Image.open(tmp_path / "sheets" / "church.png") as sheet:  # the base and two methods, 12 prompts each
        assert sheet.height == 3 * 100 + 54
        assert sheet.width > 12 * 100
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "uce" in page
    with pytest.raises(RequestError, match="lays several runs side by side"):
        read_report(tmp_path)
    # What was measured under one name is told, pictures and all, under the one that is asked for.
    again = compare(replace(request, methods=(twice,), masks=("salient@0.5",)))
    assert [result.trial.label for result in again.results] == [
        "salun-steps=2-lr=2.0e-9-data.forget=8-data.retain=8-_salient_0.5_church_0"
    ]
    assert (tmp_path / "trials.jsonl").read_text(encoding="utf-8") == lines
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["methods"].keys() == {f"{twice}, mask salient"}
    with Image.open(tmp_path / "sheets" / "church.png") as sheet:
        assert sheet.height == 2 * 100 + 54


@pytest.mark.slow
def test_any_model_is_compared_by_any_benchmark_that_tells_what_is_gone_and_what_is_kept(tmp_path: Path) -> None:
    """A copy of the built-in model, which nothing knows by name, judged by a benchmark of one's own."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (tmp_path / "prompts.csv").write_text(
        "prompt,evaluation_seed,object\na church in town,1,church\na green tree,2,tree\nsome nice dog,3,dog\n"
    )
    (tmp_path / "own.yaml").write_text(
        "{prompts: prompts.csv, judges: [emojinette], metrics: [ua, ira, cra, accuracy],"
        " settings: {guidance: 5.0, steps: 12, seeds: 2}}"
    )
    out = tmp_path / "out"
    request = CompareRequest(
        str(folder), ("uce", "negative-prompt"), out, ("church",), str(tmp_path / "own.yaml"), seeds=(0, 1)
    )
    comparison = compare(request)
    scores = [{score.metric: score for score in result.scores} for result in comparison.results]
    assert [some["ua"].n for some in scores] == [2] * 4
    assert [some["ira"].n for some in scores] == [4] * 4
    assert {some["ua"].baseline for some in scores} == {0.0}
    erased = [
        some["ua"].value for some, one in zip(scores, comparison.results, strict=True) if one.trial.method == "uce"
    ]
    assert erased == [1.0, 1.0]
    assert comparison.aggregates["uce"].retained.keys() == {"ira"}
    # The page tells whose judgement it is, and of what kind the concept is.
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "own.yaml" in page
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))["runs"]["uce"]
    assert report["kind"] == comparison.results[0].kind == "object"  # a church is a class of Imagenette
    judged = comparison.results[0].scores[0].protocol
    assert report["scores"][0]["protocol"].endswith(judged)
    # Another seed is other noise.
    first, second = (*out.glob("shared/*/base/*"),)
    assert (first / "00000.png").read_bytes() != (second / "00000.png").read_bytes()
    # A model of other weights in the same folder is another model.
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    save_file({name: 0 * value if name.startswith("conv_out") else value for name, value in weights.items()}, file)
    retrained = compare(replace(request, methods=("uce",), seeds=(0,)))
    assert retrained.results[0].key not in {result.key for result in comparison.results}
    assert retrained.results[0].scores != comparison.results[0].scores
    assert len(read_results(out / "trials.jsonl")) == 5


def test_the_process_of_a_trial_dies_with_the_comparison() -> None:
    """Otherwise it would go on beside the same command, which was run again."""
    script = """
import os, sys, time, multiprocessing
from concurrent.futures import ProcessPoolExecutor
from erase_concept.eval.compare.sweep import _end_with_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        child = psutil.Process(int(running.stdout.readline()))
        assert child.is_running()
        running.kill()
    child.wait(timeout=20)
