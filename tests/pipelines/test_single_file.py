"""Original checkpoints: diffusers reads back exactly what was written, and a replaced UNet leaves the rest alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase_concept.errors import RequestError
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families.original_names import open_clip_table, unet_table, vae_table
from erase_concept.pipelines.formats.single_file import ema_key, replace_unet, save_single_file, to_original
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.model import Diffusion

Shapes = dict[str, list[int] | None]  # None: no such tensor
NAMES = ("sd1", "sd2", "sdxl")
SD1 = FAMILIES.find("sd1")
XL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
# Small channels, but each family's own number of levels, layers, attentions and transformer blocks.
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (4, 8, 8, 8), "cross_attention_dim": 16, "attention_head_dim": 2},
    "sd2": {
        "block_out_channels": (4, 8, 8, 8),
        "cross_attention_dim": 24,
        "attention_head_dim": [1, 2, 2, 2],
        "use_linear_projection": True,
    },
    "sdxl": {
        **XL_BLOCKS,
        "block_out_channels": (4, 8, 8),
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 40,
        "attention_head_dim": [1, 2, 2],
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 36,  # six sizes of 4 each and the pooled text of 12
    },
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights drawn anew: the ones and zeros of a new model look alike wherever they end up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.eval().requires_grad_(False)


def small_unet(family: str, seed: int = 0) -> nn.Module:
    return randomized(UNet2DConditionModel(sample_size=8, norm_num_groups=4, **SMALL_UNETS[family]), seed)


def vae(channels: tuple[int, ...], groups: int) -> AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    shape = {"down_block_types": down, "up_block_types": up, "block_out_channels": channels, "layers_per_block": 2}
    return AutoencoderKL(latent_channels=4, norm_num_groups=groups, sample_size=8 * 2 ** (len(channels) - 1), **shape)


def text_encoder(kind: Any, tokenizer: CLIPTokenizer, width: int, **options: Any) -> Any:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    fixed = {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    return kind(CLIPTextConfig(**(special | shape | fixed | options)))


def small_models(family: str, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    models = {"unet": small_unet(family), "vae": vae((4, 4, 8, 8), 4)}
    models["text_encoder"] = text_encoder(CLIPTextModel, tokenizer, 24 if family == "sd2" else 16)
    if family == "sdxl":
        models["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, tokenizer, 24, projection_dim=12)
    return {part: randomized(model, seed) for seed, (part, model) in enumerate(models.items())}


def states(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {part: dict(model.state_dict()) for part, model in models.items()}


def small_states(tokenizer: CLIPTokenizer, family: str = "sd1") -> dict[str, dict[str, Tensor]]:
    return states(small_models(family, tokenizer))


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers 5."""
    return {name.removeprefix("text_model."): t for name, t in tensors.items()}


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def full_states(family: str) -> dict[str, dict[str, Tensor]]:
    """The parts of the published models, without memory behind them."""
    record = FAMILIES.find(family)
    configs = record.single_file.configs({})
    with torch.device("meta"):
        models = {part: one.make(configs[part]) for part, one in record.components.items() if one.make}
    return states(models)


@pytest.mark.parametrize("family", NAMES)
def test_diffusers_converters_give_back_the_same_model(family: str, tokenizer: CLIPTokenizer) -> None:
    models = small_models(family, tokenizer)
    parts, configs = states(models), {part: dict(models[part].config) for part in ("unet", "vae")}
    original = to_original(parts, FAMILIES.find(family))
    assert bits(convert_ldm_unet_checkpoint(dict(original), configs["unet"])) == bits(parts["unet"])
    assert bits(convert_ldm_vae_checkpoint(dict(original), configs["vae"])) == bits(parts["vae"])
    if family != "sd2":
        text = convert_ldm_clip_checkpoint(dict(original))
        assert all(name.startswith("text_model.") for name in text)
        assert bits(without_prefix(text)) == bits(without_prefix(parts["text_encoder"]))
    if family != "sd1":
        part = "text_encoder" if family == "sd2" else "text_encoder_2"
        prefix = "cond_stage_model.model." if family == "sd2" else "conditioner.embedders.1.model."
        text = convert_open_clip_checkpoint(models[part], dict(original), prefix=prefix)
        assert bits(without_prefix(text)) == bits(without_prefix(parts[part]))


