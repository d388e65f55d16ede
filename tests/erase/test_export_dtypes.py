"""Rounding: how much of an erasure each dtype keeps is told, and a file without any of it is not written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase_concept.cli import main as cli
from erase_concept.errors import RequestError
from erase_concept.exports import export
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.run_folder import read_run

UNET = "model.diffusion_model."


def erased_from_file(
    tiny: Diffusion, square: Concept, dtype: torch.dtype, lr: float, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Erase from a single file whose UNet has a dtype, and all else fp16, with a learning rate."""
    monkeypatch.chdir(folder)
    file = Path("base.safetensors")
    save_pipeline(tiny, file.with_suffix(""))
    save_original(tiny, file, torch.float16, {})
    tensors = load_file(file)
    save_file({key: v.to(dtype) if key.startswith(UNET) else v for key, v in tensors.items()}, file)
    settings = {"steps": 2, "batch_size": 2, "lr": lr, "max_retain_change": 0}
    values = {"settings": settings, "data": {"forget": 2, "retain": 2, "steps": 2}}
    list(iter_erase(make_recipe({"model": str(file), "concept": square, **values}), Path("run")))


def kept(dtype: torch.dtype) -> float:
    """The share of changed weights that differ in a dtype, from the two models themselves."""
    base, erased = (load(name).unet.state_dict() for name in ("base.safetensors", "run"))
    changed = sum(int((base[name] != value).sum()) for name, value in erased.items())
    left = sum(int((base[n].to(dtype).float() != v.to(dtype).float()).sum()) for n, v in erased.items())
    return left / changed


def test_a_gentle_erasing_from_fp8_survives_as_far_as_is_told(
    tiny: Diffusion,
    square: Concept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    erased_from_file(tiny, square, torch.float8_e4m3fn, 1e-5, monkeypatch, tmp_path)
    checks = read_run("run")["checks"]
    for name, count in checks["surviving"].items():
        assert count / checks["changed"] == kept(getattr(torch, name)), name
    assert checks["surviving"]["float8_e4m3fn"] == 0
    before = Path("run/run.json").read_bytes()
    for arguments in ([], ["--dtype", "fp16"]):
        monkeypatch.setattr(
            sys, "argv", ["erase-concept", "export", "run", "-f", "single-file", "-o", "a.safetensors", *arguments]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        if not arguments:  # in the file's own dtype
            problem = (
                "--dtype float8_e4m3fn: rounded to it, no weight differs from those of base: nothing would be erased"
            )
            assert (end.value.code, out) == (2, "")
            assert problem in err
            assert not Path("a.safetensors").exists()
            assert Path("run/run.json").read_bytes() == before
    share = kept(torch.float16)
    assert 0 < share < 1
    assert "single-file (float16) -> a.safetensors" in out
    assert f"{share:.1%} of the changed weights still differ from the base model's in this dtype." in out
    assert {value.dtype for value in load_file("a.safetensors").values()} == {torch.float16}
    whole = export("run", "b.safetensors", "single-file", dtype="fp32")
    assert (whole.surviving, whole.dtype) == (1.0, "float32")


def test_a_copy_keeps_its_dtypes_and_says_what_it_holds(
    tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erased_from_file(tiny, square, torch.float8_e4m3fn, 0.1, monkeypatch, tmp_path)
    done = export("run", "a.safetensors", "single-file")
    assert done.surviving == kept(torch.float8_e4m3fn) > 0
    assert done.dtype == "float16, float8_e4m3fn"
    assert json.loads(Path("run/run.json").read_text())["exports"][0]["dtype"] == done.dtype
    tensors = load_file("a.safetensors")
    assert {v.dtype for key, v in tensors.items() if key.startswith(UNET)} == {torch.float8_e4m3fn}
    with safe_open("a.safetensors", "pt") as stored:
        about = stored.metadata()
    Path("base").rename("a")
    assert about["erased_unet_sha256"] == weights_hash(load("a.safetensors").unet.to(torch.float8_e4m3fn))
    assert about["base_unet_sha256"] == read_run("run")["base"]["unet"]


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_copy_takes_no_part_that_changed_since_the_run(
    tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    erased_from_file(tiny, square, torch.float16, 0.1, monkeypatch, tmp_path)
    export("run", "a.safetensors", "single-file", dtype=dtype)
    tensors = load_file("base.safetensors")
    tensors["first_stage_model.decoder.conv_out.bias"] += 0.5
    save_file(tensors, "base.safetensors")
    with pytest.raises(RequestError, match=r"the vae of its base model \S*base\.safetensors has changed since"):
        export("run", "b.safetensors", "single-file", dtype=dtype)
    assert not Path("b.safetensors").exists()


@pytest.mark.parametrize("format", ["unet", "diffusers", "delta"])
def test_a_dtype_in_which_nothing_is_left_is_refused_before_any_work(
    tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    run = tmp_path / "run"
    (run / "pipeline").mkdir(parents=True)
    checks = {"weights": 100, "changed": 50, "surviving": {"float16": 3, "bfloat16": 0}}
    info = {
        "method": "salun",
        "concept": "square",
        "base": {"source": "base", "unet": "0"},
        "erased": {"unet": "0"},
        "checks": checks,
        "mask": None,
    }
    (run / "run.json").write_text(json.dumps(info))
    problem = "dtype bf16: rounds all 50 changed weights back to the base model's: nothing would be erased"
    with pytest.raises(RequestError, match=problem):
        export(run, tmp_path / ("a" if format == "diffusers" else "a.safetensors"), format, dtype="bf16")
