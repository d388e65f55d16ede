"""Single files: loaded without a hub, erased, and written back with nothing else changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erase_concept.cli import main as cli
from erase_concept.errors import RequestError
from erase_concept.exports import export
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.families.stable_diffusion import predicts_noise
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import ema_key, save_original
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.run_folder import read_run

UNET = "model.diffusion_model."


@pytest.fixture
def file(family: Diffusion, tmp_path: Path) -> Path:
    """A checkpoint in one file, and beside it the folder that says what its parts are made of."""
    save_original(family, tmp_path / "model.safetensors", torch.float32, {})
    save_pipeline(family, tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    return tmp_path / "model.safetensors"


def test_is_the_model_that_was_saved(family: Diffusion, file: Path) -> None:
    back = load(file)
    for part, state in family.states().items():
        other = back.states()[part]
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in state.items()), part
    assert torch.equal(back.encode_prompts(["a church"]), family.encode_prompts(["a church"]))
    assert torch.equal(back.encode_uncond(), family.encode_uncond())
    assert back.scheduler.config.prediction_type == family.scheduler.config.prediction_type
    assert (back.family.name, back.size, back.factor) == (family.family.name, family.size, family.factor)


def test_pickled_checkpoints_load_and_their_code_does_not_run(family: Diffusion, file: Path, tmp_path: Path) -> None:
    import pickle

    torch.save({"state_dict": load_file(file), "global_step": 3}, file.with_suffix(".ckpt"))
    assert weights_hash(load(file.with_suffix(".ckpt")).unet) == weights_hash(family.unet)

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    file.with_suffix(".ckpt").write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(RequestError, match=r"model\.ckpt: is damaged or no file of weights"):
        load(file.with_suffix(".ckpt"))
    torch.save({"state_dict": load_file(file), "x": Trap()}, file.with_suffix(".ckpt"))
    with pytest.raises(RequestError, match=r"model\.ckpt: asks for \S+, which is no tensor; code in a file is not run"):
        load(file.with_suffix(".ckpt"))
    assert not (tmp_path / "ran").exists()


def test_an_erased_file_differs_in_its_unet_alone(
    family: Diffusion, file: Path, square: Concept, tmp_path: Path
) -> None:
    tensors = load_file(file)
    extra = {"alphas_cumprod": torch.rand(10, dtype=torch.float64), "model_ema.num_updates": torch.tensor(7)}
    averages = {ema_key(key): value.clone() for key, value in tensors.items() if key.startswith(UNET)}
    save_file({**tensors, **extra, **averages}, file, {"modelspec.title": "mine"})
    data = {"forget": 2, "retain": 2, "steps": 2}
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-3}
    for _ in iter_erase(
        make_recipe({"model": str(file), "concept": square, "data": data, "settings": settings}), tmp_path / "run"
    ):
        pass
    source = file.read_bytes()
    export(tmp_path / "run", tmp_path / "erased.safetensors", "single-file")
    assert file.read_bytes() == source
    erased = load_file(tmp_path / "erased.safetensors")
    differing = {key for key, value in load_file(file).items() if not torch.equal(value, erased[key])}
    assert differing
    assert {ema_key(key) if key.startswith(UNET) else key for key in differing} <= averages.keys()
    shutil.copytree(file.with_suffix(""), tmp_path / "erased")
    account = read_run(tmp_path / "run")
    assert weights_hash(load(tmp_path / "erased.safetensors").unet) == account["erased"]["unet"]
    export(tmp_path / "run", tmp_path / "d.safetensors", "delta")
    save_file({**load_file(file), "model_ema.num_updates": torch.tensor(8)}, file)
    export(tmp_path / "run", tmp_path / "again.safetensors", "single-file")
    with torch.no_grad():
        tensors[f"{UNET}out.2.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(RequestError, match="has changed since; single-file needs it"):
        export(tmp_path / "run", tmp_path / "third.safetensors", "single-file")


def test_the_averages_of_the_training_are_preferred_to_the_live_weights(family: Diffusion, file: Path) -> None:
    assert weights_hash(load(file, ema=False).unet) == weights_hash(load(file).unet) == weights_hash(family.unet)
    tensors = load_file(file)
    averages = {ema_key(key): value + 1 for key, value in tensors.items() if key.startswith(UNET)}
    save_file(tensors | averages, file)
    back, live = load(file), load(file, ema=False)
    for name, value in family.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[name], value + 1), name
    assert weights_hash(live.unet) == weights_hash(family.unet)
    assert weights_hash(back.vae) == weights_hash(live.vae) == weights_hash(family.vae)


def test_the_command_takes_the_weights_that_are_asked_for(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny, Path("model"))
    save_original(tiny, Path("model.safetensors"), torch.float32, {})
    tensors = load_file("model.safetensors")
    save_file(tensors | {ema_key(k): v + 1 for k, v in tensors.items() if k.startswith(UNET)}, "model.safetensors")
    Path("p.csv").write_text("prompt,seed\na,1\n")
    Path("square.yaml").write_text("name: square\nkind: custom\nanchor: circle\ntemplates: ['a {O}']\nretain: [line]\n")
    small = ["-s", "data.forget=2", "-s", "data.retain=2", "-s", "data.steps=2"]
    plan = ["model.safetensors", "-c", "square.yaml", "-o", "run", "--dry-run", "--json"]
    live, averaged = (weights_hash(load("model.safetensors", ema=ema).unet) for ema in (False, True))

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["erase-concept", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out

    for option, expected in (([], averaged), (["--ema"], averaged), (["--no-ema"], live)):
        folder = f"images{option}"
        call("sample", "model.safetensors", "-p", "p.csv", "-o", folder, "--steps", "1", *option)
        assert json.loads((Path(folder) / "sampling.json").read_text())["unet"] == expected
        call("mask", "model.safetensors", "-c", "square.yaml", "-o", "mask.safetensors", *small, *option)
        assert Mask.load(Path("mask.safetensors")).provenance["base"] == expected
        assert json.loads(call("erase", *plan, *option))["ema"] == (expected == averaged)
    Path("recipe.yaml").write_text("ema: false\n")
    assert json.loads(call("erase", *plan, "--recipe", "recipe.yaml"))["ema"] is False
    assert json.loads(call("erase", *plan, "--recipe", "recipe.yaml", "--ema"))["ema"] is True


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_says_in_what_type_its_unet_was_stored(tiny: Diffusion, tmp_path: Path, suffix: str, dtype: object) -> None:
    save_pipeline(tiny, tmp_path / "model")
    file = tmp_path / "model.safetensors"
    save_original(tiny, file, dtype or torch.float16, {})
    tensors = load_file(file)
    if dtype is None:
        tensors[f"{UNET}out.2.bias"] = tensors[f"{UNET}out.2.bias"].float()
    save_file(tensors, file)
    torch.save(tensors, file.with_suffix(".ckpt"))
    back = load(file.with_suffix(suffix))
    assert back.unet.dtype == torch.float32
    assert back.describe()["dtype"] == (str(dtype).removeprefix("torch.") if dtype else "float16, float32")


WRONG = {
    "lora": ({"lora_unet_mid.lora_up.weight": torch.zeros(2)}, "is a LoRA; a whole checkpoint is needed"),
    "vae": ({"first_stage_model.encoder.conv_in.weight": torch.zeros(2)}, "is a VAE alone"),
    "unet": ({"model.diffusion_model.out.2.bias": torch.zeros(2)}, "holds no text encoder"),
    "part": (
        {"cond_stage_model.transformer.text_model.x": torch.zeros(2)},
        "is missing: this is no whole checkpoint of Stable Diffusion 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, case: str) -> None:
    tensors, problem = WRONG[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match=problem):
        load(tmp_path / "x.safetensors")


def test_truncated_and_empty_files_are_refused(tiny: Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_original(tiny, file, torch.float16, {})
    torch.save(load_file(file), file.with_suffix(".ckpt"))
    for whole in (file, file.with_suffix(".ckpt")):
        content = whole.read_bytes()
        for part, problem in ((content[:-10], "is damaged"), (content[:9], "is damaged"), (b"", "is an empty file")):
            whole.write_bytes(part)
            with pytest.raises(RequestError, match=f"{whole.name}: {problem}"):
                load(whole)


def test_without_a_tokenizer_it_says_what_to_do(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erase_concept.pipelines.formats.tokenizer.find_spec", lambda name: None)  # not installed
    save_original(tiny, tmp_path / "model.safetensors", torch.float32, {})
    save_pipeline(tiny, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    what = (
        r"pip install \"erase-concept\[tokenizer\]\", or put its vocab\.json and merges.txt into a folder 'tokenizer'"
    )
    with pytest.raises(RequestError, match=what):
        load(tmp_path / "model.safetensors")
    save_pipeline(tiny, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "tokenizer")
    assert torch.equal(load(tmp_path / "model.safetensors").encode_prompts(["a"]), tiny.encode_prompts(["a"]))


def test_a_file_without_a_folder_is_made_as_its_family_is(tiny: Diffusion, tmp_path: Path) -> None:
    save_original(tiny, tmp_path / "model.safetensors", torch.float32, {})
    with pytest.raises(RequestError, match="UNet takes prompts 16 wide, the text encoder gives 768"):
        load(tmp_path / "model.safetensors")


def test_what_is_predicted_shows_in_pure_noise() -> None:
    model = load("emojinette")
    assert predicts_noise(model.unet)
    forward = model.unet.forward

    kept = model.scheduler.alphas_cumprod[999]

    def velocity(noisy: torch.Tensor, timestep: int, embeddings: torch.Tensor) -> object:
        """The same model's velocity: sqrt(a) noise - sqrt(1 - a) image."""
        found = forward(noisy, timestep, embeddings)
        image = (noisy - (1 - kept).sqrt() * found.sample) / kept.sqrt()
        found.sample = kept.sqrt() * found.sample - (1 - kept).sqrt() * image
        return found

    model.unet.forward = velocity
    assert not predicts_noise(model.unet)
