"""A run is verified against its base model and its own records, and each kind of tampering names its file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import erase_concept as ec
from erase_concept.cli import main as cli
from erase_concept.errors import RequestError
from erase_concept.eval.judgements import JUDGEMENTS
from erase_concept.eval.verify.beside_weights import check_beside_weights
from erase_concept.eval.verify.verify import Verification, verify
from erase_concept.exports import EXPORT_FORMATS, export
from erase_concept.files import file_sha256
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.formats.tokenizer import clip_tokenizer
from erase_concept.pipelines.load import load, stored_weights
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import run_recipe

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"
BENCHMARK = """
about: three shapes, by how bright an image is
prompts: prompts.csv
labels: object
metrics: [ua, ira]
settings: {steps: 2, guidance: 2.0}
"""
PROMPTS = "prompt,seed,object\n" + "".join(
    f"a {shape} {number},{number},{shape}\n" for shape in ("square", "circle", "line") for number in range(4)
)


class Brightness(nn.Module):
    """Tells three shapes apart by the mean of each colour, far enough apart for the test's noise."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 50 * images.mean((2, 3))


@pytest.fixture(scope="module")
def made(new_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run, its report and its exports in all formats."""
    folder = tmp_path_factory.mktemp("verified")
    before = Path.cwd()
    os.chdir(folder)
    try:
        save_pipeline(new_model(tokenizer), Path("model"))
        square = Concept("square", "object", "circle", ("a {O}", "one {O}"), retain=("circle", "line"), others=("",))
        settings = {"steps": 2, "batch_size": 2, "lr": 1e-2}
        values = {"model": "model", "concept": square, "data": {"forget": 2, "retain": 2, "steps": 2}}
        run = run_recipe(make_recipe(values | {"settings": settings}), Path("run"))
        for name in EXPORT_FORMATS:
            suffix = "" if name == "diffusers" else ".safetensors"
            export(run, f"out-{name}{suffix}", name, dtype=None if name in ("lora", "delta") else "fp16")
        torch.jit.save(torch.jit.script(Brightness()), "judge.pt")
        Path("judge.txt").write_text("square\ncircle\nline\n")
        Path("own.yaml").write_text(BENCHMARK)
        Path("prompts.csv").write_text(PROMPTS)
        ec.evaluate(run, benchmark="own.yaml", judges=("torchscript:judge.pt",))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to tamper with, in which the tests work."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    return copy


def check(**options: Any) -> Verification:
    return verify("run", base="model", **options)


def faults(done: Verification) -> list[str]:
    return [one.file for one in done.checks if one.holds is False]


def alone(folder: Path) -> None:
    """Leave the exports out, where they are not what is tampered with."""
    for path in folder.glob("out-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def change(file: str, how: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a safetensors file's tensors and keep its metadata."""
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    how(tensors)
    save_file(tensors, file, metadata)


def edit(file: str, how: Callable[[Any], None]) -> None:
    content = json.loads(Path(file).read_text())
    how(content)
    Path(file).write_text(json.dumps(content, indent=1))


def test_a_run_holds_and_gets_a_certificate(folder: Path) -> None:
    done = check(seed=3)
    assert not [one for one in done.checks if not one.holds]
    assert {one.holds for one in done.checks} == {True}
    found = {one.what: one.found for one in done.checks}
    assert "none outside the mask" in found["unet"]
    assert all("bit-identical" in found[part] for part in ("vae", "text_encoder"))
    assert sum(name.startswith("export ") for name in found) == len(EXPORT_FORMATS)
    assert "24 prompts" not in found["numbers of report.json"]
    assert "2 images judged anew (5% of the images, drawn with seed 3)" in found[f"judgements in {JUDGEMENTS}"]
    content = json.loads(Path("run/certificate.json").read_text())
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    for one in (*content["subject"], *content["predicate"]["evidence"]):
        assert one["digest"] == {"sha256": file_sha256(Path("run") / one["name"])}
    names = {one["name"] for one in content["subject"]}
    assert {UNET, "pipeline/model_index.json", "../out-lora.safetensors", "../out-diffusers/model_index.json"} <= names
    said = content["predicate"]
    assert said["about"]["removed"]["concept"] == "square"
    assert said["about"]["base"] == {
        "name": "model",
        "family": json.loads(Path("run/run.json").read_text())["base"]["family"],
        "unet_sha256": said["components"][0]["base"],
    }
    report = json.loads(Path("run/report.json").read_text())
    assert [(one["metric"], one["value"], one["ci95"]) for one in said["scores"]] == [
        (one["metric"], one["value"], one["ci95"]) for one in report["scores"]
    ]
    assert any("Attacks" in line for line in said["not_tested"])
    assert str(folder) not in Path("run/certificate.json").read_text()


def test_the_counts_are_those_of_whole_models(folder: Path) -> None:
    """Against both models in memory, and the mask's own bits."""
    alone(folder)
    before, after = (load(name).unet.state_dict() for name in ("model", "run"))
    mask = Mask.load(Path("run/mask.safetensors"))
    differs = {name: before[name].view(torch.int32) != after[name].view(torch.int32) for name in before}
    assert not any((differs[name] & ~mask.dense(name)).any() for name in differs)
    check()
    unet = json.loads(Path("run/certificate.json").read_text())["predicate"]["components"][0]
    assert unet["changed"] == sum(int(one.sum()) for one in differs.values()) > 0
    assert unet["weights"] == mask.total
    info = json.loads(Path("run/run.json").read_text())
    assert (unet["base"], unet["erased"]) == (info["base"]["unet"], info["erased"]["unet"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_come_one_at_a_time_as_they_load(family: Any, part: str, tmp_path: Path) -> None:
    """From a folder, and from a single file whose names and shapes are others."""
    from erase_concept.pipelines.formats.weights import published_name

    save_pipeline(family, tmp_path / "model")
    save_original(family, tmp_path / "model.safetensors", torch.float16, {})
    module = family.modules[part]
    wanted = {published_name(module, name): value for name, value in module.state_dict().items()}
    for source, dtype in (("model", torch.float32), ("model.safetensors", torch.float16)):
        found = list(stored_weights(tmp_path / source, part))
        assert [name for name, _ in found] == sorted(wanted)
        assert all(torch.equal(value, wanted[name].to(dtype)) for name, value in found)


def note(part: str, **values: Any) -> None:
    """Change what run.json notes."""
    edit("run/run.json", lambda info: (info[part] if part else info).update(values))


def outside(folder: Path) -> None:
    """Move one weight outside the mask by one bit, and mend the hash of its file."""
    mask = Mask.load(folder / "run/mask.safetensors")
    name = next(name for name in mask.bits if not mask.dense(name).all())
    place = int((~mask.dense(name)).flatten().nonzero()[0])

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int32).view(-1)[place] ^= 1

    change(f"run/{UNET}", flip)
    note("files", **{UNET.removeprefix("pipeline/"): file_sha256(Path("run") / UNET)})


def other_vae(folder: Path) -> None:
    file = "run/pipeline/vae/diffusion_pytorch_model.safetensors"
    change(file, lambda tensors: tensors["decoder.conv_in.weight"].add_(1))
    note("files", **{file.removeprefix("run/pipeline/"): file_sha256(Path(file))})


def manifest_row(folder: Path) -> None:
    file = folder / "run/samples/erased/manifest.jsonl"
    file.write_text(file.read_text().replace('"object": "square"', '"object": "line"', 1))


def image(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "run/samples/base/00002.png")


def judgement(folder: Path) -> None:
    change(f"run/{JUDGEMENTS}", lambda tensors: tensors["erased/torchscript:judge.pt/scores"][0].mul_(0.5))


def consistent_judgement(folder: Path) -> None:
    """Change a judgement and the hash of its file: the numbers no longer follow."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        scores = tensors["erased/torchscript:judge.pt/scores"]
        scores.copy_(scores.roll(1, dims=1))

    change(f"run/{JUDGEMENTS}", turn)
    digest = file_sha256(folder / "run" / JUDGEMENTS)
    edit("run/report.json", lambda report: report["provenance"]["evidence"].update({JUDGEMENTS: digest}))


def say(old: str, new: str) -> None:
    """Change what the judgements say beside their numbers, and the hash of their file."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        text = tensors["about"].numpy().tobytes().replace(old.encode(), new.encode())
        tensors["about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    change(f"run/{JUDGEMENTS}", turn)
    digest = file_sha256(Path("run") / JUDGEMENTS)
    edit("run/report.json", lambda report: report["provenance"]["evidence"].update({JUDGEMENTS: digest}))


def score(folder: Path) -> None:
    edit("run/report.json", lambda report: report["scores"][0].update(value=0.123))


def page(folder: Path) -> None:
    file = folder / "run/report.html"
    file.write_text(file.read_text().replace("Is it gone?", "It is gone."))


def mask_bit(folder: Path) -> None:
    change("run/mask.safetensors", lambda bits: bits["conv_in.weight"].bitwise_xor_(1))


def log(how: Callable[[list[str]], list[str]]) -> None:
    file = Path("run/log.jsonl")
    file.write_text("".join(how(file.read_text().splitlines(keepends=True))))


def noted_hash(folder: Path) -> None:
    note("files", **{UNET.removeprefix("pipeline/"): "0" * 64})


def recipe(folder: Path) -> None:
    file = folder / "run/recipe.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))


def activation(folder: Path) -> None:
    """Leave all weights, and give the UNet another activation."""
    edit("run/pipeline/unet/config.json", lambda config: config.update(act_fn="relu"))


def hidden_word(folder: Path) -> None:
    """Let the tokenizer take one word for another: the weights still hold what the prompts no longer reach."""

    def swap(words: dict[str, int]) -> None:
        (one, first), (other, second) = [*words.items()][:2]
        words.update({one: second, other: first})

    edit("run/pipeline/tokenizer/vocab.json", swap)
    if Path("run/pipeline/tokenizer/tokenizer.json").exists():  # transformers 4 writes none
        edit("run/pipeline/tokenizer/tokenizer.json", lambda content: swap(content["model"]["vocab"]))


def shorter(folder: Path) -> None:
    edit("run/pipeline/tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=5))


def velocity(folder: Path) -> None:
    file = "run/pipeline/scheduler/scheduler_config.json"
    edit(file, lambda config: config.update(prediction_type="v_prediction"))


def shards(folder: Path) -> None:
    """Put other weights beside the right ones, which diffusers takes because of an index, and note their hash."""
    tensors = {name: value * 0 for name, value in load_file(f"run/{UNET}").items()}
    other = Path("run/pipeline/unet/other.safetensors")
    save_file(tensors, other, {"format": "pt"})
    Path(f"run/{UNET}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, other.name)}))
    note("files", **{"unet/other.safetensors": file_sha256(other)})


def sampled(**values: str) -> None:
    """Let the images be those of another model, in all records of an evaluation."""
    file = "samples/erased/sampling.json"
    edit(f"run/{file}", lambda settings: settings.update(values))
    digest = file_sha256(Path("run") / file)
    edit("run/report.json", lambda report: report["erased"].update(values))
    edit("run/report.json", lambda report: report["provenance"]["evidence"].update({file: digest}))


def forget_evidence(*files: str) -> None:
    edit("run/report.json", lambda report: [report["provenance"]["evidence"].pop(file) for file in files])


def no_images(folder: Path) -> None:
    """Remove the images, so that a score cannot be counted again; it must not be certified then."""
    shutil.rmtree("run/samples")
    forget_evidence(
        *(f"samples/{who}/{name}" for who in ("base", "erased") for name in ("manifest.jsonl", "sampling.json"))
    )
    edit("run/report.json", lambda report: report["scores"][0].update(value=1.0))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight outside the mask": (outside, UNET),
    "another component": (other_vae, "pipeline/vae/diffusion_pytorch_model.safetensors"),
    "a noted hash of a file": (noted_hash, UNET),
    "the noted hash of the base": (lambda _: note("base", unet="0" * 64), "run.json"),
    "the noted hash of the erased": (lambda _: note("erased", unet="0" * 64), "run.json"),
    "a noted count": (lambda _: note("checks", changed=1), "run.json"),
    "the noted concept": (lambda _: note("", concept="line"), "run.json"),
    "the recipe": (recipe, "recipe.yaml"),
    "a bit of the mask": (mask_bit, "mask.safetensors"),
    "a row of a manifest": (manifest_row, "samples/erased/manifest.jsonl"),
    "an image": (image, "samples/base/00002.png"),
    "a judgement": (judgement, JUDGEMENTS),
    "a judgement and its hash": (consistent_judgement, "report.json"),
    "the labels of judgements": (lambda _: say('["square"', '["house"'), JUDGEMENTS),
    "the judge of judgements": (lambda _: say("torchscript", "another"), JUDGEMENTS),
    "judgements of too few images": (lambda _: say('"words": ["', '"words": ["a", "'), JUDGEMENTS),
    "a log that was cut": (lambda _: log(lambda lines: lines[:1]), "log.jsonl"),
    "a log without its first step": (lambda _: log(lambda lines: lines[1:]), "log.jsonl"),
    "a log with a step twice": (lambda _: log(lambda lines: [lines[0], *lines]), "log.jsonl"),
    "a log that says it is whole": (
        lambda _: log(lambda lines: [lines[0].replace('"steps": 2', '"steps": 1')]),
        "log.jsonl",
    ),
    "a log of something else": (lambda _: log(lambda lines: ["[1, 2]\n", *lines]), "log.jsonl"),
    "a score": (score, "report.json"),
    "the noted anchor": (lambda _: note("", anchor="line"), "run.json"),
    "the noted base model": (lambda _: note("base", source="stable-diffusion-v1-5"), "run.json"),
    "a model that is built otherwise": (activation, "pipeline/unet/config.json"),
    "a word of the tokenizer": (hidden_word, "pipeline/tokenizer"),
    "the tokens that a tokenizer gives": (shorter, "pipeline/tokenizer"),
    "what the UNet predicts": (velocity, "pipeline/scheduler/scheduler_config.json"),
    "shards that diffusers would prefer": (shards, f"{UNET}.index.json"),
    "the text encoder of a report": (lambda _: sampled(text_encoder="0" * 64), "report.json"),
    "evidence that is not named": (lambda _: forget_evidence("samples/erased/manifest.jsonl"), "report.json"),
    "the page": (page, "report.html"),
    "the report": (lambda f: (f / "run/report.json").write_text("{}"), "report.json"),
    "no judgements": (lambda f: (f / "run" / JUDGEMENTS).unlink(), JUDGEMENTS),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_named(what: str, folder: Path) -> None:
    alone(folder)
    tamper, file = TAMPERED[what]
    tamper(folder)
    done = check()
    assert file in faults(done), done.checks
    assert done.certificate is None
    assert not Path("run/certificate.json").exists()


@pytest.mark.parametrize(
    ("method", "settings", "steps"),
    [
        ("uce", {}, 1),
        ("rece", {"epochs": 2}, 3),
        ("mace", {"steps": 2}, 4),
        ("mace", {"lora": False}, 1),
        ("edit-then-train", {"steps": 2}, 2),
        ("erasediff", {"steps": 7, "batch_size": 2}, 4),
        ("erasediff", {"steps": 3, "constraint": "projection"}, 3),
        ("esd-x", {"steps": 2, "sampling_steps": 2}, 2),
        ("spm", {"steps": 2, "sampling_steps": 2}, 2),
        ("selective-amnesia", {"steps": 2, "fisher_rows": 2}, 2),
        ("salun", {"epochs": 2, "batch_size": 2}, 4),
    ],
)
def test_the_log_of_each_kind_of_method_is_whole(
    method: str, settings: dict[str, Any], steps: int, folder: Path
) -> None:
    """A closed form has its own steps, several concepts may be trained in turn, and only a run knows its epochs."""
    both = [Concept(name, "object", "circle", ("a {O}",), retain=("circle",)) for name in ("square", "line")]
    concept = Concept("both", "several", combined=tuple(both))
    values = {"model": "model", "concept": concept, "method": method, "data": {"forget": 2, "retain": 2, "steps": 2}}
    run_recipe(
        make_recipe(values | {"settings": {"batch_size": 2, **settings} if "steps" in settings else settings}),
        Path("own"),
    )
    found = {one.what: one for one in verify("own", base="model").checks}
    assert {one.holds for one in found.values()} == {True}, found
    assert found["log.jsonl"].found == f"has a line for each step, {steps} in all"


def test_what_a_folder_has_beside_its_weights_is_compared_without_the_run(folder: Path) -> None:
    Path("run/pipeline").rename("exported")
    done = verify("exported", base="model")
    assert [one.holds for one in done.checks] == [True]
    edit("exported/scheduler/scheduler_config.json", lambda config: config.update(beta_end=0.5))
    assert any(
        "scheduler has beta_end 0.5, the base model's has 0.012" in one.found
        for one in verify("exported", base="model").checks
    )


def test_a_lost_merge_of_a_tokenizer_is_found(new_model: Any, tmp_path: Path) -> None:
    """All its words are there, and one is cut into other tokens."""
    save_pipeline(new_model(clip_tokenizer()), tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "own")
    same = [*check_beside_weights(tmp_path / "own", "own", str(tmp_path / "model"), None, ["a church"])]
    assert [one.holds for one in same] == [True, True]
    words = tmp_path / "own" / "tokenizer"
    merges = (words / "merges.txt").read_text().splitlines()
    last = merges.pop()
    (words / "merges.txt").write_text("\n".join([*merges, ""]))
    if (words / "tokenizer.json").exists():  # transformers 4 writes none
        edit(str(words / "tokenizer.json"), lambda content: content["model"]["merges"].pop())
    tokens, _ = check_beside_weights(tmp_path / "own", "own", str(tmp_path / "model"), None, ["a church"])
    assert tokens.file == "own/tokenizer"
    assert f"cuts {last.replace(' ', '').removesuffix('</w>')!r} into other tokens" in tokens.found


def test_a_base_model_whose_tokenizer_is_not_at_hand_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_original(load("run/pipeline"), "file.safetensors", torch.float32, {})
    monkeypatch.setattr("erase_concept.pipelines.formats.tokenizer.find_spec", lambda _: None)
    (one,) = check_beside_weights(Path("run/pipeline"), "pipeline", "file.safetensors", None, ())
    assert one.holds is None
    assert "the base model's cannot be read: needs the tokenizer" in one.found


def test_a_score_that_cannot_be_counted_again_is_not_certified(folder: Path) -> None:
    alone(folder)
    no_images(folder)
    assert {one.what: one.holds for one in check().checks}["numbers of report.json"] is None
    said = json.loads(Path("run/certificate.json").read_text())["predicate"]
    assert not said["scores"]
    assert any("its scores are left out" in line for line in said["not_tested"])


def test_a_certificate_says_whose_absence_no_report_measures(folder: Path) -> None:
    """A report of another concept says nothing of the erased one, and one of a part nothing of the others."""

    def said(concept: str) -> list[str]:
        Path("run/certificate.json").unlink(missing_ok=True)
        ec.evaluate("run", concept=concept, benchmark="own.yaml", judges=("torchscript:judge.pt",))
        assert check().holds
        lines = json.loads(Path("run/certificate.json").read_text())["predicate"]["not_tested"]
        return [line for line in lines if line.startswith("Whether ")]

    alone(folder)
    assert said("square") == []
    assert said("line") == ["Whether square is gone: no report measures it."]


def test_a_base_model_may_have_moved_since_the_evaluation(folder: Path) -> None:
    """As on an auditor's machine: the report says where the model was, and the run's folder is not there."""
    alone(folder)
    Path("model").rename("moved")
    note("base", folder="/absent")
    assert not faults(verify("run", base="moved"))


def test_a_mask_is_the_one_that_the_recipe_asks_for(folder: Path) -> None:
    """It may be any of this scope and size; a noted hash alone would let each mask pass."""
    from erase_concept.eval.verify.mask import check_asked
    from erase_concept.masks.mask import all_ones
    from erase_concept.pipelines.load import configs
    from erase_concept.recipe import read_recipe

    mask, values = Mask.load(Path("run/mask.safetensors")), read_recipe(Path("run/recipe.yaml"))
    info, model = json.loads(Path("run/run.json").read_text()), configs("model")

    def found(mask: Mask | None, *, noted: Any = info, **asked: Any) -> str:
        recipe = make_recipe(values | {"mask": values["mask"] | asked})
        return next(iter(check_asked(mask, recipe, noted, model))).found

    padded = {**mask.shapes, "more.weight": (mask.total,)}
    bits = {**all_ones(mask.shapes).bits, "more.weight": torch.zeros(-(-mask.total // 8), dtype=torch.uint8)}
    assert found(mask) == "has the recipe's scope and number of weights"
    assert "26,002" in found(all_ones(mask.shapes))
    assert "by the recipe's sparsity 0.75" in found(mask, sparsity=0.75)
    assert "not in the recipe's scope cross-attention" in found(mask, scope="cross-attention")
    assert "for other weights" in found(Mask(bits, padded)), "half of all weights may change, by its own count"
    assert "has no mask" in found(None, noted=info | {"mask": None})
    assert "the recipe says random" in found(mask, kind="random")


def test_nothing_lies_beside_a_model_that_could_be_loaded_instead(folder: Path) -> None:
    from erase_concept.eval.verify.folder import faults as found
    from erase_concept.pipelines.load import configs

    pipeline, family = Path("run/pipeline"), configs("model").family
    (pipeline / "LICENSE").write_text("a licence does no harm")
    assert not list(found(pipeline, family))
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "pipeline.py"):
        (pipeline / name).write_bytes(b"")
        assert [file for _, file in found(pipeline, family)] == [pipeline / name]
        (pipeline / name).unlink()
    (pipeline / "unet").rename("elsewhere")
    (pipeline / "unet").symlink_to(Path("elsewhere").resolve())
    assert ("is a link to another folder, whose files cannot be certified", pipeline / "unet") in found(
        pipeline, family
    )


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key: value * 9 for key, value in tensors.items() if key.endswith(".alpha")})


def alphas(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key: torch.ones(2) for key in tensors if key.endswith(".alpha")})


def turn(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key: -value for key, value in tensors.items() if key.endswith(".lora_up.weight")})


def add(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(8)})


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("lora", grow, "it misses"),
        ("lora", turn, "the base model itself misses no more"),
        ("lora", add("lora_unet_conv_in.dora_scale"), "no part of a LoRA"),
        ("lora", add("text_encoder.lora_A.weight"), "no part of a LoRA"),
        ("lora", lambda tensors: tensors.clear() or tensors.update(one=torch.ones(1)), "is a UNet file"),
        ("single-file", add("first_stage_model.more"), "no weight of the model"),
        ("single-file", add("v_pred"), "marks contradict each other"),
        ("delta", add("more:steps"), "no part of a delta"),
        ("lora", alphas, "an alpha that is no number"),
    ],
    ids=["scale", "sign", "dora", "text encoder", "another format", "a tensor", "a mark", "a step", "alphas"],
)
def test_an_export_holds_nothing_more(name: str, how: Callable[..., Any], said: str, folder: Path) -> None:
    """Each file is one that its own hash, and run.json's, would let pass: these are left out."""
    from erase_concept.eval.verify.exports import Models, check_export

    path = Path(f"out-{name}.safetensors")
    change(str(path), how)
    own = ("modelspec.hash_sha256", "sshs_model_hash")
    with safe_open(path, "pt") as stored:
        metadata = {key: value for key, value in stored.metadata().items() if key not in own}
    save_file(load_file(path), path, metadata)
    info = json.loads(Path("run/run.json").read_text())
    found = check_export(path, path.name, Models("model", None, Path("run/pipeline")), info, {"format": name})
    assert found.holds is False
    assert said in found.found


