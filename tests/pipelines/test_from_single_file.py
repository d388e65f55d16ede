"""Single files: loaded without a hub, erased, and written back with nothing else changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
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
from erase_concept.pipelines.formats.single_file import ema_key, replace_unet, save_original
from erase_concept.pipelines.load import configs, load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import sample
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
    averages = {ema_key(key): value * 1.001 for key, value in tensors.items() if key.startswith(UNET)}
    save_file(tensors | averages, file)
    back, live = load(file), load(file, ema=False)
    assert "averaged (EMA) UNet taken; the live one differs by 0.10% at most" in back.describe()["weights"]
    assert "live UNet taken; the averaged (EMA) one differs by 0.10% at most" in live.describe()["weights"]
    for name, value in family.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[name], value * 1.001), name
    assert weights_hash(live.unet) == weights_hash(family.unet)
    assert weights_hash(back.vae) == weights_hash(live.vae) == weights_hash(family.vae)


def test_the_command_takes_the_weights_that_are_asked_for(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny, Path("model"))
    save_original(tiny, Path("model.safetensors"), torch.float32, {})
    tensors = load_file("model.safetensors")
    save_file(tensors | {ema_key(k): v * 1.001 for k, v in tensors.items() if k.startswith(UNET)}, "model.safetensors")
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
        asked = {"--ema": True, "--no-ema": False}.get(*option) if option else None
        assert json.loads(call("erase", *plan, *option)).get("ema") == asked
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


def two_unets(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Put another UNet into the file, as the averages of its own."""
    tensors = load_file(file)
    averages = change({ema_key(key): value.clone() for key, value in tensors.items() if key.startswith(UNET)})
    save_file(tensors | averages, file)


def test_of_two_unets_that_differ_widely_none_is_taken_unasked(
    tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One matrix of one layer is enough, as of an erased one: an edit of keys and values changes no more."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny, Path("model"))
    save_original(tiny, file := Path("model.safetensors"), torch.float32, {})
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    two_unets(file, lambda averages: averages | {ema_key(key): averages[ema_key(key)] * 1.05})
    Path("p.csv").write_text("prompt,seed\na,1\n")
    Path("square.yaml").write_text("name: square\nkind: custom\nanchor: circle\ntemplates: ['a {O}']\nretain: [line]\n")
    with pytest.raises(RequestError, match=r"ema \(not given\): model\.safetensors holds two UNets.* differ by 4\.8%"):
        load(file)
    for command in (
        ["sample", str(file), "-p", "p.csv", "-o", "out", "--steps", "1"],
        ["erase", str(file), "-c", "square.yaml", "-m", "uce", "-o", "out"],
        ["erase", str(file), "-c", "square.yaml", "-m", "uce", "-o", "out", "--dry-run"],
        ["mask", str(file), "-c", "square.yaml", "-o", "out.safetensors"],
    ):
        monkeypatch.setattr("sys.argv", ["erase-concept", *command])
        with pytest.raises(SystemExit) as end:
            cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert lines[-1].startswith("erase-concept: --ema (not given): model.safetensors holds two UNets")
    assert not Path("out").exists()
    assert weights_hash(load(file, ema=False).unet) == weights_hash(tiny.unet)
    assert weights_hash(load(file, ema=True).unet) != weights_hash(tiny.unet)
    assert configs(file, ema=False).components["unet"]["sample_size"] == 8
    sample(file, "p.csv", "live", ema=False, steps=1)
    assert json.loads(Path("live/sampling.json").read_text())["unet"] == weights_hash(tiny.unet)


def test_a_set_that_is_not_whole_or_sound_is_not_taken(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "model")
    file = tmp_path / "model.safetensors"
    nan = torch.tensor(float("nan"))
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = [
        (lambda averages: dict(list(averages.items())[1:]), r"is not whole \(\S+ is missing\)"),
        (lambda averages: {key: value * nan for key, value in averages.items()}, r"is broken \(\S+ holds NaN or inf"),
        (lambda averages: {key: value * 0 for key, value in averages.items()}, "is all zeros"),
    ]
    for change, problem in cases:
        save_original(tiny, file, torch.float32, {})
        two_unets(file, change)
        back = load(file)
        assert weights_hash(back.unet) == weights_hash(tiny.unet)
        assert re.search(f"live UNet taken; the averaged \\(EMA\\) one {problem}", back.taken), back.taken
        with pytest.raises(RequestError, match=rf"its averaged \(EMA\) UNet {problem}"):
            load(file, ema=True)


def test_a_file_with_averages_alone(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "model")
    file = tmp_path / "model.safetensors"
    save_original(tiny, file, torch.float32, {})
    save_file({ema_key(k) if k.startswith(UNET) else k: v for k, v in load_file(file).items()}, file)
    for ema in (None, True, False):
        back = load(file, ema=ema)
        assert weights_hash(back.unet) == weights_hash(tiny.unet)
        assert back.taken == "averaged (EMA) UNet, the only one in the file"
    erased = {name: value + 1 for name, value in tiny.unet.state_dict().items()}
    replace_unet(file, erased, tiny.family, tmp_path / "erased.safetensors", {})
    shutil.copytree(tmp_path / "model", tmp_path / "erased")
    assert torch.equal(load(tmp_path / "erased.safetensors").unet.conv_in.weight, erased["conv_in.weight"])


def test_a_text_encoder_without_its_prefix_is_read_and_written_with_it(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "model")
    file = tmp_path / "model.safetensors"
    save_original(tiny, file, torch.float32, {})
    written = load_file(file)
    text = {key for key in written if key.startswith("cond_stage_model.")}
    assert text
    assert all(key.startswith("cond_stage_model.transformer.text_model.") for key in text)
    save_file({key.replace("text_model.", ""): value for key, value in written.items()}, file)
    assert weights_hash(load(file).text_encoder) == weights_hash(tiny.text_encoder)
    for folder in (tmp_path / "model", tmp_path / "again"):
        if not folder.exists():
            save_pipeline(load(file), folder)
        names = load_file(folder / "text_encoder" / "model.safetensors").keys()
        assert all(name.startswith("text_model.") for name in names)
        assert {"text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"} <= names


def test_scaled_fp8_loads_at_its_scale_and_an_erased_copy_has_no_old_scales(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "model")
    file = tmp_path / "model.safetensors"
    save_original(tiny, file, torch.float32, {})
    tensors = {one: value.clone() for one, value in load_file(file).items()}  # the file itself is written over
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    expected, scale = tensors[key], tensors[key].abs().max() / 448
    stored = {key: (expected / scale).to(torch.float8_e4m3fn), key.replace(".weight", ".scale_weight"): scale}
    save_file(tensors | stored | {f"{UNET}scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, file)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    found = load(file).unet.state_dict()[name]
    torch.testing.assert_close(found, expected, rtol=2**-4, atol=float(scale) * 2**-9)
    erased = {one: value + 1 for one, value in tiny.unet.state_dict().items()}
    replace_unet(file, erased, tiny.family, tmp_path / "erased.safetensors", {})
    assert not [one for one in load_file(tmp_path / "erased.safetensors") if "scale" in one]
    shutil.copytree(tmp_path / "model", tmp_path / "erased")
    assert torch.equal(load(tmp_path / "erased.safetensors").unet.state_dict()[name], erased[name])
