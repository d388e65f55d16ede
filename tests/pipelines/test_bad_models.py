"""Models that are none, asked for from the command line: one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from erase_concept.cli import main as cli
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.model import Diffusion

UNET = "model.diffusion_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"
Outcome = tuple[object, list[str]]


@pytest.fixture
def sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], Outcome]:
    """Ask for an image of a model; return the exit code and the lines on stderr, having checked that there is none."""
    (tmp_path / "prompts.csv").write_text("prompt,seed\na square,1\n")

    def call(model: Path) -> Outcome:
        out = tmp_path / "out"
        arguments = ["--prompts", str(tmp_path / "prompts.csv"), "--out", str(out), "--steps", "1"]
        monkeypatch.setattr(sys, "argv", ["erase-concept", "sample", str(model), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not out.exists()
        return end.value.code, capsys.readouterr().err.splitlines()

    return call


def change(file: Path, **values: object) -> None:
    """Change values in a configuration."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a UNet's tensors with cross-attention to prompts 24 wide instead of 16."""
    return {
        key: torch.zeros(len(value), 24) if ".attn2.to_k." in key or ".attn2.to_v." in key else value
        for key, value in tensors.items()
    }


def of_another_unet(folder: Path) -> None:
    change(folder / "unet" / "config.json", cross_attention_dim=24)
    save_file(widen(load_file(folder / "unet" / WEIGHTS)), folder / "unet" / WEIGHTS)


def for_inpainting(folder: Path) -> None:
    change(folder / "unet" / "config.json", in_channels=9)
    tensors = load_file(folder / "unet" / WEIGHTS)
    save_file(tensors | {"conv_in.weight": torch.zeros(8, 9, 3, 3)}, folder / "unet" / WEIGHTS)


