"""Prediction type and zero terminal SNR: every mark in use is read, written, and believed only where it is clear."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase_concept.errors import RequestError
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.modelspec import kohya_base, model_name, modelspec
from erase_concept.pipelines.formats.prediction import Prediction, prediction_of, read_prediction
from erase_concept.pipelines.formats.single_file import save_original, single_file_configs
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import make_scheduler

V, ZERO = Prediction("v_prediction"), Prediction("v_prediction", zero_snr=True)
SPEC = "modelspec.prediction_type"
SAID = {
    "nothing": ([], {}, None, Prediction()),
    "key": (["v_pred"], {}, None, V),
    "both keys": (["v_pred", "ztsnr"], {}, None, ZERO),
    "zero alone": (["ztsnr"], {}, None, Prediction()),  # as ComfyUI, which looks at it beside v_pred alone
    "modelspec": ([], {SPEC: "v"}, None, V),
    "long": ([], {SPEC: "v_prediction"}, None, V),
    "epsilon": ([], {SPEC: "epsilon"}, None, Prediction("epsilon")),
    "architecture": ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, V),
    "metadata and key": (["ztsnr"], {SPEC: "v"}, None, ZERO),
    "yaml": ([], {}, "model: {params: {parameterization: v}}", V),
    "yaml first": (["v_pred"], {SPEC: "v"}, "model: {params: {parameterization: eps}}", Prediction("epsilon")),
    "yaml zero": ([], {}, "model: {params: {parameterization: v, zero_terminal_snr: true}}", ZERO),
    "sgm": (
        [],
        {},
        "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.modules.VScaling}}}}}",
        V,
    ),
}
WRONG = {
    "contradiction": (["v_pred"], {SPEC: "epsilon"}, None, "marks contradict each other"),
    "unknown": ([], {SPEC: "sample"}, None, "allowed: epsilon, v"),
    "edm": (["edm_mean", "edm_std"], {}, None, "an EDM model"),
    "noise": (["ztsnr"], {SPEC: "epsilon"}, None, "zero SNR needs v_prediction"),
    "yaml": ([], {}, "just text", "no configuration of a model"),
}


def file_with(tmp_path: Path, beside: str | None) -> Path:
    if beside is not None:
        (tmp_path / "m.yaml").write_text(beside)
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("case", SAID)
def test_every_mark_is_read(tmp_path: Path, case: str) -> None:
    keys, metadata, beside, expected = SAID[case]
    assert read_prediction(file_with(tmp_path, beside), keys, metadata) == expected


@pytest.mark.parametrize("case", WRONG)
def test_marks_that_cannot_be_believed_are_refused(tmp_path: Path, case: str) -> None:
    keys, metadata, beside, problem = WRONG[case]
    with pytest.raises(RequestError, match=problem):
        read_prediction(file_with(tmp_path, beside), keys, metadata)


@pytest.mark.parametrize("zero", [False, True])
def test_a_velocity_model_of_every_family_comes_back_as_one(family: Diffusion, tmp_path: Path, zero: bool) -> None:
    model = family.with_components(scheduler=DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero))
    file = tmp_path / "m.safetensors"
    save_original(model, file, torch.float32, {})
    scheduler = DDIMScheduler.from_config(single_file_configs(file, "m")[1]["scheduler"])
    assert scheduler.config.prediction_type == "v_prediction"
    assert (float(scheduler.alphas_cumprod[-1]) == 0) == zero
    assert {"v_pred", *(["ztsnr"] if zero else [])} == load_file(file).keys() & {"v_pred", "ztsnr"}
    with safe_open(file, "pt") as stored:
        assert stored.metadata()[SPEC] == "v"


def test_marks_that_contradict_the_folder_of_the_name_are_refused(tiny: Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_original(tiny, file, torch.float32, {})
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    save_pipeline(tiny, tmp_path / "m")
    with pytest.raises(RequestError, match=r"is marked as v_prediction, but .*scheduler says epsilon"):
        single_file_configs(file, "m")


def test_the_metadata_are_the_files_own_and_its_hash_is_true(tiny: Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    told = modelspec(tiny.family, Prediction("epsilon"), 512, title="m without x", description="d", base="m")
    save_original(tiny, file, torch.float16, told)
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    source = tiny.with_components()
    erased = tmp_path / "e.safetensors"
    object.__setattr__(source, "source", str(file))
    save_original(source, erased, None, {"concept": "x"})
    with safe_open(file, "pt") as first, safe_open(erased, "pt") as second:
        about, other = first.metadata(), second.metadata()
    assert about["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
    assert about["modelspec.architecture"] == "stable-diffusion-v1"
    assert (about["modelspec.resolution"], about["modelspec.merged_from"]) == ("512x512", "m")
    assert {key for key in other if key.startswith("modelspec.")} == {SPEC}


def test_names_leave_this_machines_folders_out() -> None:
    assert model_name("/home/me/models/sd15.safetensors") == "sd15"
    assert model_name(r"C:\models\sd15.ckpt") == "sd15"
    assert model_name("owner/model") == "owner/model"
    assert model_name("../up/model/") == "model"


def test_a_lora_names_its_base_as_kohya_does() -> None:
    for name, version in (("sd1", "sd_v1"), ("sd2", "sd_v2"), ("sdxl", "sdxl_base_v1-0")):
        record = FAMILIES.find(name)
        assert kohya_base(record, Prediction("epsilon"))["ss_base_model_version"] == version
        velocity = version + "_v" if name != "sdxl" else version
        assert kohya_base(record, V)["ss_base_model_version"] == velocity


def test_a_folder_with_a_scheduler_without_zero_snr_is_still_one_with_it(tiny: Diffusion, tmp_path: Path) -> None:
    """PNDM and others keep the option in their configuration, and their noise schedule as it was."""
    options = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    save_pipeline(tiny.with_components(scheduler=PNDMScheduler(**options)), tmp_path / "m")
    assert isinstance(load(tmp_path / "m").scheduler, PNDMScheduler)
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    loaded = load(tmp_path / "m")
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(loaded.add_noise(latents, noise, torch.tensor([999, 999])), noise)
    with silence_hub_logs():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    for model in (loaded, Diffusion.from_pipeline(pipeline)):
        assert prediction_of(model.scheduler) == ZERO
        assert float(model.scheduler.alphas_cumprod[-1]) == 0
    save_original(loaded, tmp_path / "m.safetensors", None, {})
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "m.safetensors").keys()
    assert float(make_scheduler(loaded, None, 5).alphas_cumprod[-1]) < 1e-6
    with pytest.raises(
        RequestError, match=r"PNDMScheduler: has no zero terminal SNR, which this model needs; allowed: D"
    ):
        make_scheduler(loaded, "PNDMScheduler", 5)
