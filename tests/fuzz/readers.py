"""Everything that reads a file from outside: its name, the file, the reader, valid files, and the files' structure."""

from __future__ import annotations

import copy
import gzip
import html.parser
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz import records
from fuzz import structures as made
from hypothesis.strategies import SearchStrategy
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from erase_concept.classification.recipe import make_unlearn_recipe
from erase_concept.eval.benchmarks import find_benchmark
from erase_concept.eval.classification.table import Trial, read_trials
from erase_concept.eval.compare.sweep import read_results
from erase_concept.eval.judges.nudenet import _read_cache
from erase_concept.eval.judges.q16 import read_prompt_vectors
from erase_concept.eval.report.report import Bar, Chart, Curve, Pair, Report, read_report
from erase_concept.eval.report.write import report_json, write_report, write_side_by_side
from erase_concept.eval.request import read_erased_run
from erase_concept.eval.score import Score
from erase_concept.eval.verify.signature import read_public_key
from erase_concept.exports import public_recipe
from erase_concept.masks.mask import Mask, all_ones, describe
from erase_concept.model_card import card
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.classifiers.architectures import build
from erase_concept.pipelines.classifiers.classifier import Classifier, Normalisation
from erase_concept.pipelines.classifiers.images import ImageData, InMemory, OnDisk, _idx
from erase_concept.pipelines.classifiers.load import load_classifier, recorded_data
from erase_concept.pipelines.formats.delta import apply_delta, open_delta, save_delta
from erase_concept.pipelines.formats.prediction import read_prediction
from erase_concept.pipelines.formats.weights import read_dtypes, read_tensors
from erase_concept.pipelines.image_set import MANIFEST, SETTINGS, manifest_line
from erase_concept.pipelines.load import configs, load
from erase_concept.pipelines.match_images import match_images
from erase_concept.pipelines.pictures import picture_size, read_picture
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.promptset import PromptRow, PromptSet, read_prompts
from erase_concept.recipe import earlier_runs, make_recipe, read_recipe
from erase_concept.run_folder import read_run
from erase_concept.settings import read_value


@dataclass(frozen=True)
class Reader:
    """A reader of one file. ``prepare`` lays what stands beside it into a folder, and returns valid contents.

    ``weight`` is the share of a long run's inputs that it gets: slow readers get fewer.
    """

    name: str
    file: str
    read: Callable[[Path], object]
    structure: SearchStrategy[bytes]
    prepare: Callable[[Path], list[bytes]]
    weight: float = 1.0
    accepts: bool = True  # the contents that ``prepare`` returns; a LoRA is refused as a model


def _document(*documents: Any) -> Callable[[Path], list[bytes]]:
    return lambda folder: [json.dumps(one).encode() for one in documents]


def _yaml(*documents: Any) -> Callable[[Path], list[bytes]]:
    return lambda folder: [yaml.safe_dump(one, sort_keys=False).encode() for one in documents]


