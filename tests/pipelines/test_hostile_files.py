"""Files made to do harm: each guard has its right value, and nothing is run, filled or waited for."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erase_concept.cli.terminal import print_json, print_text, print_yaml
from erase_concept.errors import EraseError, RequestError, one_line
from erase_concept.eval.report.markdown import _cell
from erase_concept.eval.verify.exports import export_format
from erase_concept.eval.verify.findings import VerifyRequest
from erase_concept.eval.verify.run import _exports
from erase_concept.eval.verify.signature import read_private_key, read_public_key
from erase_concept.files import parse_json, parse_yaml
from erase_concept.model_card import _plain, card
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.classifiers.architectures import build
from erase_concept.pipelines.classifiers.classifier import Classifier, Normalisation
from erase_concept.pipelines.classifiers.images import ImageData, InMemory, OnDisk
from erase_concept.pipelines.classifiers.load import load_classifier
from erase_concept.pipelines.formats.pickles import check_plain_tensors
from erase_concept.pipelines.formats.tensors import read_shapes
from erase_concept.pipelines.formats.weights import read_tensors
from erase_concept.pipelines.image_set import MANIFEST, SETTINGS, manifest_line, read_images
from erase_concept.pipelines.load import configs, load
from erase_concept.pipelines.pictures import MOST_PIXELS, picture_size, read_picture
from erase_concept.prompts.concept import combine, parse
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.promptset import PromptRow, read_prompts, row_of
from erase_concept.run_folder import weights_files


def test_a_message_is_one_line_that_no_terminal_obeys() -> None:
    assert str(RequestError("a", "x\n\x1b[2Jy\u202e", "b")) == "a x \\x1b[2Jy\\u202e: b"
    assert one_line("95\u00a0% é 🪦 \u0301") == "95 % é 🪦 \u0301"
    assert len(str(RequestError("a", "x" * 10_000, "b"))) < 1020


def test_weights_that_hold_themselves_are_no_endless_way(tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    nested["state_dict"] = nested
    torch.save(nested, tmp_path / "x.ckpt")
    with pytest.raises(RequestError, match="nested too deeply"):
        read_tensors(tmp_path / "x.ckpt")
    torch.save({"model": {"module": {"state_dict": {"a": torch.ones(2)}}}}, tmp_path / "x.ckpt")
    assert read_tensors(tmp_path / "x.ckpt")[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.ones(1).expand(1 << 40), "is larger than what is stored of it"),
        (torch.empty(1 << 40, device="meta"), "is no dense tensor"),
        (torch.eye(3).to_sparse(), "is no dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of what sparse tensors will be
def test_a_small_pickle_makes_no_large_tensor(tmp_path: Path, tensor: torch.Tensor, problem: str) -> None:
    torch.save({"a": tensor}, tmp_path / "x.ckpt")
    with pytest.raises(RequestError, match=f"{problem}|damaged or no file"):
        read_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize("asked", [b"X\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f"], ids=["text", "number"])
def test_a_few_bytes_of_an_old_pickle_ask_for_no_memory(tmp_path: Path, asked: bytes) -> None:
    file = tmp_path / "m.ckpt"
    file.write_bytes(b"\x80\x02" + asked + b"abc")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="is damaged or no file of weights"):
            read_tensors(file)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_long_name_of_a_class_takes_no_time(tmp_path: Path, zipped: bool) -> None:
    """PyTorch takes time by the square of it to refuse it: 17 s for 40,000 letters."""
    file, pickled = tmp_path / "m.ckpt", b"\x80\x02cos." + b"m" * 1_000_000 + b"\nX\n."
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            for part, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"m/{part}", content)
    else:
        file.write_bytes(pickled)
    with pytest.raises(RequestError, match="a name that is too long"):
        read_tensors(file)


def test_tensors_have_no_more_bytes_than_their_file() -> None:
    shared = torch.ones(4)
    check_plain_tensors({"a": shared, "b": shared[1:]}, 16)  # two views of one storage
    with pytest.raises(ValueError, match="larger than the file"):
        check_plain_tensors({"a": shared, "b": shared.clone()}, 16)


def test_a_checkpoint_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(tmp_path / "x.ckpt", "w", 8) as bomb:
        for part in plain.namelist():
            bomb.writestr(part, plain.read(part))
    with pytest.raises(RequestError, match="parts are larger than the file"):
        read_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "said", [torch.tensor(1 << 40), torch.full((1 << 20,), 91, dtype=torch.uint8), torch.full((3000,), 91).byte()]
)
def test_what_a_layer_says_of_its_format_is_short(tmp_path: Path, said: torch.Tensor) -> None:
    """A single number would be taken for that many bytes, and 3,000 brackets for as many levels."""
    save_file({"a.comfy_quant": said}, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="its weights are quantised: an unknown format"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_scale_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(()).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.weight_scale": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="does not fit"):
        read_tensors(tmp_path / "x.safetensors")


# Models.
@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in model."""
    shutil.copytree(next(iter(builtin_models().values())).folder, tmp_path / "model")
    return tmp_path / "model"


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("scheduler", ["trap", "Scheduler"]),  # a file of this name is in the component's folder
        ("scheduler", ["os", "system"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("unet", ["trap_module", "UNet2DConditionModel"]),  # diffusers imports it, though the UNet is there already
        ("vae", "diffusers"),
    ],
)
def test_no_code_that_a_model_names_is_run(
    model: Path, part: str, line: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = f"from pathlib import Path\nPath({str(model / 'ran')!r}).touch()\nclass Scheduler: pass\n"
    if line[0] == "trap":
        (model / "scheduler" / "trap.py").write_text(trap)
    (model / "trap_module.py").write_text(trap)
    monkeypatch.setattr(sys, "path", [str(model), *sys.path])
    _edit(model / "model_index.json", **{part: line})
    for read in (configs, load):
        with pytest.raises(RequestError, match=r"code is not run|must be a library and a class|has no vae"):
            read(model)
    assert not (model / "ran").exists()
    assert "trap_module" not in sys.modules


def test_a_file_of_code_in_a_model_is_refused_by_name(model: Path) -> None:
    (model / "scheduler" / "diffusers.py").write_text("raise SystemExit")
    with pytest.raises(RequestError, match=r"holds scheduler/diffusers\.py, which is code"):
        load(model)


@pytest.mark.parametrize(
    ("file", "values", "problem"),
    [
        ("unet", {"layers_per_block": 10**6}, "layers"),
        ("unet", {"layers_per_block": 99, "transformer_layers_per_block": [[99, 1], 1]}, "layers"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "layers"),
        ("scheduler", {"num_train_timesteps": 10**6}, "num_train_timesteps"),
        ("unet", {"sample_size": [10**9]}, "larger than any number"),
        ("unet", {"norm_num_groups": 0}, "could not be loaded"),
        ("unet", {"block_out_channels": "x"}, "could not be loaded"),
        ("text_encoder", {"hidden_act": {"a": 1}}, "could not be loaded"),
    ],
)
def test_a_configuration_that_asks_for_too_much_is_refused(
    model: Path, file: str, values: dict[str, Any], problem: str
) -> None:
    _edit(model / file / ("scheduler_config.json" if file == "scheduler" else "config.json"), **values)
    with pytest.raises(RequestError, match=problem):
        load(model)


# Pictures.
def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


HOSTILE_PICTURES = {
    "large.png": (_png(MOST_PIXELS // 8, 9), "at most 67,108,864 are read"),
    "huge.png": (_png(2**31 - 1, 2**31 - 1), "no readable image"),
    "text.png": (_png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (8 << 20)))), "no readable image"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no readable image"),
    "x.jpg": (b"P6 9 9 255\n" + b"\0" * 243, "no readable image"),  # of a kind that is not asked for
}


@pytest.mark.parametrize("name", HOSTILE_PICTURES)
def test_pictures_that_fill_the_memory_or_are_programs_are_refused(tmp_path: Path, name: str) -> None:
    content, problem = HOSTILE_PICTURES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=problem):
        read_picture(tmp_path / name)
    with pytest.raises(RequestError, match=r"no readable image"):
        OnDisk((tmp_path / name,), 8)[torch.tensor([0])]