def test_no_cache_is_read_or_left_beside_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could say of an image whatever its maker likes."""
    from erase_concept.eval.verify import scores

    alone(folder)
    shutil.rmtree(".baselines")
    measure, caches = scores.measure, list[Path]()

    def watch(plan: Any, *rest: Any) -> Any:
        caches.append(plan.cache)
        plan.cache.mkdir()
        return measure(plan, *rest)

    monkeypatch.setattr(scores, "measure", watch)
    before = {*folder.rglob("*")}
    assert check().holds
    assert {file.name for file in {*folder.rglob("*")} - before} == {"certificate.json", "certificate.html"}
    assert not any(cache.exists() for cache in caches)
    assert caches


def test_a_judgement_that_is_wrong_throughout_is_found_by_judging_anew(folder: Path) -> None:
    """The judgements, their hash and all numbers agree with each other, and not with the judge."""
    from erase_concept.eval import evaluate

    alone(folder)
    wrong = evaluate.judge_images

    def turned(plan: Any, images: Any) -> Any:
        judged = wrong(plan, images)
        for one in judged.erased.judgements.values():
            one.scores[:] = one.scores[:, ::-1].copy()
        return judged

    evaluate.judge_images = turned
    try:
        ec.evaluate("run", benchmark="own.yaml", judges=("torchscript:judge.pt",))
    finally:
        evaluate.judge_images = wrong
    assert faults(check(recheck=1)) == [JUDGEMENTS]
    assert check(recheck=0).holds, "nothing is judged anew, and the certificate says so"
    said = json.loads(Path("run/certificate.json").read_text())["predicate"]["not_tested"]
    assert any("0 images were judged anew" in line for line in said)


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_a_changed_export_is_named(name: str, folder: Path) -> None:
    """With its hash mended too, so that only its weights tell."""
    path = Path("out-diffusers") if name == "diffusers" else Path(f"out-{name}.safetensors")
    file = path / "unet/diffusion_pytorch_model.safetensors" if name == "diffusers" else path
    largest = {"lora": 1e3, "delta": 1}

    def move(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key, value in tensors.items() if value.ndim > 1 or key.endswith(":steps"))
        tensors[key].view(-1)[0] += largest.get(name, 0.5)

    change(str(file), move)
    if path.is_file():
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        metadata = {key: value for key, value in metadata.items() if "hash" not in key}
        save_file(load_file(file), file, metadata)
        digest = file_sha256(file)
        edit("run/run.json", lambda info: [e.update(sha256=digest) for e in info["exports"] if e["file"] == path.name])
    assert faults(check()) == [f"../{path.name}"]


def test_an_export_is_found_by_its_path_and_a_strange_one_is_refused(folder: Path) -> None:
    Path("far/away").mkdir(parents=True)
    for path in Path().glob("out-*"):
        path.rename(Path("far/away") / ("renamed.safetensors" if path.name == "out-lora.safetensors" else path.name))
    missing = [one for one in check().checks if one.holds is None]
    assert len(missing) == len(EXPORT_FORMATS)
    Path("run/certificate.json").unlink()
    done = check(exports=(Path("far/away/renamed.safetensors"), Path("far/away/out-diffusers")))
    assert done.holds
    assert sum(one.holds is None for one in done.checks) == len(EXPORT_FORMATS) - 2
    with pytest.raises(RequestError, match="is no export of this run"):
        check(exports=(Path("judge.pt"),))


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_an_export_is_verified_alone(name: str, folder: Path) -> None:
    path = Path("out-diffusers") if name == "diffusers" else Path(f"out-{name}.safetensors")
    done = verify(path, base="model")
    assert done.holds, done.checks
    assert done.certificate == Path(f"{path.stem}.certificate.json")
    assert Path(f"{path.stem}.certificate.html").is_file()
    if path.is_file():
        file = path.read_bytes()
        path.write_bytes(file[:-1] + bytes([file[-1] ^ 1]))
        assert path.name in faults(verify(path, base="model"))


@pytest.mark.parametrize("name", ["unet", "single-file", "lora", "delta"])
def test_an_export_of_another_base_model_is_no_erasure_of_this_one(name: str, folder: Path) -> None:
    """Such as a model that was trained further: nothing but its UNet differs."""
    path, file = Path(f"out-{name}.safetensors"), "model/unet/diffusion_pytorch_model.safetensors"
    assert verify(path, base="model").holds
    said = json.loads(Path(f"{path.stem}.certificate.json").read_text())["predicate"]
    assert said["about"]["base"]["unet_sha256"] == json.loads(Path("run/run.json").read_text())["base"]["unet"]
    assert not any("base model" in line for line in said["not_tested"])
    Path(f"{path.stem}.certificate.json").unlink()
    change(file, lambda tensors: tensors["conv_in.weight"].add_(1))
    done = verify(path, base="model")
    assert faults(done) == [path.name]
    assert done.certificate is None


def test_a_certificate_says_where_an_export_does_not_name_its_base_model(folder: Path) -> None:
    verify("out-diffusers", base="model")
    said = json.loads(Path("out-diffusers.certificate.json").read_text())["predicate"]
    assert (
        "Whether this is its base model: out-diffusers does not say which one it was made from." in said["not_tested"]
    )


@pytest.mark.parametrize("name", ["unet", "single-file"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_export_has_the_erased_unet_that_it_states(name: str, dtype: str, folder: Path) -> None:
    """Its weights, and the hash of the file's contents, were changed together."""
    export(Path("run"), "new.safetensors", name, dtype=dtype)
    assert verify("new.safetensors", base="model").holds
    Path("new.certificate.json").unlink()
    tensors = load_file("new.safetensors")
    with safe_open("new.safetensors", "pt") as stored:
        metadata = {key: value for key, value in stored.metadata().items() if "hash_" not in key and "_hash" not in key}
    tensors["conv_in.weight" if name == "unet" else "model.diffusion_model.input_blocks.0.0.weight"].add_(1)
    save_file(tensors, "new.safetensors", metadata)
    (wrong,) = [one for one in verify("new.safetensors", base="model").checks if one.holds is False]
    assert (wrong.what, wrong.file) == ("erased UNet", "new.safetensors")