def _texts(*texts: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [text.encode() for text in texts]


# Recipes, concepts, prompts and benchmarks.
CONCEPT = {"name": "red kite", "kind": "object", "anchor": "a bird", "retain": ["crow", "owl"], "synonyms": ["kite"]}
WHOLE = {
    **CONCEPT,
    "templates": ["a photo of {o}", "{O}"],
    "anchor_templates": ["a photo of {o}", "{O}"],
    "others": [""],
}
PARTS = {"name": "two", "kind": "several"}
PARTS |= {"combined": [copy.deepcopy({**WHOLE, "name": name, "synonyms": []}) for name in ("kite", "heron")]}
RECIPE = {
    "model": "m.safetensors", "concept": CONCEPT, "method": "salun", "settings": {"lr": 1e-5, "steps": 5}, "seed": 3,
    "ema": True,
    "mask": {"kind": "salient", "sparsity": 0.5}, "data": {"forget": 4, "forget_images": "x"}, "notes": ["n"],
}  # fmt: skip
NAMED = {"model": "m", "concept": ["nudity", "style:Monet"], "method": "esd-x"}
UNLEARN = {
    "classifier": "resnet18-cifar=x.safetensors",
    "forget": "random:10%",
    "method": "salun",
    "settings": {"lr": 0.1},
}
UNLEARN |= {"mask": {"kind": "salient"}, "data": {"source": "folder:x"}, "seed": 1}
BENCHMARK = {
    "about": "b",
    "prompts": "p.csv",
    "metrics": ["clip_score"],
    "judges": ["nudenet"],
    "settings": {"steps": 3},
}
BENCHMARK |= {"forget": "all", "size": 64, "default_for": ["nudity"], "blur": True}
BESIDE = {"model": {"params": {"parameterization": "v", "zero_terminal_snr": True, "denoiser_config": {"params": {}}}}}
COLUMNS = (
    "prompt",
    "case_number",
    "evaluation_seed",
    "sd_guidance_scale",
    "width",
    "height",
    "class",
    "artist",
    "categories",
)


def _recipe(file: Path) -> object:
    found = make_recipe(read_recipe(file))
    public_recipe(yaml.safe_dump(found.to_dict()))
    return found.fingerprint()


def _concept(file: Path) -> object:
    found = find_concept(str(file))
    return found.to_dict(), found.forget_prompts, found.anchor_prompts, found.retain_prompts, found.replacement


def _prompts(file: Path) -> object:
    return read_prompts(file).stratified(2).case_numbers


# Masks, deltas and files of weights.
def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 1))


