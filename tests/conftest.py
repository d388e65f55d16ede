"""A tiny Stable Diffusion with random weights, and the built-in model, for the tests that need a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported: no test asks the network
os.environ["ERASE_CONCEPT_CACHE"] = ""  # tests make what they test

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from filelock import FileLock
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept

os.fsync = lambda _: None  # no test loses its power, and to wait for the disk takes 10 ms for each file


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """A tokenizer of single letters, with CLIP's file layout."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    shared = {"model_max_length": 16, "pad_token": "<|endoftext|>"}
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **shared)


def text_config(tokenizer: CLIPTokenizer, act: str = "quick_gelu") -> CLIPTextConfig:
    """A text encoder's configuration, 16 wide."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        projection_dim=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def diffusion(tokenizer: CLIPTokenizer, family: str = "sd1") -> Diffusion:
    """A new model of some 30,000 weights; always the same ones."""
    torch.manual_seed(0)
    xl, act = family == "sdxl", "quick_gelu" if family == "sd1" else "gelu"
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if xl else {}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=family != "sd1",
        projection_class_embeddings_input_dim=16 + 6 * 4 if xl else None,
        **added,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    )
    text = CLIPTextModel(text_config(tokenizer, "quick_gelu" if xl else act))
    text_2 = CLIPTextModelWithProjection(text_config(tokenizer, act)) if xl else None
    for part in (text, vae, unet, *((text_2,) if text_2 else ())):
        part.eval().requires_grad_(False)
    components = {"tokenizer": tokenizer, "text_encoder": text, "vae": vae, "unet": unet, "scheduler": scheduler}
    if xl:
        components |= {"tokenizer_2": tokenizer, "text_encoder_2": text_2}
    record = FAMILIES.find(family)
    return Diffusion(record, components, source="tiny", settings=dict(record.settings))


@pytest.fixture
def tiny(tokenizer: CLIPTokenizer) -> Diffusion:
    """A Stable Diffusion 1.x with random weights, new for every test."""
    return diffusion(tokenizer)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def family(tokenizer: CLIPTokenizer, request: pytest.FixtureRequest) -> Diffusion:
    """The same of every family."""
    return diffusion(tokenizer, request.param)


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Diffusion]:
    """Return the function that makes a model with a tokenizer, of a family."""
    return diffusion


@pytest.fixture
def square() -> Concept:
    """A concept for the tiny model."""
    templates = ("a {O}", "one {O}")
    return Concept("square", "object", "circle", templates, retain=("circle", "line"), others=("",))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``erase-concept demo``, made once for all tests; demo.json beside it is what was printed."""
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    folder, printed = shared / "demo-church", shared / "demo.json"
    with FileLock(shared / "demo.lock"):
        if not printed.is_file():
            command = [sys.executable, "-m", "erase_concept", "demo", "--out", str(folder), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def layouts() -> Path:
    """The folder with prompt sets of ours in the layouts of I2P, of Imagenette's, COCO's and an artist's prompts."""
    return Path(__file__).parent / "prompts" / "sets"


@pytest.fixture(scope="session")
def published_sets() -> Path:
    """The folder with the published prompt sets themselves, which are other people's and no part of the project."""
    if not (folder := os.environ.get("PUBLISHED_PROMPT_SETS")):
        pytest.skip("needs other people's prompt sets: PUBLISHED_PROMPT_SETS must name a folder of them (i2p.csv, ...)")
    return Path(folder)


# Several commands in one process, which has to import torch only once.
DRIVER = """
import contextlib, io, json, sys
from erase_concept.cli.main import main

for arguments in json.load(sys.stdin):
    sys.argv = ["erase-concept", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
Results = list[tuple[int, str, str]]  # of each command: exit code, output, errors
Commands = Callable[[Sequence[Sequence[str]]], Results]


@pytest.fixture
def plug_ins(tmp_path: Path) -> Callable[[Mapping[str, str], str], Commands]:
    """Return a function that installs a package of files and entry points, and returns one that runs commands there."""
    site = tmp_path / "site"
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def commands(lines: Sequence[Sequence[str]]) -> Results:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(lines),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    def install(files: Mapping[str, str], entry_points: str) -> Commands:
        (site / "toys-1.0.dist-info").mkdir(parents=True)
        (site / "toys-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        (site / "toys-1.0.dist-info" / "entry_points.txt").write_text(entry_points)
        for name, text in files.items():
            (site / f"{name}.py").write_text(text.lstrip(), encoding="utf-8")
        return commands

    return install