def test_a_model_that_is_its_own_base_is_no_erasure(folder: Path) -> None:
    assert faults(verify("model", base="model")) == ["model"]


def test_bad_input_is_refused(folder: Path) -> None:
    bad = {
        r"base \(not given\): needed": {"model": "run"},
        "model absent: there is no such run": {"model": "absent", "base": "model"},
        "base absent: no such model": {"model": "run", "base": "absent"},
        "recheck 2": {"model": "run", "base": "model", "recheck": 2},
        "is not the model that this run erased from": {"model": "run", "base": "run"},
        "is no private key": {"model": "run", "base": "model", "sign": Path("own.yaml")},
        "there is no certificate.json yet": {"model": "run", "base": "model", "public_key": key(folder)[1]},
        "is no certificate": {"model": "run/report.json"},
    }
    for message, options in bad.items():
        with pytest.raises(RequestError, match=message):
            verify(**options)
    assert not Path("run/certificate.json").exists()


def key(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """Write a new pair of keys, private and public."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, files = Ed25519PrivateKey.generate(), (folder / f"{name}.pem", folder / f"{name}-public.pem")
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files[0].write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    files[1].write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return files


def test_a_signature_holds_until_anything_is_changed(folder: Path) -> None:
    alone(folder)
    private, public = key(folder)
    assert check(sign=private).holds
    certificate = Path("run/certificate.json")
    done = verify(certificate, public_key=public)
    assert done.holds
    assert {one.holds for one in done.checks} == {True}
    assert faults(verify(certificate, public_key=key(folder, "other")[1])) == ["certificate.dsse.json"]
    assert check(public_key=public).holds, "what is certified can be verified again, and stays signed"
    text = certificate.read_text()
    certificate.write_text(text.replace('"square"', '"circle"'))
    assert set(faults(verify(certificate, public_key=public))) == {"certificate.dsse.json", "certificate.html"}
    assert "certificate.json" in faults(check())
    certificate.write_text(text)
    edit("run/certificate.dsse.json", lambda one: one["signatures"][0].update(sig="AAAA"))
    assert faults(verify(certificate, public_key=public)) == ["certificate.dsse.json"]


def test_the_envelope_is_dsse(folder: Path) -> None:
    """Checked by DSSE's own words: what is signed is the type and the bytes, with their lengths before them."""
    import base64

    from erase_concept.eval.verify.signature import check_envelope, envelope, read_private_key, read_public_key

    private, public = key(folder)
    made = envelope(b'{"hello": "world"}', read_private_key(private), folder / "none.json")
    assert base64.b64decode(made["payload"]) == b'{"hello": "world"}'
    (folder / "one.json").write_text(json.dumps(made))
    both = envelope(b'{"hello": "world"}', read_private_key(key(folder, "other")[0]), folder / "one.json")
    assert both["signatures"][0] == made["signatures"][0], "another signature stands beside the first"
    assert len(both["signatures"]) == 2
    signed = b'DSSEv1 28 application/vnd.in-toto+json 18 {"hello": "world"}'
    read_public_key(public).verify(base64.b64decode(made["signatures"][0]["sig"]), signed)
    (folder / "many.json").write_text(json.dumps(made | {"signatures": made["signatures"] * 101}))
    said = check_envelope(folder / "many.json", b'{"hello": "world"}', read_public_key(public))
    assert said == "has more than 100 signatures"


def test_a_certificate_that_says_more_than_is_found_is_not_confirmed(folder: Path) -> None:
    """Nor signed: what was not tested, a check that nobody made, and a file that nobody looked at."""
    from erase_concept.eval.verify.certificate import Certificate, check_again, write_certificate

    alone(folder)
    check()
    where = Certificate(Path("run/certificate.json"))
    honest = where.file.read_text()
    now = json.loads(honest)

    def said(how: Callable[[dict[str, Any]], Any]) -> tuple[bool | None, str]:
        content = json.loads(honest)
        how(content["predicate"])
        write_certificate(content, where)
        found = check_again(where, now)
        return found.holds, found.found

    assert said(lambda one: None) == (True, "says what is found now")
    more = [{"what": f"judgements in {JUDGEMENTS}", "holds": True, "found": "all of them", "file": ""}]
    assert said(lambda one: one.update(checks=[*one["checks"][:-1], *more]))[0], "another share was judged anew"
    assert "does not say what was not tested" in said(lambda one: one.update(not_tested=[]))[1]
    attacks = {"what": "attacks", "holds": True, "found": "none worked", "file": ""}
    assert "something else of attacks" in said(lambda one: one["checks"].append(attacks))[1]
    assert (
        "something else of unet"
        in said(lambda one: [c.update(found="!") for c in one["checks"] if c["what"] == "unet"])[1]
    )
    assert "does not name" in said(lambda one: one["evidence"].pop())[1]
    other = {"name": "../own.yaml", "digest": {"sha256": file_sha256(Path("own.yaml"))}}
    assert said(lambda one: one["evidence"].append(other))[1].startswith("certifies ../own.yaml, which is none of")
    content = json.loads(honest)
    content["predicate"]["verifier"]["erase-concept"] = "another"
    write_certificate(content, where)
    where.page.write_text("nothing was left out")
    assert {one.what: one.holds for one in verify(where.file).checks}["certificate.html"] is None


def test_a_file_beside_a_certified_model_is_named(folder: Path) -> None:
    alone(folder)
    check()
    Path(f"run/{UNET}").rename(f"run/{UNET.replace('.safetensors', '.fp16.safetensors')}")
    assert faults(verify("run/certificate.json")) == [UNET.replace(".safetensors", ".fp16.safetensors")]


@pytest.mark.parametrize("file", [UNET, "run.json", "log.jsonl", "samples/base/00000.png", JUDGEMENTS, "grid.png"])
def test_evidence_that_was_changed_afterwards_is_named(file: str, folder: Path) -> None:
    alone(folder)
    check()
    with (Path("run") / file).open("ab") as stream:
        stream.write(b" ")
    assert file in faults(verify("run/certificate.json"))


def test_a_file_of_a_certificate_may_be_elsewhere_but_in_the_run(folder: Path) -> None:
    """Who gets one export and the certificate can check it; the run's own folder must be whole."""
    check()
    Path("far/got").mkdir(parents=True)
    for file in ("out-unet.safetensors", "run/certificate.json"):
        shutil.copy(file, "far/got")
    done = verify("far/got/certificate.json")
    assert done.holds
    assert "are not here" in done.checks[0].found
    Path("far/got/out-unet.safetensors").unlink()
    assert not verify("far/got/certificate.json").holds
    Path("run/grid.png").unlink()
    assert faults(check()) == ["grid.png"]


def test_the_page_runs_nothing_and_escapes_what_it_shows(folder: Path, hostile: str) -> None:
    alone(folder)
    check()
    text = Path("run/certificate.html").read_text()
    assert "default-src 'none'" in text
    # Records are shown in words; only the recipe is YAML.
    assert text.count("<pre>") == text.count("<pre>forget:") + text.count("<pre>model:") == 1
    assert all(words in text for words in ("<dt>UNet SHA-256</dt>", "<dt>versions</dt>", ">text encoder</bdi>"))
    assert not any(key in text.split("<pre>")[0] for key in ("erased_with", "text_encoder"))
    from erase_concept.eval.verify.certificate import page as page_of

    content = json.loads(Path("run/certificate.json").read_text())
    content["predicate"]["about"]["removed"]["concept"] = hostile
    content["predicate"]["about"]["recipe"]["notes"] = [hostile]
    content["predicate"]["checks"][0]["found"] = hostile
    content["subject"][0]["name"] = hostile
    made = page_of(content).decode()
    assert "<script>alert" not in made
    assert 'onerror="' not in made
    assert made.count("<script>") == 1


def test_the_command_ends_with_0_1_and_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["erase-concept", "verify", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    alone(folder)
    code, out, _ = call("run", "--base", "model", "--recheck", "10%", "--json")
    assert code == 0
    assert json.loads(out)["holds"] is True
    code, out, _ = call("run/certificate.json")
    assert (code, "Certificate: run/certificate.json" in out) == (0, True)
    Path("run/log.jsonl").write_text("")
    code, out, _ = call("run/certificate.json")
    assert (code, out.splitlines()[-1].startswith("Does not hold: log.jsonl")) == (1, True)
    code, out, _ = call("run", "--base", "model")
    assert (code, "Does not hold: log.jsonl" in out) == (1, True)
    code, _, err = call("run")
    assert (code, err) == (2, "erase-concept: --base (not given): needed: the model that was erased from\n")
    assert call("run", "--base", "model", "--recheck", "much")[0] == 2