def with_another_vae(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    AutoencoderKL.from_config(config | {"latent_channels": 16}).save_pretrained(folder / "vae")


def with_another_scheduler(folder: Path) -> None:
    change(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def in_part(folder: Path) -> None:
    """As a pickle, from which diffusers loads the rest and leaves the missing weight undefined."""
    tensors = load_file(folder / "unet" / WEIGHTS)
    del tensors["conv_in.weight"]
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")


def of_text(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Path], object]:
    """Return what changes the tensors of a folder's text encoder."""

    def spoil(folder: Path) -> None:
        file = folder / "text_encoder" / "model.safetensors"
        save_file(change({key: value.clone() for key, value in load_file(file).items()}), file)

    return spoil


NORM = "text_model.final_layer_norm.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another UNet": (of_another_unet, "the UNet takes prompts 24 wide, the text encoder gives 16"),
    "inpainting": (for_inpainting, "it is an inpainting model (its UNet takes 9 channels)"),
    "another VAE": (with_another_vae, "the UNet takes 4 channels and gives 4, the VAE's latents have 16"),
    "another scheduler": (with_another_scheduler, "the scheduler is a FlowMatchEulerDiscreteScheduler"),
    "another target": (
        lambda f: change(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "the scheduler's prediction type is sample; allowed: epsilon, v_prediction",
    ),
    "a part of a pickle": (in_part, "unet: conv_in.weight is missing"),
    "a part of a text encoder": (
        of_text(lambda tensors: {key: value for key, value in tensors.items() if key != NORM}),
        f"text_encoder: {NORM} is missing",
    ),
    "a text encoder of other names": (
        of_text(lambda tensors: {key.replace("text_model", "clip"): value for key, value in tensors.items()}),
        "text_encoder: text_model.embeddings.token_embedding.weight is missing",
    ),
    "a text encoder of other shapes": (
        of_text(lambda tensors: tensors | {NORM: torch.ones(8)}),
        f"text_encoder: {NORM} has shape [8], its configuration asks for [16]",
    ),
    "more than a text encoder": (
        of_text(lambda tensors: tensors | {"text_projection.weight": torch.ones(16, 16)}),
        "text_encoder: text_projection.weight has no place in what its configuration describes",
    ),
    "a text encoder twice": (
        of_text(lambda tensors: tensors | {NORM.removeprefix("text_model."): torch.ones(16)}),
        f"text_encoder: {NORM} is in its files twice",
    ),
    "an empty pickle": (
        lambda f: (f / "unet" / WEIGHTS).rename(f / "unet" / "diffusion_pytorch_model.bin").write_bytes(b""),
        "diffusion_pytorch_model.bin: is an empty file",
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "has no text_encoder"),
    "no VAE": (lambda f: shutil.rmtree(f / "vae"), "has no vae"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler"),
    "no scheduler's name": (lambda f: change(f / "model_index.json", scheduler=[None, None]), "has no scheduler"),
    "no configuration": (lambda f: (f / "unet" / "config.json").unlink(), "has no unet"),
    "half a configuration": (lambda f: (f / "unet" / "config.json").write_text('{"a":'), "config.json: is damaged"),
    "a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: is damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tiny: Diffusion, tmp_path: Path, sample: Callable[[Path], Outcome], case: str) -> None:
    spoil, problem = FOLDERS[case]
    save_pipeline(tiny, tmp_path / "model")
    spoil(tmp_path / "model")
    code, lines = sample(tmp_path / "model")
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("erase-concept: MODEL ")
    assert problem in lines[0]


Tensors = dict[str, torch.Tensor]
FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "lora": (lambda _: {"lora_unet_mid.lora_up.weight": torch.zeros(2)}, "is a LoRA; a whole checkpoint is needed"),
    "vae": (
        lambda t: {k.removeprefix("first_stage_model."): v for k, v in t.items() if k.startswith("first_stage_model.")},
        "is a VAE alone; a whole checkpoint is needed",
    ),
    "no text encoder": (
        lambda t: {key: value for key, value in t.items() if not key.startswith("cond_stage_model.")},
        "holds no text encoder",
    ),
    "no unet": (
        lambda t: {key: value for key, value in t.items() if not key.startswith(UNET)},
        "is missing: this is no whole checkpoint",
    ),
    "inpainting": (
        lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
        "it is an inpainting model (its UNet takes 9 channels)",
    ),
    "another unet": (widen, "the UNet takes prompts 24 wide, the text encoder gives 16"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("case", FILES)
def test_files(tiny: Diffusion, tmp_path: Path, sample: Callable[[Path], Outcome], case: str, suffix: str) -> None:
    change_tensors, problem = FILES[case]
    save_pipeline(tiny, tmp_path / "model")
    save_original(tiny, tmp_path / "model.safetensors", torch.float32, {})
    tensors = change_tensors(load_file(tmp_path / "model.safetensors"))
    file = tmp_path / f"model{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, file)
    code, lines = sample(file)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"erase-concept: MODEL {file}: ")
    assert problem in lines[0]


@pytest.mark.parametrize("content", ["<html>not found</html>", "version https://git-lfs.github.com/spec/v1", "hello"])
def test_texts_that_are_called_checkpoints(tmp_path: Path, sample: Callable[[Path], Outcome], content: str) -> None:
    for suffix in (".safetensors", ".ckpt"):
        file = tmp_path / f"model{suffix}"
        file.write_text(content)
        code, lines = sample(file)
        assert (code, len(lines)) == (2, 1), lines
        assert "is damaged or no file of weights" in lines[0]
        assert "weights_only" not in lines[0]  # torch's advice, which is to run the code in the file


REFUSALS = {
    "gated": (403, "GatedRepo", "is gated: accept its terms at https://huggingface.co/owner/gated, and log in with"),
    "absent": (
        401,
        "RepoNotFound",
        "is not on the hub, or is closed to you there: log in with 'hf auth login' or set ",
    ),
    "closed": (401, "", "is not on the hub, or is closed to you there: log in with 'hf auth login' or set HF_TOKEN"),
    "other": (404, "EntryNotFound", "is not in the hub's cache and could not be downloaded"),
}
TOKENS: set[str | None] = set()


class Hub(BaseHTTPRequestHandler):
    """Tells of every model but the absent one, and answers a request for a file as a hub does that refuses it."""

    def answer(self) -> None:
        TOKENS.add(self.headers.get("authorization"))
        status, reason, _ = next((REFUSALS[name] for name in REFUSALS if f"owner/{name}" in self.path), (404, "", ""))
        if self.path.startswith("/api/") and reason != "RepoNotFound":
            status = 200
        self.send_response(status)
        self.send_header("X-Error-Code", reason)
        body = json.dumps({"id": "owner/x", "sha": "0" * 40, "siblings": [{"rfilename": "model_index.json"}]}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = answer  # noqa: N815 - the library calls it so
    do_HEAD = answer  # noqa: N815 - and so it does this one

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""


LOAD = """
import sys
from erase_concept.pipelines.load import load
for name in sys.argv[1:]:
    try:
        load(name)
    except Exception as problem:
        print(type(problem).__name__, problem)
"""


def test_the_hub_gets_the_token_and_its_refusal_says_what_to_do(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *(f"owner/{name}" for name in REFUSALS)],
            env=os.environ | own | {"HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        server.shutdown()
        thread.join()
    assert "Bearer hf_mine" in TOKENS
    lines = done.stdout.splitlines()
    assert len(lines) == len(REFUSALS), done.stdout + done.stderr
    for line, (name, (_, _, problem)) in zip(lines, REFUSALS.items(), strict=True):
        assert line.startswith(f"RequestError model owner/{name}: ")
        assert problem in line


def test_offline_the_hub_is_not_waited_for(sample: Callable[[Path], Outcome]) -> None:
    code, lines = sample(Path("owner/absent"))
    assert (code, len(lines)) == (2, 1), lines
    assert "owner/absent: is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it" in lines[0]


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from erase_concept.cli import main as cli
from erase_concept.pipelines.load import load
load(sys.argv[2])  # all that is imported late is here now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 12 * 2**20,) * 2)
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process from taking more memory than it may")
def test_too_little_memory_is_a_failure_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,seed\na square,1\n")
    arguments = ["sample", "emojinette", "--prompts", str(tmp_path / "prompts.csv"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, *arguments], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "erase-concept: emojinette: there is too little memory to load it"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