def test_a_picture_of_as_many_pixels_as_may_be_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erase_concept.pipelines.pictures.MOST_PIXELS", 64)
    for height, read in ((8, True), (9, False)):
        Image.new("RGB", (8, height)).save(tmp_path / "a.png")
        with nullcontext() if read else pytest.raises(RequestError, match="8 x 9 pixels; at most 64 are read"):
            assert picture_size(tmp_path / "a.png") == read_picture(tmp_path / "a.png").size == (8, 8)


# Prompts and manifests.
def test_sizes_and_lengths_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,width\na,16384\n")
    assert read_prompts(file).rows[0].width == 16384
    file.write_text("prompt,width\na,16392\n")
    with pytest.raises(RequestError, match="width must be 16,384 at most"):
        read_prompts(file)
    monkeypatch.setattr("erase_concept.prompts.promptset._MOST_ROWS", 2)
    file.write_text("prompt\na\nb\n")
    assert len(read_prompts(file).rows) == 2
    file.write_text("prompt\na\nb\nc\n")
    with pytest.raises(RequestError, match="one more than the 2 prompts"):
        read_prompts(file)


def test_a_row_has_values_of_its_own_types() -> None:
    assert row_of({"prompt": "a", "seed": 1, "case_number": 2}) == PromptRow("a", 1, case_number=2)
    for bad in (
        {"prompt": 1, "seed": 1},
        {"prompt": "a"},
        {"prompt": "a", "seed": "x"},
        {"prompt": "a", "seed": 1, "z": 1},
    ):
        with pytest.raises(ValueError, match=r"^(prompt|seed|z|a row): "):
            row_of(bad)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that lays a picture, settings, and a manifest with more lines into a folder."""

    def lay(manifest: str, settings: str = "{}") -> Path:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        text = manifest_line(tmp_path / "a.png", PromptRow("a", 0)) + manifest
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
        (tmp_path / SETTINGS).write_text(settings)
        return tmp_path

    return lay


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "..", "a/b.png", "9" * 5000, "", "x\x00y"])
def test_no_image_outside_its_folder_is_read(folder: Callable[[str], Path], name: str) -> None:
    line = json.dumps({"image": name, "sha256": "0", "prompt": "b", "seed": 1})
    where = folder(line)
    if name in ("..", "", "x\x00y"):
        with pytest.raises(RequestError, match="missing or differs"):
            read_images(where)
    else:
        assert [file.name for file in read_images(where).files] == ["a.png"]


def test_a_manifest_of_other_values_is_refused(folder: Callable[..., Path]) -> None:
    where = folder("[" * 2000 + "\n")  # no line, as one that was cut
    assert len(read_images(where).rows) == 1
    for settings in ("[]", "[" * 2000, '{"a": NaN}', "{"):
        with pytest.raises(RequestError, match="not as 'sample' writes it"):
            read_images(folder("", settings))
    (where / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match=r"manifest\.jsonl: is no text in UTF-8"):
        read_images(where)


# Classifiers.
def test_a_classifier_names_no_program_of_its_own_and_no_larger_network(tmp_path: Path) -> None:
    images, labels = InMemory(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), torch.tensor([0, 1])
    data = ImageData("d", images, labels, images, labels, ("a", "b"))
    name = "resnet18-cifar[width=2]"
    Classifier(name, build(name, 2, 3, 0), ("a", "b"), Normalisation((0.5,) * 3, (0.5,) * 3), 8, "", {}).save(tmp_path)
    assert load_classifier(str(tmp_path), data).labels == ("a", "b")
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "net.pt"))
    for architecture, problem in (
        (f"torchscript:{tmp_path / 'net.pt'}", "comes with a program, net.pt, which is not run"),
        ("resnet18-cifar[width=9999]", "has more weights than"),
        ("resnet18-cifar[width=²]", "is no option"),
    ):
        _edit(tmp_path / "classifier.json", architecture=architecture)
        with pytest.raises((RequestError, EraseError), match=problem):
            load_classifier(str(tmp_path), data)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
@pytest.mark.parametrize("name", ["c.yaml", "c.txt", "c.csv"])
def test_a_pipe_in_the_place_of_a_concept_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(RequestError, match="is no regular file"):
        find_concept(str(tmp_path / name))


@pytest.mark.parametrize("number", ["1" + ":1" * 200_000, "0x" + "f" * 5000, "9" * 101, "!!int '1" + ":1" * 200 + "'"])
def test_no_number_takes_long_or_has_no_digits(number: str) -> None:
    with pytest.raises(ValueError, match=r"too long|more than 100 digits"):
        parse_yaml(f"seed: {number}")
    assert parse_yaml("seed: 1:30") == {"seed": 90}
    assert parse_json("9" * 100) == int("9" * 100)


def test_a_csv_file_of_one_line_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("wb") as stream:
        stream.truncate(10 << 30)  # it has no blocks
    with pytest.raises(RequestError, match="a row has more than 4,194,304 characters"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("prompt\n" + '"a\n' + "b\n" * 3_000_000)  # a quote that is never closed
    with pytest.raises(RequestError, match=r"line 2: a value of more than 131,072 characters"):
        read_prompts(tmp_path / "p.csv")


def test_names_and_templates_do_not_multiply_without_end() -> None:
    described = {"name": "a", "kind": "object", "anchor": "b", "retain": ["c"], "templates": ["{O}"]}
    many = [f"{{O}} {number}" for number in range(1000)]
    assert len(parse({**described, "templates": many, "synonyms": many[:97]}).forget_prompts) == 98_000
    with pytest.raises(ValueError, match=r"names and templates make 101,000"):
        parse({**described, "templates": many, "synonyms": many[:99]})
    with pytest.raises(ValueError, match="at most 67,108,864 characters together"):
        parse({**described, "name": "a" * 10_000, "templates": ["{o}" * 4000]})


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "precompiled_charsmap"),
        ("decoder", {"type": "Sequence", "decoders": [{"precompiled_charsmap": ""}]}, "precompiled_charsmap"),
        ("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b"}, "no byte-pair encoding"),
        ("model", [], "no byte-pair encoding"),
    ],
)
def test_a_tokenizer_that_would_panic_is_refused(model: Path, key: str, value: Any, problem: str) -> None:
    file = model / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(RequestError, match=problem):
        load(model)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_a_pipe_in_the_place_of_an_export_or_a_key_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="no export that can be read: is no regular file"):
        export_format(tmp_path / "x.safetensors")
    assert weights_files(tmp_path) == {}
    pytest.importorskip("cryptography")
    for read in (read_private_key, read_public_key):
        with pytest.raises(RequestError, match="is no regular file"):
            read(tmp_path / "x.safetensors")


def test_a_run_names_no_device_as_its_export(tmp_path: Path) -> None:
    (tmp_path / "a.delta").touch()
    exports = [{"file": name, "sha256": "0"} for name in ("/dev/zero", "a.delta")]
    found = _exports(VerifyRequest(tmp_path), tmp_path, {"exports": exports})
    assert [path for _, path in found] == [None, tmp_path / "a.delta"]


def test_no_name_is_a_link_in_a_card_or_report() -> None:
    hostile = "https://a.example www.b.example me@c.example <i>\x1b[2J\u202e ~~x~~ [y](z)"
    for told in (_plain(hostile), _cell(hostile)):
        assert not re.search(r"://|www\.|(?<!\\)[\[\]~]|[a-z]@|\x1b|\u202e", told)
        assert "<i>" not in told
    assert _plain("café, 50 % off") == _cell("café, 50 % off") == "café, 50 % off"


def test_nothing_in_a_record_is_alive_in_its_card() -> None:
    """Each value of the record in turn, also those that stand there as code."""
    hostile = "<b>`\n| x |\n# y"
    record: dict[str, Any] = {
        "base": {"source": "m", "unet": "0", "family": "f"}, "erased": {"unet": "1"}, "method": "m", "concept": "x",
        "kind": "object", "anchor": "y", "mask": {"kind": "salient", "sha256": "0", "density": 0.5}, "seed": 1,
        "checks": {"weights": 9, "changed": 3, "changed_outside_mask": 0}, "versions": {"torch": "2"},
        "files": {"a": "0"},
    }  # fmt: skip
    lines = card(record, "", ()).count("\n")
    texts = [(key, "") for key, value in record.items() if isinstance(value, str)]
    texts += [(key, part) for key in ("base", "erased", "mask", "versions", "files") for part in record[key]]
    for key, part in texts:
        if part == "density":
            continue
        told = card(record | {key: record[key] | {part: hostile} if part else hostile}, "", ())
        assert told.count("\n") == lines, (key, part)
        assert "<b>`" not in told, (key, part)


def test_what_is_printed_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"a": "\x1b[2J\x9b2J\u202e\U000e0001 é 🪦"}
    print_json(hostile)
    told = capsys.readouterr().out
    assert json.loads(told) == hostile
    print_yaml(hostile)
    assert parse_yaml(capsys.readouterr().out) == hostile
    print_text("x\x9by\nz\u202e")
    assert capsys.readouterr().out == "x\\u009by\nz\\u202e"
    assert not {"\x1b", "\x9b", "\u202e"} & set(told)
    assert "é 🪦" in told


def test_the_time_of_many_names_does_not_multiply(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"{'a' * 100} {number}" for number in range(20_000)))
    began = time.process_time()
    assert len(find_concept(str(tmp_path / "p.txt")).names) == 20_000
    assert len(find_concept([f"object:thing {number}" for number in range(100)]).parts) == 100
    assert time.process_time() - began < 5
    with pytest.raises(RequestError, match="at most 1,000 are erased together"):
        combine([find_concept("church")] * 1001)


@pytest.mark.parametrize("shape", [[0, 1 << 60, 1 << 60], [10**99, 0], [1 << 48]])
def test_no_shape_is_larger_than_a_number_beside_a_nought(shape: list[int]) -> None:
    with pytest.raises(ValueError, match="a has no shape"):
        read_shapes(json.dumps({"a": shape}))
    assert read_shapes('{"a": [0, 4], "b": []}') == {"a": (0, 4), "b": ()}
