"""A model family of another package, in one file: it loads, samples and erases from the command line.

The toy differs from Stable Diffusion in most of what a family says. Its pipeline class is its own, a component of its
own makes the text encoder's output as wide as the UNet asks for, it predicts the clean latents, noise is added along a
straight line, and the last token is a copy of the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

Commands = Callable[[Sequence[Sequence[str]]], list[tuple[int, str, str]]]
FAMILY = """
from collections.abc import Mapping

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Component, Family, Layers, Noise


class Widen(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, inward: int = 16, outward: int = 20) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inward, outward)

    def forward(self, hidden):
        return self.linear(hidden)


class ToyPipeline(DiffusionPipeline):
    def __init__(self, tokenizer, text_encoder, widen, vae, unet, scheduler):
        super().__init__()
        parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "widen": widen}
        self.register_modules(**parts, vae=vae, unet=unet, scheduler=scheduler)


def encode(components, ids):
    hidden = components["widen"](components["text_encoder"](ids[0])[0])
    return torch.cat([hidden, hidden[:, :1]], 1)


def predict(components, noisy, timesteps, embeddings):
    return components["unet"](noisy, timesteps, embeddings[:, :-1]).sample


def add_noise(components, latents, noise, timesteps):
    share = (timesteps / 1000).view(-1, 1, 1, 1)
    return (1 - share) * latents + share * noise


def check_fit(components):
    if components["widen"].config.outward != components["unet"].config.cross_attention_dim:
        raise ValueError("widen and unet are not of one width")


FAMILIES.add(
    Family(
        name="toy",
        title="Toy Diffusion",
        summary="Toy Diffusion: everything a little different.",
        pipeline=ToyPipeline,
        components=shared.COMPONENTS | {"widen": Component(("config.json",), Widen.from_config)},
        matches=lambda configs: configs["widen"]["inward"] == 16,
        check_fit=check_fit,
        encode=encode,
        uncond=lambda empty, settings: 0.5 * empty,
        predict=predict,
        noise=Noise(add_noise, lambda components, latents, noise, timesteps: latents),
        layers=Layers(
            group=lambda name: "cross-attention" if ".to_k." in name else "other",
            is_cross_attention=lambda name: False,
            is_key_or_value=lambda name: ".attn2.to_k." in name,
        ),
        extra_tokens=1,
    )
)
"""
MAKE = """
import sys
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from toy_family import Widen
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion

torch.manual_seed(0)
tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1])
text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
                      bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=20,
                            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2)
vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)
components = {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(text), "widen": Widen(), "vae": vae, "unet": unet,
              "scheduler": DDIMScheduler(prediction_type="sample", clip_sample=False)}
model = Diffusion(FAMILIES.find("toy"), components, source="toy")
save_pipeline(model, "model")
back = load("model")
assert back.family.name == "toy"
assert torch.equal(back.encode_prompts(["a"]), model.encode_prompts(["a"]))
assert back.components["widen"].linear.weight.requires_grad is False
assert Diffusion.from_pipeline(back.pipeline()).family.name == "toy"
"""


def test_a_fourth_family_is_one_file(
    plug_ins: Callable[..., Commands], tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    commands = plug_ins({"toy_family": FAMILY}, "[erase_concept.families]\ntoy = toy_family\n")
    tokenizer.save_pretrained(tmp_path / "words")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    }
    make = [sys.executable, "-c", MAKE, "words"]
    made = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (tmp_path / "p.csv").write_text("prompt,seed\na square,1\na line,2\n")
    (tmp_path / "square.yaml").write_text(
        "name: square\nkind: custom\nanchor: circle\ntemplates: ['a {O}']\nretain: [circle, line]\n"
    )
    sizes = [part for size in ("forget=2", "retain=2", "steps=2") for part in ("--set", f"data.{size}")]
    settings = ["--set", "steps=1", "--set", "batch_size=2", "--set", "lr=0.01"]
    scope = ["--mask", "salient", "--scope", "cross-attention", "--sparsity", "0.5"]
    erase = ["erase", "model", "-c", "square.yaml", "--method", "salun", *scope, *sizes, *settings, "-o", "run"]
    *done, refused = commands(
        [
            ["sample", "model", "-p", "p.csv", "-o", "images", "--steps", "2"],
            [*erase, "--dry-run", "--json"],
            erase,
            ["mask-info", "run/mask.safetensors", "--json"],
            ["export", "run", "--format", "lora", "-o", "square.safetensors"],
            ["export", "run", "--format", "single-file", "-o", "one.safetensors"],
        ]
    )
    for code, _, err in done:
        assert code == 0, err
    assert "widen" in json.loads((tmp_path / "images" / "sampling.json").read_text())
    _, plan, _, about, _ = (out for _, out, _ in done)
    assert json.loads(plan)["expected"]
    account = json.loads((tmp_path / "run" / "run.json").read_text())
    assert account["base"]["family"] == "Toy Diffusion"
    assert account["checks"]["changed_outside_mask"] == 0
    before, after = (
        load_file(tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in ("model", "run/pipeline")
    )
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed
    assert all(".to_k." in name for name in changed)  # what this family calls cross-attention
    mask = json.loads(about)["masks"]["run/mask.safetensors"]
    assert mask["kinds"]["cross-attention"] == pytest.approx(0.5, abs=0.01)
    assert (refused[0], "of the family Toy Diffusion has no layout" in refused[2]) == (2, True)
    assert not (tmp_path / "one.safetensors").exists()