@pytest.mark.parametrize("family", NAMES)
def test_from_single_file_loads_what_was_saved(family: str, tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    models = small_models(family, tokenizer)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    folder, file = tmp_path / "config", tmp_path / "model.safetensors"
    with silence_hub_logs():
        if family == "sdxl":
            kind: Any = StableDiffusionXLPipeline
            pipeline = kind(**models, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler)
        else:
            kind = StableDiffusionPipeline
            extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = kind(**models, tokenizer=tokenizer, scheduler=scheduler, **extras)
        pipeline.save_pretrained(folder)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()  # the weights must come from the single file
        save_single_file(states(models), FAMILIES.find(family), file, {})
        loaded = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for part, model in models.items():
        assert bits(getattr(loaded, part).state_dict()) == bits(model.state_dict()), part


def test_a_unet_of_other_depths_and_a_vae_without_attention_have_their_places(tiny: Diffusion) -> None:
    unet, config = tiny.unet.state_dict(), dict(tiny.unet.config)
    table = unet_table(unet)
    back = convert_ldm_unet_checkpoint({original: unet[name] for name, original in table.items()}, config)
    assert bits(back) == bits(unet)
    ways = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    plain = AutoencoderKL(**ways, block_out_channels=(4, 8), norm_num_groups=4, mid_block_add_attention=False)
    assert not any(".attn_1." in original for original in vae_table(plain.state_dict()).values())
    # Levels of different depth: the numbers go on from where the last level ended.
    uneven = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=(1, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    places = unet_table(uneven.state_dict())
    assert len(set(places.values())) == len(places)
    assert places["down_blocks.0.downsamplers.0.conv.weight"] == "model.diffusion_model.input_blocks.2.0.op.weight"
    assert places["down_blocks.1.attentions.2.norm.bias"] == "model.diffusion_model.input_blocks.5.1.norm.bias"
    assert places["up_blocks.0.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.3.2.conv.bias"
    assert places["up_blocks.1.resnets.1.norm1.bias"] == "model.diffusion_model.output_blocks.5.0.in_layers.0.bias"


# Tensors of the published UNets, and how many weights they have together.
UNET_SIZES: dict[str, tuple[int, int]] = {
    "sd1": (686, 859_520_964),
    "sd2": (686, 865_910_724),
    "sdxl": (1680, 2_567_463_684),
}
# Tensors of the published files, less what diffusers' models do not have: position_ids of OpenAI's text encoder (1131
# in v1-5-pruned-emaonly, 2515 in sd_xl_base_1.0), logit_scale of OpenCLIP, and in SD 2 its last layer and projection.
FILE_SIZES: dict[str, int] = {"sd1": 1131 - 1, "sd2": 686 + 248 + 23 * 12 + 4, "sdxl": 2515 - 2}
UNETS_SHARE: Shapes = {
    "time_embed.0.weight": [1280, 320],
    "time_embed.2.weight": [1280, 1280],
    "input_blocks.0.0.weight": [320, 4, 3, 3],
    "input_blocks.1.0.in_layers.0.weight": [320],
    "input_blocks.1.0.in_layers.2.weight": [320, 320, 3, 3],
    "input_blocks.1.0.emb_layers.1.weight": [320, 1280],
    "input_blocks.1.0.out_layers.0.bias": [320],
    "input_blocks.1.0.out_layers.3.weight": [320, 320, 3, 3],
    "input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
    "input_blocks.6.0.op.bias": [640],
    "middle_block.0.in_layers.0.weight": [1280],
    "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": [10240, 1280],
    "middle_block.2.out_layers.3.weight": [1280, 1280, 3, 3],
    "output_blocks.0.0.in_layers.0.weight": [2560],
    "out.0.weight": [320],
    "out.2.weight": [4, 320, 3, 3],
}
FOUR_LEVELS: Shapes = {
    "input_blocks.9.0.op.weight": [1280, 1280, 3, 3],
    "input_blocks.11.0.emb_layers.1.weight": [1280, 1280],
    "output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
    "output_blocks.8.2.conv.weight": [640, 640, 3, 3],
    "output_blocks.9.0.skip_connection.weight": [320, 960, 1, 1],
    "output_blocks.11.0.in_layers.0.weight": [640],
    "output_blocks.11.1.proj_out.bias": [320],
}
UNET_SHAPES: dict[str, Shapes] = {
    "sd1": FOUR_LEVELS
    | {
        "input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": [320],
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
        "input_blocks.8.1.transformer_blocks.0.ff.net.2.weight": [1280, 5120],
        "output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight": [1280, 768],
        "label_emb.0.0.weight": None,
        "output_blocks.2.2.conv.weight": None,
    },
    "sd2": FOUR_LEVELS
    | {
        "input_blocks.1.1.proj_in.weight": [320, 320],
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
        "output_blocks.11.1.transformer_blocks.0.norm1.bias": [320],
    },
    "sdxl": {
        "label_emb.0.0.weight": [1280, 2816],
        "label_emb.0.2.weight": [1280, 1280],
        "input_blocks.1.1.norm.weight": None,
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": [640, 2048],
        "input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048],
        "input_blocks.9.0.op.weight": None,
        "middle_block.1.transformer_blocks.9.norm3.bias": [1280],
        "output_blocks.2.1.transformer_blocks.9.attn1.to_q.weight": [1280, 1280],
        "output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
        "output_blocks.3.0.in_layers.2.weight": [640, 1920, 3, 3],
        "output_blocks.3.1.proj_in.weight": [640, 640],
        "output_blocks.5.2.conv.weight": [640, 640, 3, 3],
        "output_blocks.8.0.skip_connection.weight": [320, 640, 1, 1],
        "output_blocks.9.0.in_layers.0.weight": None,
    },
}
VAE_SHAPES: Shapes = {
    "encoder.conv_in.weight": [128, 3, 3, 3],
    "encoder.down.0.downsample.conv.weight": [128, 128, 3, 3],
    "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
    "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "encoder.mid.block_2.norm1.weight": [512],
    "encoder.norm_out.weight": [512],
    "encoder.conv_out.weight": [8, 512, 3, 3],
    "quant_conv.weight": [8, 8, 1, 1],
    "post_quant_conv.weight": [4, 4, 1, 1],
    "decoder.conv_in.weight": [512, 4, 3, 3],
    "decoder.mid.attn_1.norm.bias": [512],
    "decoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
    "decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
    "decoder.up.1.block.0.conv1.weight": [256, 512, 3, 3],
    "decoder.up.3.block.2.conv2.weight": [512, 512, 3, 3],
    "decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
    "decoder.up.0.upsample.conv.weight": None,
    "decoder.norm_out.weight": [128],
    "decoder.conv_out.weight": [3, 128, 3, 3],
}
CLIP_L_SHAPES: Shapes = {
    "text_model.embeddings.token_embedding.weight": [49408, 768],
    "text_model.embeddings.position_embedding.weight": [77, 768],
    "text_model.encoder.layers.11.self_attn.q_proj.weight": [768, 768],
    "text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
    "text_model.encoder.layers.0.layer_norm2.bias": [768],
    "text_model.final_layer_norm.weight": [768],
}


def open_clip_shapes(width: int, last: int) -> Shapes:
    block = f"transformer.resblocks.{last}"
    return {
        "token_embedding.weight": [49408, width],
        "positional_embedding": [77, width],
        "ln_final.bias": [width],
        f"{block}.attn.in_proj_weight": [3 * width, width],
        f"{block}.attn.in_proj_bias": [3 * width],
        f"{block}.attn.out_proj.weight": [width, width],
        f"{block}.ln_1.weight": [width],
        f"{block}.ln_2.bias": [width],
        f"{block}.mlp.c_fc.weight": [4 * width, width],
        f"{block}.mlp.c_proj.weight": [width, 4 * width],
        f"transformer.resblocks.{last + 1}.ln_1.weight": None,
    }


TEXT_SHAPES: dict[str, dict[str, Shapes]] = {
    "sd1": {"cond_stage_model.transformer.": CLIP_L_SHAPES},
    "sd2": {"cond_stage_model.model.": open_clip_shapes(1024, 22)},
    "sdxl": {
        "conditioner.embedders.0.transformer.": CLIP_L_SHAPES,
        "conditioner.embedders.1.model.": open_clip_shapes(1280, 31) | {"text_projection": [1280, 1280]},
    },
}


@pytest.mark.parametrize("family", NAMES)
def test_published_models_get_the_names_and_shapes_of_their_files(family: str) -> None:
    parts = full_states(family)
    table, vae_names = unet_table(parts["unet"]), vae_table(parts["vae"])
    assert (len(table), sum(t.numel() for t in parts["unet"].values())) == UNET_SIZES[family]
    assert len(vae_names) == 248
    for names in (table, vae_names):
        assert len(set(names.values())) == len(names)
    original = to_original(parts, FAMILIES.find(family))
    assert len(original) == FILE_SIZES[family]
    assert sum(t.numel() for t in original.values()) == sum(t.numel() for part in parts.values() for t in part.values())
    shapes = {key: list(t.shape) for key, t in original.items()}
    known = {"model.diffusion_model.": UNETS_SHARE | UNET_SHAPES[family], "first_stage_model.": VAE_SHAPES}
    for prefix, expected in (known | TEXT_SHAPES[family]).items():
        for key, shape in expected.items():
            assert shapes.get(prefix + key) == shape, prefix + key


def test_stacks_queries_keys_and_values_and_transposes_the_projection(tokenizer: CLIPTokenizer) -> None:
    parts = small_states(tokenizer, "sdxl")
    original, text = to_original(parts, FAMILIES.find("sdxl")), without_prefix(parts["text_encoder_2"])
    for kind in ("weight", "bias"):
        stacked = original[f"conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_{kind}"]
        for piece, which in zip(stacked.chunk(3), "qkv", strict=True):
            assert torch.equal(piece, text[f"encoder.layers.1.self_attn.{which}_proj.{kind}"])
    projection = original["conditioner.embedders.1.model.text_projection"]
    assert projection.shape == (24, 12)
    assert torch.equal(projection.T, text["text_projection.weight"])


@pytest.mark.parametrize("family", NAMES)
def test_text_encoders_of_transformers_4_and_5_are_written_alike(family: str, tokenizer: CLIPTokenizer) -> None:
    new = {part: without_prefix(state) for part, state in small_states(tokenizer, family).items()}
    old = {
        part: {
            n if not part.startswith("text") or n.startswith("text_proj") else f"text_model.{n}": t
            for n, t in s.items()
        }
        for part, s in new.items()
    }
    assert bits(to_original(new, FAMILIES.find(family))) == bits(to_original(old, FAMILIES.find(family)))


@pytest.mark.parametrize(
    ("family", "part", "name"),
    [
        ("sd1", "unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        ("sd1", "unet", "down_blocks.3.attentions.0.norm.scale"),
        ("sd1", "unet", "time_embedding.cond_proj.weight"),
        ("sd1", "vae", "encoder.mid_block.attentions.1.to_q.weight"),
        ("sd1", "text_encoder", "text_projection.weight"),
        ("sd2", "text_encoder", "encoder.layers.3.layer_norm1.scale"),
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.7.mlp.fc1.weight"),
    ],
)
def test_names_the_first_tensor_without_a_place(
    family: str, part: str, name: str, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    parts = small_states(tokenizer, family)
    parts[part] |= {name: torch.zeros(1), "zzz.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"^{part}: {name.removeprefix('text_model.')} has no place"):
        save_single_file(parts, FAMILIES.find(family), tmp_path / "m.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_refuses_other_parts_than_the_family_has(tokenizer: CLIPTokenizer) -> None:
    parts = small_states(tokenizer)
    with pytest.raises(ValueError, match="sdxl has the parts unet, vae, text_encoder, text_encoder_2; got unet, vae"):
        to_original(parts, FAMILIES.find("sdxl"))
    with pytest.raises(ValueError, match="sd1 has the parts"):
        to_original({**parts, "text_encoder_2": parts["text_encoder"]}, FAMILIES.find("sd1"))
    parts["text_encoder"] = without_prefix(parts["text_encoder"])
    del parts["text_encoder"]["encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"text_encoder: encoder.layers.1.self_attn.[qv]_proj.bias has no place"):
        to_original(parts, FAMILIES.find("sd2"))
    assert set(open_clip_table(["final_layer_norm.bias"]).values()) == {"ln_final.bias"}


def test_saves_each_tensor_as_it_is_with_the_metadata(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    parts = small_states(tokenizer)
    parts["unet"] = {name: t.half() for name, t in parts["unet"].items()}
    weight = parts["unet"]["conv_out.weight"]
    parts["unet"]["conv_out.weight"] = weight.transpose(2, 3).contiguous().transpose(2, 3)
    file = tmp_path / "new" / "m.safetensors"
    save_single_file(parts, FAMILIES.find("sd1"), file, {"concept": "church"})
    assert bits(load_file(file)) == bits(to_original(parts, FAMILIES.find("sd1")))
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt", "concept": "church"}
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]


@pytest.fixture
def published(tokenizer: CLIPTokenizer, tmp_path: Path) -> Path:
    """A checkpoint as people publish them: of mixed types, with things in it that no pipeline asks for."""
    odd = {
        "alphas_cumprod": torch.tensor([float("nan"), -0.0, 1e-40, float("inf")]),
        "model_ema.decay": torch.tensor(0.9999, dtype=torch.float64),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "mask": torch.tensor([True, False, True]),
        "small": torch.randn(5).to(torch.float8_e4m3fn),
        "brain": torch.randn(3).bfloat16(),
        "none": torch.zeros(0),
    }
    tensors = to_original(small_states(tokenizer), FAMILIES.find("sd1"))
    half = {key: t.half() for key, t in tensors.items() if key.startswith("model.diffusion_model.")}
    half["model.diffusion_model.out.2.bias"] = half["model.diffusion_model.out.2.bias"].float()
    file = tmp_path / "published.safetensors"
    save_file({**tensors, **half, **odd}, file, {"modelspec.title": "Mine", "concept": "none"})
    return file


def test_replaces_the_unet_and_nothing_else(published: Path, tmp_path: Path) -> None:
    unet, before, file = small_unet("sd1", seed=9).state_dict(), sha(published), tmp_path / "out" / "e.safetensors"
    replace_unet(published, unet, SD1, file, {"concept": "church"})
    assert sha(published) == before
    old, new = load_file(published), load_file(file)
    assert list(new) == list(old)
    table = unet_table(unet)
    # The average of the old UNet over its training would bring back what was erased.
    averages = {ema_key(original): name for name, original in table.items()}
    assert averages.keys() & old.keys() == {"model_ema.diffusion_modelinput_blocks00weight"}
    assert torch.equal(new["model_ema.diffusion_modelinput_blocks00weight"], unet["conv_in.weight"])
    rest = set(old) - set(table.values()) - set(averages)
    assert {"alphas_cumprod", "model_ema.decay", "small", "none"} <= rest
    assert bits({key: new[key] for key in rest}) == bits({key: old[key] for key in rest})
    kept_types = {original: unet[name].to(old[original].dtype) for name, original in table.items()}
    assert {str(t.dtype) for t in kept_types.values()} == {"torch.float16", "torch.float32"}
    assert bits({key: new[key] for key in kept_types}) == bits(kept_types)
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt", "concept": "church"}  # the title is the base's
    replace_unet(
        file, {name: old[original] for name, original in table.items()}, SD1, tmp_path / "back.safetensors", {}
    )
    back = load_file(tmp_path / "back.safetensors")
    assert bits({key: back[key] for key in old if key not in averages}) == bits(
        {key: value for key, value in old.items() if key not in averages}
    )


def test_refuses_a_source_with_another_unet_and_says_where(published: Path, tmp_path: Path) -> None:
    unet, file = small_unet("sd1").state_dict(), tmp_path / "e.safetensors"
    before = sha(published)
    wide = dict(unet) | {"mid_block.resnets.1.conv1.weight": torch.zeros(8, 9, 3, 3)}
    lost = {name: t for name, t in unet.items() if name != "conv_norm_out.weight"}
    for other, message in (
        (small_unet("sdxl").state_dict(), r"label_emb\.0\.0\.weight is nothing in the file, \[16, 36\] in the UNet"),
        (wide, r"middle_block\.2\.in_layers\.2\.weight is \[8, 8, 3, 3\] in the file, \[8, 9, 3, 3\] in the UNet"),
        (lost, r"model\.diffusion_model\.out\.0\.weight is \[4\] in the file, nothing in the UNet"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            replace_unet(published, other, SD1, file, {})
        assert refused.value.setting == "model"
    counted = load_file(published) | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)}
    save_file(counted, tmp_path / "int.safetensors")
    with pytest.raises(RequestError, match=r"out\.2\.bias is torch\.int8, no kind of float"):
        replace_unet(tmp_path / "int.safetensors", unet, SD1, file, {})
    with pytest.raises(ValueError, match=r"^zzz\.weight has no place"):
        replace_unet(published, {**unet, "zzz.weight": torch.zeros(1)}, SD1, file, {})
    assert not file.exists()
    assert sha(published) == before


def test_refuses_a_source_that_cannot_be_read_or_is_the_target(published: Path, tmp_path: Path) -> None:
    unet, file = small_unet("sd1").state_dict(), tmp_path / "e.safetensors"
    cut, text, pickled = (tmp_path / name for name in ("cut.safetensors", "text.safetensors", "m.ckpt"))
    cut.write_bytes(published.read_bytes()[:-100])
    text.write_text("no model")
    for source in (cut, text, tmp_path / "missing.safetensors"):
        with pytest.raises(RequestError, match="is not a readable safetensors file"):
            replace_unet(source, unet, SD1, file, {})
    with pytest.raises(RequestError, match=r"a \.safetensors file is needed"):
        replace_unet(pickled, unet, SD1, file, {})
    before = sha(published)
    with pytest.raises(RequestError, match="never written to"):
        replace_unet(published, unet, SD1, tmp_path / "out" / ".." / published.name, {})
    assert sha(published) == before
    assert not file.exists()