SHAPES = {name: list(value.shape) for name, value in _network().named_parameters()}
MASK = {
    "metadata": {"format": "erase-concept mask 1", "shapes": json.dumps(SHAPES), "concept": "x", "family": "sd1"},
    "tensors": {
        name: ["U8", [-(-int(np.prod(shape)) // 8)], -(-int(np.prod(shape)) // 8)] for name, shape in SHAPES.items()
    },
}
DELTA = {
    "metadata": {
        "format": "erase-concept delta 1", "shapes": json.dumps(SHAPES), "dtype": "float32",
        "base_unet_sha256": "0", "erased_unet_sha256": "1",
    },
    "tensors": {"0.weight:changed": ["U8", [2], 2], "0.weight:steps": ["I8", [3], 3], "0.weight:wide": ["I32", [1], 4]},
}  # fmt: skip
WEIGHTS = {
    "metadata": {"format": "pt", "modelspec.prediction_type": "v", "_quantization_metadata": '{"a": {"format": "x"}}'},
    "tensors": {
        "a.weight": ["F8_E4M3", [2, 2], 4], "a.weight_scale": ["F32", [2], 8], "a.bias": ["F16", [2], 4],
        "a.comfy_quant": ["U8", [4], 4], "b.weight": ["BF16", [2], 4], "b.input_scale": ["F32", [], 4],
    },
}  # fmt: skip
LORA = {"metadata": {"ss_network_dim": "4"}, "tensors": {"lora_unet_a.lora_down.weight": ["F16", [4, 2], 16]}}
LORA["tensors"] |= {"lora_unet_a.lora_up.weight": ["F16", [2, 4], 16], "lora_unet_a.alpha": ["F32", [], 4]}
CHECKPOINT = {
    "metadata": {},
    "tensors": {
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": ["F32", [7, 8], 224],
        "model.diffusion_model.input_blocks.0.0.weight": ["F32", [8, 4, 3, 3], 1152],
        "first_stage_model.decoder.conv_in.weight": ["F16", [8, 4, 3, 3], 576], "v_pred": ["F32", [0], 0],
    },
}  # fmt: skip


def _mask_seeds(folder: Path) -> list[bytes]:
    all_ones({name: tuple(shape) for name, shape in SHAPES.items()}).save(folder / "seed")
    return [(folder / "seed").read_bytes()]


def _mask(file: Path) -> object:
    found = Mask.load(file)
    found.overlap(found)
    return describe(found), found.sha256(), [found.dense(name).sum() for name in found.shapes]


def _delta_seeds(folder: Path) -> list[bytes]:
    base, erased = _network(), _network()
    with torch.no_grad():
        erased[0].weight[0, 0] = 1e30
        erased[0].weight[1] *= 1.001
    save_delta(base, erased, folder / "seed", {"concept": "x", "method": "salun"})
    return [(folder / "seed").read_bytes()]


def _delta(file: Path) -> object:
    network = _network()
    apply_delta(open_delta(file), network, transfer=True)
    return network


def _weights_seeds(folder: Path) -> list[bytes]:
    stored = {"a.weight": torch.ones(2, 2), "b.bias": torch.ones(2).half(), "lora_up.alpha": torch.ones(())}
    save_file(stored, folder / "seed", {"format": "pt"})
    return [(folder / "seed").read_bytes()]


def _weights(file: Path) -> object:
    tensors, metadata = read_tensors(file)
    return (
        read_prediction(file, tensors, metadata),
        [value.float().sum() for value in tensors.values()],
        read_dtypes(file),
    )


def _pickled(**options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(
        {"state_dict": {"a.weight": torch.ones(2, 2), "b": nn.Parameter(torch.ones(3))}, "epoch": 3}, stream, **options
    )
    return stream.getvalue()


def _pickles(folder: Path) -> list[bytes]:
    return [_pickled(), _pickled(_use_new_zipfile_serialization=False)]


def _checkpoint(file: Path) -> object:
    return [value.float().sum() for value in read_tensors(file)[0].values()]


# Models: the built-in one's folder, its weights by links.
def _builtin() -> Path:
    return next(iter(builtin_models().values())).folder


def _model(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        for file in _builtin().rglob("*"):
            copy = (
                folder.parent / file.relative_to(_builtin()) if "/" in name else folder / file.relative_to(_builtin())
            )
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                copy.symlink_to(file)
            elif file.is_file() and not copy.exists():
                shutil.copy(file, copy)
        return [(_builtin() / name).read_bytes()]

    return prepare


def _config(name: str) -> Any:
    return json.loads((_builtin() / name).read_text(encoding="utf-8"))


def _folder(file: Path) -> object:
    """Read the configurations, and load the model whenever that could still fail."""
    root = file.parent if file.name == "model_index.json" else file.parent.parent
    configs(root)
    return load(root)


# Folders of images and pictures.
def _two_pictures(folder: Path) -> list[bytes]:
    rows = [PromptRow("a", 0, object="x"), PromptRow("b", 1, category="y, z")]
    lines = []
    for place, row in enumerate(rows):
        file = folder / f"{place:05d}.png"
        Image.new("RGB", (8, 8), (place, 9, 9)).save(file)
        lines.append(manifest_line(file, row))
    (folder / MANIFEST).write_text("".join(lines))
    (folder / SETTINGS).write_text('{"steps": 1}')
    return ["".join(lines).encode()]


def _settings(folder: Path) -> list[bytes]:
    _two_pictures(folder)
    return [b'{"steps": 1}']


def _images(file: Path) -> object:
    found = match_images(file.parent, PromptSet("p", (PromptRow("a", 0), PromptRow("b", 1))))
    return found.arrays(), found.rows, [row.categories for row in found.rows]


@cache
def _pictures() -> tuple[bytes, ...]:
    found = []
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(stream, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found.append(stream.getvalue())
    for mode in ("P", "LA", "I;16", "CMYK"):
        stream = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).save(stream, "TIFF")
        found.append(stream.getvalue())
    return tuple(found)


def _picture(file: Path) -> object:
    picture_size(file)
    return read_picture(file)


def _bgr(file: Path) -> object:
    from erase_concept.eval.judges.opencv import read_bgr

    return read_bgr(file)


# Reports and runs.
_SCORE = Score("ua", "church", 0.9, 10, (0.7, 1.0), "fraction", "how | <b>", 0.1, (0.0, 0.3))
_REPORT = Report(
    concept="church", kind="object", anchor="dog", model="m", benchmark="b", erased={"unet": "0"}, base={"unet": "1"},
    scores=(_SCORE, Score("retained_cra", "all", 0.8, 9, (0.5, 1.0), "fraction", "p", 0.9, (0.7, 1.0))),
    charts=(Chart("c", "fraction", (Bar("x", 0.5, (0.1, 0.9), 0.6, (0.2, 1.0), 4), Bar("y", 0.1, forget=True))),),
    curves=(Curve("t", "x", "fraction", (0.1, 0.5), (0.9, 0.2), (1.0, 0.9), ((0.8, 1.0), (0.1, 0.3)), None, 0.3),),
    pairs=(Pair("a | b", 1, True, Path("00000.png"), "dog", Path("00001.png"), "church", True),),
    provenance={"versions": {"x": "1"}, "notes": ["a", {"b": [1, 2]}]},
)  # fmt: skip
REPORT = report_json(_REPORT)
RUN = {
    "base": {"source": "m", "unet": "0", "folder": "/x"}, "erased": {"unet": "1"}, "method": "salun", "concept": "x",
    "kind": "object", "anchor": "", "mask": {"kind": "salient", "sha256": "0", "density": 0.5}, "seed": 1,
    "checks": {"weights": 9, "changed": 3, "changed_outside_mask": 0}, "versions": {"torch": "2"}, "files": {"a": "0"},
    "earlier": [{"concept": WHOLE, "base": "m"}], "exports": [],
}  # fmt: skip
TRIAL = {
    "forget": "x",
    "method": "salun",
    "seed": 1,
    "multiplier": 1.0,
    "values": {"ua": 0.5},
    "seconds": 2.0,
    "key": "k",
}
DETECTIONS = {"image": "0" * 64, "model": "m", "detections": [["FEMALE_BREAST_EXPOSED", 0.5]]}


_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "a",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "nav",
        "ul",
        "li",
        "main",
    ),
    *(
        "section",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "bdi",
        "span",
        "b",
        "strong",
        "details",
        "summary",
    ),
    *("button", "figure", "figcaption", "img", "input", "svg", "line", "text", "polygon", "polyline", "circle", "g"),
    *(
        "dl",
        "dt",
        "dd",
        "pre",
        "br",
        "wbr",
        "script",
        "footer",
        "code",
        "noscript",
        "label",
        "select",
        "option",
        "ol",
        "link",
    ),
}


class _Page(html.parser.HTMLParser):
    """Fails for anything on a page that is alive and not the page's own."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in _TAGS, f"<{tag}> on the page"
        for name, value in attributes:
            assert not name.startswith("on"), f"{name} on the page"
            if name in ("src", "href", "data-clear", "action", "formaction", "xlink:href"):
                known = (value or "").startswith(("data:image/", "#")) or value == "data:,"
                assert known, f"{name}={value} on the page"


def _report(file: Path) -> object:
    report = read_report(file.parent)
    out = file.parent / "out"
    write_report(report, out)
    write_side_by_side({"a": report, "<b>": report}, out / "both")
    for folder in (out, out / "both"):
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert text.count("<script") == 1
        _Page().feed(text)
        lines = (folder / "report.md").read_text(encoding="utf-8").split("```json")[0].splitlines()
        assert not any(mark in line for line in lines for mark in ("<script", "<img", "http://", "](http"))
    return report


def _certificate_page(file: Path) -> object:
    text = records.page_of(file)
    assert text.count("<script") == 1
    _Page().feed(text)
    return text


def _run(file: Path) -> object:
    read_erased_run(file.parent)
    earlier_runs(str(file.parent))
    found = read_run(file.parent)
    return found["base"]["source"]


def _run_seeds(folder: Path) -> list[bytes]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    card(RUN, yaml.safe_dump(RECIPE), ())
    return [json.dumps(RUN).encode()]


# Classifiers and judges.
def _data() -> ImageData:
    images, labels = InMemory(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), torch.tensor([0, 1])
    return ImageData("d", images, labels, images, labels, ("a", "b"))


def _classifier_seeds(folder: Path) -> list[bytes]:
    network = build("resnet18-cifar[width=2]", 2, 3, 0)
    classifier = Classifier(
        "resnet18-cifar[width=2]", network, ("a", "b"), Normalisation((0.5,) * 3, (0.5,) * 3), 8, "", {}
    )
    classifier.save(folder)
    return [(folder / "classifier.json").read_bytes()]


CLASSIFIER = {"architecture": "resnet18-cifar[width=2]", "labels": ["a", "b"], "mean": [0.5] * 3, "std": [0.5] * 3}
CLASSIFIER |= {"size": 8, "data": {"source": "folder:x"}}


def _classifier(file: Path) -> object:
    recorded_data(str(file.parent))
    return load_classifier(str(file.parent), _data())


def _idx_file(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def _idx_seeds(folder: Path) -> list[bytes]:
    return [_idx_file(b"\0\0\x08\1\0\0\0\2ab")]


def _on_disk(file: Path) -> object:
    return OnDisk((file,), 8)[torch.tensor([0])]


def _vectors(folder: Path) -> list[bytes]:
    array = np.ones((2, 4), np.float32)
    return [pickle.dumps(array, 2), pickle.dumps(array, 5), pickle.dumps(array.tolist())]


def _picture_seeds(folder: Path) -> list[bytes]:
    return list(_pictures())


INDEX = _config("model_index.json")
READERS = (
    Reader("recipe", "recipe.yaml", _recipe, made.yaml_of(RECIPE, NAMED), _yaml(RECIPE, NAMED)),
    Reader("concept", "concept.yaml", _concept, made.yaml_of(CONCEPT, WHOLE, PARTS), _yaml(CONCEPT, WHOLE, PARTS)),
    Reader("benchmark", "b.yaml", lambda file: find_benchmark(str(file)), made.yaml_of(BENCHMARK), _yaml(BENCHMARK)),
    Reader(
        "setting", "value", lambda file: read_value(file.read_text("latin-1")), made.yaml_of([1], {"a": 2}), _yaml(1)
    ),
    Reader(
        "unlearn-recipe",
        "recipe.yaml",
        lambda file: make_unlearn_recipe(read_recipe(file)),
        made.yaml_of(UNLEARN),
        _yaml(UNLEARN),
    ),
    Reader("config-beside", "m.yaml", lambda file: read_prediction(file, [], {}), made.yaml_of(BESIDE), _yaml(BESIDE)),
    Reader("prompts", "p.csv", _prompts, made.csv_of(*COLUMNS), _texts('prompt,seed,width\na,1,64\n"b, c",2,64\n')),
    Reader("concept-csv", "p.csv", _concept, made.csv_of("prompt", "seed"), _texts("prompt\na church\n")),
    Reader("concept-txt", "p.txt", _concept, made.lines_of("a church"), _texts("a church\nb\n")),
    Reader("mask", "mask.safetensors", _mask, made.tensors_of(MASK), _mask_seeds),
    Reader("delta", "delta.safetensors", _delta, made.tensors_of(DELTA), _delta_seeds),
    Reader("safetensors", "m.safetensors", _weights, made.tensors_of(WEIGHTS, LORA, CHECKPOINT), _weights_seeds),
    Reader("pickle", "m.ckpt", _checkpoint, made.pickles(_pickled()), _pickles),
    Reader(
        "single-file",
        "m.safetensors",
        lambda file: configs(file),
        made.tensors_of(CHECKPOINT, LORA),
        _weights_seeds,
        0.05,
        accepts=False,
    ),
    Reader(
        "manifest",
        MANIFEST,
        _images,
        made.json_lines({"image": "00000.png", "sha256": "0", "prompt": "a", "seed": 0}),
        _two_pictures,
    ),
    Reader("sampling", SETTINGS, _images, made.json_of({"steps": 1, "guard": "x"}), _settings, 0.5),
    Reader("picture", "x.png", _picture, made.images(*_pictures()), _picture_seeds),
    Reader("picture-for-detectors", "x.png", _bgr, made.images(*_pictures()), _picture_seeds, 0.5),
    Reader("picture-for-classifiers", "x.png", _on_disk, made.images(*_pictures()), _picture_seeds, 0.5),
    Reader("report", "report.json", _report, made.json_of(REPORT), _document(REPORT), 0.1),
    Reader("run", "run.json", _run, made.json_of(RUN), _run_seeds),
    Reader(
        "trials",
        "trials.jsonl",
        lambda file: (read_results(file), read_trials(file, Trial)),
        made.json_lines(TRIAL),
        _document(TRIAL),
    ),
    Reader(
        "detections", "d.jsonl", lambda file: _read_cache(file, "m"), made.json_lines(DETECTIONS), _document(DETECTIONS)
    ),
    Reader("prompt-vectors", "p.p", read_prompt_vectors, made.pickles(*_vectors(Path())), _vectors),
    Reader("classifier", "classifier.json", _classifier, made.json_of(CLASSIFIER), _classifier_seeds, 0.1),
    Reader(
        "fashion-mnist",
        "x.gz",
        lambda file: _idx("x", file),
        made.packed(made.images(*_pictures()), _idx_file),
        _idx_seeds,
    ),
    Reader("model-index", "model_index.json", _folder, made.json_of(INDEX), _model("model_index.json"), 0.01),
    *(
        Reader(
            f"config-{part}" if "config" in name else name,
            f"model/{part}/{name}",
            _folder,
            made.json_of(_config(f"{part}/{name}")),
            _model(f"{part}/{name}"),
            0.01,
        )
        for part, name in (
            ("unet", "config.json"),
            ("text_encoder", "config.json"),
            ("vae", "config.json"),
            ("scheduler", "scheduler_config.json"),
            ("tokenizer", "tokenizer_config.json"),
            ("tokenizer", "tokenizer.json"),
        )
    ),
)
READERS += (
    Reader(
        "checkpoint",
        "last.safetensors",
        records.read_newest,
        made.packed(made.tensors_of(records.CHECKPOINT), records.with_checksum),
        records.checkpoint_seeds,
    ),
    Reader("log", "log.jsonl", records.read_log, made.json_lines(records.RECORD), records.log_seeds),
    Reader(
        "unlearned-run",
        "unlearn.json",
        records.read_unlearned,
        made.json_of(records.UNLEARN_INFO),
        records.unlearned_seeds,
        0.1,
    ),
    Reader("forgotten", "forget.txt", records.read_unlearned, made.lines_of("2", "0"), records.list_seeds, 0.1),
    Reader("indices", "rows.txt", records.read_indices, made.lines_of("0", "2"), _texts("0\n2\n")),
    Reader(
        "judgements",
        records.JUDGEMENTS,
        records.read_said,
        records.judgements_that_say(made.changed(records.SAID)),
        records.judgement_seeds,
    ),
    Reader(
        "certificate",
        "certificate.json",
        records.read_certified,
        made.json_of(records.CERTIFIED),
        records.certificate_seeds,
        0.5,
    ),
    Reader(
        "certificate-page",
        "certificate.json",
        _certificate_page,
        made.json_of(records.CERTIFIED),
        records.certificate_seeds,
        0.2,
    ),
    Reader("export", "m.safetensors", records.read_export, made.tensors_of(LORA, DELTA, WEIGHTS), _weights_seeds),
    Reader("public-key", "k.pem", read_public_key, made.lines_of(*records.KEY), _texts("\n".join(records.KEY) + "\n")),
    Reader("envelope", "c.dsse.json", records.read_envelope, made.json_of(records.ENVELOPE), records.envelope_seeds),
)
BY_NAME = {reader.name: reader for reader in READERS}
