"""Loading: everything or a clear error. Saving: what other people's loaders open."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from erase_concept.errors import EraseError, RequestError
from erase_concept.model_card import card
from erase_concept.pipelines.formats.folder import save_pipeline, save_unet
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.load import configs, load
from erase_concept.pipelines.model import Diffusion, weights_hash

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny: Diffusion, tmp_path: Path) -> Path:
    save_pipeline(tiny, tmp_path / "model")
    return tmp_path / "model"


def test_comes_back_bit_for_bit(tiny: Diffusion, folder: Path) -> None:
    back = load(folder)
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(back, part)) == weights_hash(getattr(tiny, part))
    assert torch.equal(back.encode_prompts(["a church"]), tiny.encode_prompts(["a church"]))
    assert not any(p.requires_grad for p in back.unet.parameters())
    assert load(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_every_family_comes_back_bit_for_bit(family: Diffusion, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model")
    back = load(tmp_path / "model")
    assert weights_hash(back.unet) == weights_hash(family.unet)
    assert back.text_encoders.keys() == family.text_encoders.keys()
    assert torch.equal(back.encode_prompts(["a church"]), family.encode_prompts(["a church"]))
    assert torch.equal(back.encode_uncond(), family.encode_uncond())
    assert back.scheduler.config.prediction_type == family.scheduler.config.prediction_type


def test_says_what_was_loaded(family: Diffusion, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model")
    words = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
    assert load(tmp_path / "model").describe() == {
        "source": str(tmp_path / "model"),
        "unet": weights_hash(family.unet),
        "family": words[family.family.name],
        "prediction_type": "v_prediction" if family.family.name == "sd2" else "epsilon",
        "dtype": "float32",
    }


def test_the_model_card_says_what_was_loaded(tiny: Diffusion) -> None:
    about = tiny.describe() | {"dtype": "float16"}
    account = {
        **{"method": "salun", "concept": "square", "kind": "object", "anchor": "circle", "seed": 0, "mask": None},
        "checks": {"weights": 10, "changed": 5, "changed_outside_mask": 0},
        "erased": {"unet": "0"},
        "versions": {},
    }
    line = "| base, loaded as | Stable Diffusion 1.x, prediction type epsilon, weights in float16 |\n| base UNet"
    assert line in card(account | {"base": about}, "", [])
    old = {key: about[key] for key in ("source", "unet")}
    assert "| base | tiny |\n| base UNet, SHA-256 |" in card(account | {"base": old}, "", [])
    mask = {"sha256": "0" * 64, "density": 0.25}
    for kind, words in (("none", "scope of the method"), ("salient", "salient mask"), ("/home/me/my.st", "my.st mask")):
        told = card(account | {"base": about, "mask": mask | {"kind": kind}}, "", [])
        assert f"Only the 25 % of the weights in the {words} were free to change" in told


@pytest.mark.parametrize("scale", [1.0, 7.5, torch.tensor([0.0, 1.0, 7.5]).view(-1, 1, 1, 1)])
def test_guidance_leads_from_the_empty_prompt(family: Diffusion, scale: float | torch.Tensor) -> None:
    """Against one call of the UNet for each prompt and row, and with one time step for all as with one for each."""
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    given, empty = family.encode_prompts(["a", "b", "c"]), family.encode_uncond()
    with torch.no_grad():
        found = family.cfg(noisy, torch.tensor([500] * 3), given, empty, scale)
        again = family.cfg(noisy, torch.tensor(500), given, empty, scale)
        rows = [(noisy[i : i + 1], torch.tensor([500])) for i in range(3)]
        without = torch.cat([family.predict(x, t, empty) for x, t in rows])
        with_prompt = torch.cat([family.predict(x, t, given[i : i + 1]) for i, (x, t) in enumerate(rows)])
    torch.testing.assert_close(found, scale * with_prompt + (1 - scale) * without, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, again)


def test_text_encoders_are_written_under_their_published_names(family: Diffusion, tmp_path: Path) -> None:
    """As in every file on the hub, whatever transformers calls them: "layer 0's k_proj" stands for all layers'."""
    save_pipeline(family, tmp_path / "model")
    modules = [f"self_attn.{kind}_proj" for kind in "kqv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    modules += ["layer_norm1", "layer_norm2"]
    layers = [f"encoder.layers.{layer}.{module}" for layer in range(2) for module in modules]
    names = {f"text_model.{module}.{kind}" for module in (*layers, "final_layer_norm") for kind in ("weight", "bias")}
    names |= {f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")}
    assert load_file(tmp_path / "model" / "text_encoder" / "model.safetensors").keys() == names
    if family.family.name == "sdxl":
        found = load_file(tmp_path / "model" / "text_encoder_2" / "model.safetensors")
        assert found.keys() == names | {"text_projection.weight"}


def test_diffusers_alone_loads_every_weight_and_finds_every_file(family: Diffusion, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    for part in ("unet", "vae", *family.text_encoders):
        assert weights_hash(getattr(pipeline, part)) == weights_hash(family.modules[part])
    pipeline.save_pretrained(tmp_path / "again")
    files = {file.relative_to(tmp_path / "again") for file in (tmp_path / "again").rglob("*") if file.is_file()}
    assert {file for file in files if not (tmp_path / "model" / file).is_file()} == set()
    for file in files:
        if file.name in ("model_index.json", "config.json", "scheduler_config.json"):
            ours, theirs = (json.loads((tmp_path / which / file).read_text()) for which in ("model", "again"))
            unlike = {key for key, value in theirs.items() if ours.get(key) != value}
            # Of a scheduler we leave out what was not stated; see test_scheduler_config.py.
            unlike -= theirs.keys() - ours.keys() if file.name == "scheduler_config.json" else set()
            assert unlike <= {"_name_or_path"}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_either_spelling_of_the_text_encoders_names_loads(family: Diffusion, tmp_path: Path, prefix: str) -> None:
    """Bare names are what transformers 5 writes, and what erase-concept once wrote."""
    save_pipeline(family, tmp_path / "model")
    for part in family.text_encoders:
        file = tmp_path / "model" / part / "model.safetensors"
        tensors = {key.removeprefix("text_model."): value.clone() for key, value in load_file(file).items()}
        positions = {f"{prefix}embeddings.position_ids": torch.arange(16)[None]}  # in files of transformers 4.30
        spelt = {key if key.startswith("text_proj") else prefix + key: value for key, value in tensors.items()}
        save_file(spelt | positions, file)
    back = load(tmp_path / "model")
    assert all(weight.data_ptr() % 64 == 0 for weight in back.unet.parameters())  # wherever it is in its file
    for part, encoder in family.text_encoders.items():
        assert weights_hash(back.text_encoders[part]) == weights_hash(encoder)
    assert torch.equal(back.encode_prompts(["a church"]), family.encode_prompts(["a church"]))


def test_a_text_encoder_under_other_names_is_not_written(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CLIPTextModel.save_pretrained

    def bare(self: CLIPTextModel, folder: Path, **options: Any) -> None:
        own(self, folder)
        save_file(
            {k.removeprefix("text_model."): v for k, v in self.state_dict().items()}, folder / "model.safetensors"
        )

    monkeypatch.setattr(CLIPTextModel, "save_pretrained", bare)
    with pytest.raises(EraseError):
        save_pipeline(tiny, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_a_text_encoder_is_that_of_its_published_names(folder: Path, tiny: Diffusion) -> None:
    digest = hashlib.sha256()
    for name, value in sorted(load_file(folder / "text_encoder" / "model.safetensors").items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    assert weights_hash(tiny.text_encoder) == digest.hexdigest()


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_variants_and_shards_load(family: Diffusion, tmp_path: Path, size: str) -> None:
    family.pipeline().to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=size)
    assert (len(list((tmp_path / "model" / "unet").glob("*.fp16*.safetensors"))) > 1) == (size == "20KB")
    back = load(tmp_path / "model", dtype=torch.float16)
    assert weights_hash(back.unet) == weights_hash(family.unet)
    assert back.stored == "float16"
    family.pipeline().to(torch.float32).save_pretrained(tmp_path / "model", max_shard_size=size)
    assert load(tmp_path / "model").stored == "float32"  # both are there now, and the one without a variant is loaded


def test_a_fresh_process_draws_the_same_picture(tiny: Diffusion, folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy, torch; from diffusers import StableDiffusionPipeline as P\n"
        "p = P.from_pretrained(sys.argv[1]); p.set_progress_bar_config(disable=True)\n"
        "g = torch.Generator().manual_seed(3)\n"
        "i = p('a prompt', num_inference_steps=3, generator=g, output_type='np', height=16, width=16).images\n"
        "numpy.save(sys.argv[2], i)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "i.npy")], check=True, capture_output=True)
    import numpy as np

    pipeline = tiny.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np", "height": 16, "width": 16}
    here = pipeline("a prompt", generator=torch.Generator().manual_seed(3), **settings).images
    assert np.array_equal(np.load(tmp_path / "i.npy"), here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unet_alone_opens_in_diffusers(tiny: Diffusion, tmp_path: Path, dtype: torch.dtype) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    save_unet(tiny.unet.to(dtype), tmp_path / WEIGHTS, {"concept": "church"})
    tiny.unet.save_config(tmp_path)
    back = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    for name, value in tiny.unet.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.to(dtype).float())
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()["concept"] == "church"


def test_saving_replaces_a_folder_as_a_whole(tiny: Diffusion, folder: Path) -> None:
    (folder / "stale.txt").write_text("x")
    save_pipeline(tiny, folder)
    assert not (folder / "stale.txt").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def damage(folder: Path, how: str) -> None:
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "missing tensor":
        del tensors["conv_in.weight"]
        save_file(tensors, file)
    elif how == "wrong shape":
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].contiguous()
        save_file(tensors, file)
    elif how == "no weights":
        file.unlink()
    elif how == "no index":
        (folder / "model_index.json").unlink()
    elif how == "bad index":
        (folder / "model_index.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("truncated", f"unet/{WEIGHTS}: is damaged"),
        ("missing tensor", "unet: conv_in.weight is missing"),
        ("wrong shape", r"unet: conv_in.weight has shape \[8, 2, 3, 3\], its configuration asks for \[8, 4, 3, 3\]"),
        ("no weights", "no weights in unet/"),
        ("no index", "holds no model_index.json"),
        ("bad index", r"model_index\.json: is damaged"),
    ],
)
def test_what_does_not_load_whole_is_refused(folder: Path, how: str, problem: str) -> None:
    damage(folder, how)
    with pytest.raises(RequestError, match=problem):
        load(folder)


def test_attention_under_its_first_names_loads(tiny: Diffusion, folder: Path) -> None:
    """As Stable Diffusion 1.x was published; diffusers renames it while loading."""
    file = folder / "vae" / WEIGHTS
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {k.replace(f".{new}.", f".{old}.") if "attentions" in k else k: v for k, v in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file)
    assert weights_hash(load(folder).vae) == weights_hash(tiny.vae)


def test_other_kinds_of_pipeline_are_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(RequestError, match=r"is a FluxPipeline; needed: .*StableDiffusionPipeline or"):
        load(folder)


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^model nothing: no such model; allowed: a diffusers folder"):
        load("nothing")
    with pytest.raises(RequestError, match="no such model"):
        load(tmp_path / "absent.safetensors")
    with pytest.raises(RequestError, match=r"^model owner/absent: is not in the hub's cache, and HF_HUB"):
        load("owner/absent")


def test_pickles_are_not_run(folder: Path, tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(RequestError, match=r"diffusion_pytorch_model\.bin: is damaged or no file of weights"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_stated_and_real_tokenizer_files_are_both_there(folder: Path) -> None:
    assert json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"] == 16


def test_a_tokenizer_gives_no_more_tokens_than_the_encoder_has_positions(tiny: Diffusion, folder: Path) -> None:
    """Published ones claim 8,192 tokens or more; the embeddings are as if they said what the encoder can take."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    told = json.loads(file.read_text())
    claims = ({"model_max_length": 8192}, {})
    for claim in claims:
        kept = {key: value for key, value in told.items() if key != "model_max_length"}
        file.write_text(json.dumps(kept | claim))
        back, prompt = load(folder), "a very long prompt" * 9
        assert back.tokenizer.model_max_length == 16
        assert torch.equal(back.encode_prompts([prompt]), tiny.encode_prompts([prompt]))
        assert back.cut_prompts([prompt, "a"]) == 1
    save_pipeline(back, folder.with_name("again"))  # so that diffusers, which believes the tokenizer, can use it
    again = CLIPTokenizer.from_pretrained(folder.with_name("again") / "tokenizer")
    assert again.model_max_length == 16
    pipeline = tiny.pipeline()
    pipeline.tokenizer = again
    again.model_max_length = 8192
    assert Diffusion.from_pipeline(pipeline).tokenizer.model_max_length == 16
    assert pipeline.tokenizer.model_max_length == 8192  # it is its owner's


def test_parts_that_need_more_than_is_given_are_refused(tiny: Diffusion) -> None:
    check = tiny.family.check_fit
    check(tiny.components)
    for part, name, value, told in (
        ("unet", "time_cond_proj_dim", 8, "time_cond_proj_dim is 8.*latent consistency"),
        ("unet", "class_embed_type", "timestep", "class_embed_type is timestep"),
        ("vae", "latents_mean", [0.1] * 4, "latents_mean"),
    ):
        config = tiny.components[part].config
        tiny.components[part].register_to_config(**{name: value})
        with pytest.raises(ValueError, match=told):
            check(tiny.components)
        tiny.components[part].register_to_config(**{name: config.get(name)})
    tiny.text_encoder.config.use_attention_mask = True
    with pytest.raises(ValueError, match="use_attention_mask"):
        check(tiny.components)


def test_configurations_of_the_first_versions_are_read_as_the_model_is_loaded(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "old")
    for part, file, changed in (
        ("unet", "config.json", {"sample_size": 32, "_diffusers_version": "0.6.0"}),
        ("scheduler", "scheduler_config.json", {"steps_offset": 0, "clip_sample": True}),
    ):
        told = json.loads((tmp_path / "old" / part / file).read_text())
        (tmp_path / "old" / part / file).write_text(json.dumps(told | changed))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "old", safety_checker=None)
    read = configs(tmp_path / "old").components
    assert read["unet"]["sample_size"] == theirs.unet.config.sample_size == load(tmp_path / "old").size // 2 == 64
    for name in ("steps_offset", "clip_sample"):
        assert read["scheduler"][name] == theirs.scheduler.config[name]
    # The same configurations beside a single file make the same model, too.
    save_original(tiny, tmp_path / "old.safetensors", None, {})
    loaded, again = load(tmp_path / "old.safetensors"), tmp_path / "again"
    save_pipeline(loaded, again)
    assert loaded.besides_unet(["a"]) == load(again).besides_unet(["a"])
    assert loaded.size == 128
