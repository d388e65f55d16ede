"""Checkpoints as people have them: scaled fp8, pickles of trainers, files that are something else, broken weights."""

from __future__ import annotations

import collections
import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.formats import weights
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.weights import each_tensor, read_tensors
from erase_concept.pipelines.image_set import check_drawn
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import Sampling, iter_sample
from erase_concept.prompts.promptset import PromptRow, PromptSet
from erase_concept.run_folder import base_source

FP8 = torch.float8_e4m3fn
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Callback:
    """A class that only the trainer knows."""

    def __init__(self) -> None:
        self.best = 0.5


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1)])
def test_scaled_fp8_weights_are_multiplied_by_their_scales(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    scale = torch.linspace(0.25, 1, 3).reshape(shape) / 448 if 3 in shape else torch.full(shape, 0.25 / 448)
    stored = {"a.weight": torch.full((3, 4), 448.0).to(FP8), "a.bias": torch.ones(3), f"a.{name}": scale}
    extra = {"scaled_fp8": torch.empty(2, dtype=FP8), "a.scale_input": torch.ones(1), "a.input_scale": torch.ones(1)}
    save_file(stored | extra, tmp_path / "x.safetensors")
    found, _ = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == {"a.weight", "a.bias"}
    expected = torch.linspace(0.25, 1, 3)[:, None].expand(3, 4) if 3 in shape else torch.full((3, 4), 0.25)
    torch.testing.assert_close(found["a.weight"], expected)


def test_fp8_scales_of_blocks(tmp_path: Path) -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({"a.weight": torch.ones(130, 200).to(FP8), "a.weight_scale_inv": scale}, tmp_path / "x.safetensors")
    found = read_tensors(tmp_path / "x.safetensors")[0]["a.weight"]
    assert found.shape == (130, 200)
    assert [found[0, 0], found[0, 128], found[129, 127], found[129, 199]] == [1, 2, 3, 4]


def test_plain_fp8_stays_as_it_is(tmp_path: Path) -> None:
    stored = {"a.weight": torch.full((2, 2), 0.5).to(FP8), "logit_scale": torch.ones(())}
    save_file(stored, tmp_path / "x.safetensors")
    found, _ = read_tensors(tmp_path / "x.safetensors")
    assert found["a.weight"].dtype == FP8
    assert found.keys() == stored.keys()


INT8, PACKED = torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8)
KINDS = {
    "int8": ({"a.weight": INT8}, "int8"),
    "bitsandbytes int8": ({"a.weight": INT8, "a.SCB": torch.ones(2)}, "int8 of bitsandbytes"),
    "nf4": (
        {
            "a.weight": PACKED,
            "a.weight.absmax": torch.ones(2),
            "a.weight.quant_state.bitsandbytes__nf4": PACKED.clone(),
        },
        "nf4 of bitsandbytes",
    ),
    "gptq": ({"a.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "packed integers of GPTQ"),
    "comfy": (
        {"a.weight": INT8, "a.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)},
        "int8_tensorwise",
    ),
    "nvfp4": ({"a.weight": PACKED, "a.weight_scale_2": torch.ones(1)}, "nvfp4"),
}


@pytest.mark.parametrize("case", KINDS)
def test_other_quantised_weights_are_refused_by_their_kind(tmp_path: Path, case: str) -> None:
    tensors, kind = KINDS[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match=f"its weights are quantised: {kind}"):
        read_tensors(tmp_path / "x.safetensors")


def test_unknown_scales_are_refused(tmp_path: Path) -> None:
    fp8 = torch.ones(2, 2).to(FP8)
    for scales, problem in (
        ({"a.weight.scale": torch.ones(1)}, "a.weight.scale is no scale that is known here"),
        ({"a.pre_quant_scale": torch.ones(2)}, "a.pre_quant_scale is no scale that is known here"),
        ({"a.weight_scale": torch.ones(7)}, r"a.weight_scale \[7\] does not fit a.weight \[2, 2\]"),
    ):
        save_file({"a.weight": fp8, **scales}, tmp_path / "x.safetensors")
        with pytest.raises(RequestError, match=problem):
            read_tensors(tmp_path / "x.safetensors")
    layers = {METADATA: json.dumps({"layers": {"a": {"format": "mxfp8"}}})}
    save_file({"a.weight": fp8}, tmp_path / "x.safetensors", layers)
    with pytest.raises(RequestError, match="quantised: mxfp8"):
        read_tensors(tmp_path / "x.safetensors")


METADATA = "_quantization_metadata"
ZIPPED = [True, False]


@pytest.mark.parametrize("zipped", ZIPPED)
def test_a_trainers_objects_are_passed_over(tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float16)}
    content = {
        "epoch": np.float64(3),
        "callbacks": {Callback: Callback(), "paths": [tmp_path]},
        "counts": collections.Counter("aab"),
        "state_dict": {"state_dict": state},
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    found, _ = read_tensors(tmp_path / "x.ckpt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


class Trap:
    """Would run a function of Python's when it is unpickled as usual."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.made


def touch(file: str) -> None:
    Path(file).touch()


@pytest.mark.parametrize("zipped", ZIPPED)
@pytest.mark.parametrize("function", [exec, eval])
def test_functions_of_pythons_are_refused(tmp_path: Path, function: Callable[..., object], zipped: bool) -> None:
    ran = f"open({str(tmp_path / 'ran')!r}, 'w')"
    content = {"state_dict": {"a": torch.ones(1)}, "x": Trap(function, ran)}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RequestError, match=r"asks for \S+, which is no tensor; code in a file is not run"):
        read_tensors(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_function_of_unknown_code_is_not_run(tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.ones(1)}, "x": Trap(touch, str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "x.ckpt")
    assert read_tensors(tmp_path / "x.ckpt")[0].keys() == {"a"}
    assert not (tmp_path / "ran").exists()


def test_a_file_is_told_what_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    safe, pickled = (tmp_path / "a.safetensors").read_bytes(), (tmp_path / "a.ckpt").read_bytes()
    both = [
        (b"GGUF\x03\0\0\0", "is a GGUF file, whose weights are quantised"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
    ]
    cases = [(suffix, *one) for one in both for suffix in (".safetensors", ".ckpt")]
    cases += [
        (".safetensors", pickled, "is a pickle under the name of a .safetensors; rename it to .ckpt"),
        (".ckpt", safe, "is a safetensors file under the name of a .ckpt; rename it to .safetensors"),
    ]
    for suffix, content, problem in cases:
        (tmp_path / f"x{suffix}").write_bytes(content)
        with pytest.raises(RequestError, match=problem):
            read_tensors(tmp_path / f"x{suffix}")
    (tmp_path / "A.SAFETENSORS").write_bytes(safe)
    assert read_tensors(tmp_path / "A.SAFETENSORS")[0].keys() == {"a"}


@pytest.mark.parametrize("length", [640, 1152, 640 + 65536])
def test_a_header_of_any_length_is_no_pickle(length: int, tmp_path: Path) -> None:
    """Its length, the file's first bytes, is 80 02 or 80 04 here, as a pickle begins."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file, {"note": ""})
    own = int.from_bytes(file.read_bytes()[:8], "little")
    save_file({"a": torch.ones(1)}, file, {"note": "x" * (length - own)})
    assert file.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    assert read_tensors(file)[0].keys() == {"a"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tiny: Diffusion, tmp_path: Path, part: str, value: float) -> None:
    name, weight = next(iter(tiny.modules[part].named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] = value
    for model in (tiny.pipeline(), _saved(tiny, tmp_path)):
        with pytest.raises(RequestError, match=rf"{part}: (text_model\.)?{name} holds NaN or infinity"):
            load(model)


def _saved(model: Diffusion, folder: Path) -> Path:
    save_pipeline(model, folder / "model")
    return folder / "model"


def test_a_pickle_of_pickles_own_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RequestError, match="is damaged or no file of weights"):
        read_tensors(tmp_path / "x.ckpt")


def test_a_folder_whose_parts_differ_in_variant_and_whose_unused_parts_are_gone(
    tiny: Diffusion, tmp_path: Path
) -> None:
    folder = _saved(tiny, tmp_path)
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.SAFETENSORS")
    index = json.loads((folder / "model_index.json").read_text())
    gone = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | gone | {"requires_safety_checker": True}))
    found = load(folder)
    assert {part: weights_hash(module) for part, module in found.modules.items()} == {
        part: weights_hash(module) for part, module in tiny.modules.items()
    }


def test_a_model_that_draws_one_colour_or_nan_is_a_failure(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("two", (PromptRow("a", 1), PromptRow("b", 2)))
    out, vae = tmp_path / "flat", tiny.vae.decoder.conv_out
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    with torch.no_grad():
        for value in vae.parameters():
            value.zero_()
    for _ in range(2):  # the images that are there already are no better
        with pytest.raises(EraseError, match="every image is of one colour"):
            list(iter_sample(tiny, prompts, out, Sampling(steps=1)))
    vae.load_state_dict(weights)
    list(iter_sample(tiny, prompts, tmp_path / "drawn", Sampling(steps=1)))
    for part, module in (("the model gives NaN", tiny.unet), ("the VAE gives NaN", tiny.vae)):
        broken = copy.deepcopy(tiny)
        own = broken.unet if module is tiny.unet else broken.vae.decoder
        with torch.no_grad():
            own.conv_out.bias[0] = float("nan")
        with pytest.raises(EraseError, match=part):
            list(iter_sample(broken, prompts, tmp_path / "nan", Sampling(steps=1)))
        shutil.rmtree(tmp_path / "nan")


def test_one_colour_earns_no_verdict(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (4, 4), "black").save(tmp_path / name)
    with pytest.raises(EraseError, match="every image is of one colour"):
        check_drawn(sorted(tmp_path.iterdir()))
    image = Image.new("RGB", (4, 4), "black")
    image.putpixel((3, 3), (1, 0, 0))
    image.save(tmp_path / "1.png")
    check_drawn(sorted(tmp_path.iterdir()))


def test_a_relative_base_is_found_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    run_info = {"base": {"source": "m.safetensors", "folder": str(tmp_path)}}
    assert base_source(run_info) == str(tmp_path / "m.safetensors")
    assert base_source({"base": {"source": "owner/name"}}) == "owner/name"
    assert base_source({"base": {"source": "gone.ckpt", "folder": str(tmp_path)}}) == "gone.ckpt"


def test_a_file_is_mapped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor comes once and unchanged, and no two pieces share memory."""
    tensors = {f"{i}": torch.full((i + 1, 8), float(i)) for i in range(5)} | {"empty": torch.empty(0)}
    save_file(tensors, tmp_path / "x.safetensors", {"title": "x"})
    monkeypatch.setattr(weights, "_MAPPED", 100)
    found = list(each_tensor(tmp_path / "x.safetensors"))
    assert sorted(name for name, _ in found) == sorted(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in found)
    assert len({value.untyped_storage().data_ptr() for _, value in found if value.numel()}) > 2
    assert read_tensors(tmp_path / "x.safetensors")[1]["title"] == "x"
