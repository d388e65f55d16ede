"""Names by which other programs look for weights, held against what is written for models of the published sizes.

Each program's facts are stated here in our own words, beside the file of its source that has them. They are formulas of
their own, independent of the tables of this package. Models are on the meta device, so nothing takes memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.lora import Style, layers_found, lora_layers, lora_names
from erase_concept.pipelines.formats.modelspec import kohya_base
from erase_concept.pipelines.formats.prediction import Prediction
from erase_concept.pipelines.formats.single_file import to_original
from erase_concept.pipelines.formats.weights import published_name

NAMES = ("sd1", "sd2", "sdxl")
# Transformer blocks in an attention of each level of the UNet and of its middle; two residual blocks a level.
DEPTHS = {"sd1": ((1, 1, 1, 0), 1), "sd2": ((1, 1, 1, 0), 1), "sdxl": ((0, 2, 10), 10)}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER = [
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"attn{i}.to_{which}" for i in (1, 2) for which in ("q", "k", "v", "out.0")),
]


@cache
def modules(family: str) -> dict[str, nn.Module]:
    """The components of the published model, without memory behind them."""
    record = FAMILIES.find(family)
    configs = record.single_file.configs({})
    with torch.device("meta"):
        return {part: one.make(configs[part]) for part, one in record.components.items() if one.make}


@cache
def original(family: str) -> dict[str, torch.Size]:
    """The shapes in the single file that is written of it."""
    states = {part: module.state_dict() for part, module in modules(family).items()}
    return {key: value.shape for key, value in to_original(states, FAMILIES.find(family)).items()}


def keys(family: str, style: Style = "kohya") -> dict[str, str]:
    """The names in its LoRA by those of its layers."""
    names = lora_names(modules(family)["unet"], FAMILIES.find(family), style)
    return {weight.removesuffix(".weight"): name for weight, name in names.items()}


def flat(name: str) -> str:
    return name.replace(".", "_")


def comfyui(family: str) -> dict[str, str]:
    """Diffusers' and the original name of each module of a UNet (comfy/utils.py, unet_to_diffusers)."""

    def attention(here: str, there: str, depth: int) -> Iterator[tuple[str, str]]:
        inner = [f"transformer_blocks.{block}.{name}" for block in range(depth) for name in TRANSFORMER]
        yield from ((f"{here}.{name}", f"{there}.{name}") for name in ("norm", "proj_in", "proj_out", *inner))

    def resnet(here: str, there: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{here}.{name}", f"{there}.{other}") for name, other in RESNET.items())

    depths, middle = DEPTHS[family]
    found = [("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    found += [(f"time_embedding.linear_{i + 1}", f"time_embed.{2 * i}") for i in (0, 1)]
    found += [(f"add_embedding.linear_{i + 1}", f"label_emb.0.{2 * i}") for i in (0, 1)]
    found += [*resnet("mid_block.resnets.0", "middle_block.0"), *resnet("mid_block.resnets.1", "middle_block.2")]
    found += attention("mid_block.attentions.0", "middle_block.1", middle)
    for level, depth in enumerate(depths):
        for i in (0, 1):
            found += resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{3 * level + i + 1}.0")
            if depth:
                found += attention(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{3 * level + i + 1}.1", depth)
        found.append((f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"))
        up = len(depths) - 1 - level
        for i in (0, 1, 2):
            found += resnet(f"up_blocks.{up}.resnets.{i}", f"output_blocks.{3 * up + i}.0")
            if depth:
                found += attention(f"up_blocks.{up}.attentions.{i}", f"output_blocks.{3 * up + i}.1", depth)
        last = f"output_blocks.{3 * up + 2}.{2 if depth else 1}"
        found.append((f"up_blocks.{up}.upsamplers.0.conv", f"{last}.conv"))
    return dict(found)


# How A1111 turns a LoRA's name into a module's (extensions-builtin/Lora/networks.py, convert_diffusers_name_to_compvis;
# these cases are there since version 1.5). A name that is none of these is the original one already.
A1111: dict[str, Callable[..., str]] = {
    r"conv_in": lambda: "input_blocks_0_0",
    r"conv_out": lambda: "out_2",
    r"time_embedding_linear_(\d+)": lambda n: f"time_embed_{2 * int(n) - 2}",
    r"down_blocks_(\d+)_resnets_(\d+)_(.+)": lambda a, b, c: f"input_blocks_{1 + 3 * int(a) + int(b)}_0_{inside(c)}",
    r"down_blocks_(\d+)_attentions_(\d+)_(.+)": lambda a, b, c: f"input_blocks_{1 + 3 * int(a) + int(b)}_1_{c}",
    r"down_blocks_(\d+)_downsamplers_0_conv": lambda a: f"input_blocks_{3 + 3 * int(a)}_0_op",
    r"mid_block_resnets_(\d+)_(.+)": lambda b, c: f"middle_block_{2 * int(b)}_{inside(c)}",
    r"mid_block_attentions_(\d+)_(.+)": lambda b, c: f"middle_block_1_{c}",
    r"up_blocks_(\d+)_resnets_(\d+)_(.+)": lambda a, b, c: f"output_blocks_{3 * int(a) + int(b)}_0_{inside(c)}",
    r"up_blocks_(\d+)_attentions_(\d+)_(.+)": lambda a, b, c: f"output_blocks_{3 * int(a) + int(b)}_1_{c}",
    r"up_blocks_(\d+)_upsamplers_0_conv": lambda a: f"output_blocks_{2 + 3 * int(a)}_{2 if int(a) else 1}_conv",
}


def inside(name: str) -> str:
    """A residual block's layer by the original name."""
    return flat(RESNET.get(name, name))


def a1111(key: str) -> str:
    name = key.removeprefix("lora_unet_")
    for pattern, place in A1111.items():
        if match := re.fullmatch(pattern, name):
            return place(*match.groups())
    return name


def invokeai(unet: nn.Module, key: str) -> nn.Module:
    """The module of a flat name: piece by piece, the first that there is (backend/patches/layer_patcher.py)."""
    module, name, *rest = (unet, *key.removeprefix("lora_unet_").split("_"))
    while rest:
        if name in dict(module.named_children()):
            module, name = module.get_submodule(name), rest.pop(0)
        else:
            name = f"{name}_{rest.pop(0)}"
    return module.get_submodule(name)


def sd_scripts(family: str) -> set[str]:
    """The names of a LoRA's layers in the modules that are looked into (networks/lora.py, LoRANetwork)."""
    kinds = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    owners = [name for name, module in modules(family)["unet"].named_modules() if type(module).__name__ in kinds]
    found = {layer for layer in keys(family) if layer.startswith(tuple(f"{owner}." for owner in owners))}
    return {"lora_unet_" + flat(comfyui(family)[layer] if family == "sdxl" else layer) for layer in found}


@pytest.mark.parametrize("family", NAMES)
def test_every_program_finds_the_layers_of_a_lora_that_are_said_to_be_found(family: str) -> None:
    unet, names, table = modules(family)["unet"], keys(family), comfyui(family)
    assert len(set(names.values())) == len(names) == len(lora_layers(unet))
    places = {"lora_unet_" + flat(name): name for name in table} if family != "sdxl" else {}
    places |= {"lora_unet_" + flat(place): name for name, place in table.items()}  # ComfyUI knows both
    assert {layer: places.get(name) for layer, name in names.items()} == {layer: layer for layer in names}
    assert {layer: a1111(name) for layer, name in names.items()} == {layer: flat(table[layer]) for layer in names}
    if family == "sdxl":  # sdxl_lora_conversion_utils.py: all keys by the original names, or none
        assert all(name.removeprefix("lora_unet_") == flat(table[layer]) for layer, name in names.items())
    else:
        assert all(invokeai(unet, name) is unet.get_submodule(layer) for layer, name in names.items())
    counted = layers_found((f"{layer}.weight" for layer in names), "kohya")
    inside = len(sd_scripts(family) & {*names.values()})
    lost = {"sd1": 4, "sd2": 4, "sdxl": 6}[family]  # conv_in, conv_out, and those of the embeddings
    everywhere = dict.fromkeys(("diffusers", "ComfyUI", "A1111 and Forge", "InvokeAI"), len(names))
    assert counted == everywhere | {"sd-scripts": inside}
    assert inside == len(names) - lost


@pytest.mark.parametrize("family", NAMES)
def test_no_other_program_finds_all_layers_by_the_names_of_diffusers(family: str) -> None:
    names = keys(family, "diffusers")
    # ComfyUI (comfy/lora.py) puts "processor" into an attention's name, A1111 and InvokeAI end a name at the first dot.
    known = {"unet." + name.replace(".to_", ".processor.to_") for name in comfyui(family)}
    lost = [layer for layer, name in names.items() if name not in known]
    assert lost
    assert all(".to_" in layer for layer in lost)
    assert {name.partition(".")[0] for name in names.values()} == {"unet"}
    assert layers_found((f"{layer}.weight" for layer in names), "diffusers") == {"diffusers": len(names)}


def test_a_lora_tells_its_base_model_by_its_metadata_and_by_its_shapes() -> None:
    """A1111 (network.py) reads two of kohya's keys, InvokeAI (model_util.py) the width of the prompts."""
    for family, (version, width) in {"sd1": ("SD1", 768), "sd2": ("SD2", 1024), "sdxl": ("SDXL", 2048)}.items():
        for kind in ("epsilon", "v_prediction"):
            about = kohya_base(FAMILIES.find(family), Prediction(kind))
            xl, two = about["ss_base_model_version"].startswith("sdxl_"), about["ss_v2"] == "True"
            assert ("SDXL" if xl else "SD2" if two else "SD1") == version
        layers = lora_layers(modules(family)["unet"])
        read = {layers[f"{layer}.weight"].shape[1] for layer, name in keys(family).items() if "_attn2_to_k" in name}
        assert read == {width}


def clip(layers: int) -> set[str]:
    """The names of a CLIP text encoder's tensors in ComfyUI (comfy/clip_model.py) and transformers 4."""
    ends = {f"embeddings.{name}_embedding.weight" for name in ("token", "position")}
    parts = [
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
    ]
    inner = [f"encoder.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    ends |= {f"{name}.{kind}" for name in (*inner, "final_layer_norm") for kind in ("weight", "bias")}
    return {f"text_model.{name}" for name in ends}


def from_open_clip(name: str) -> list[str]:
    """CLIP's names for one of OpenCLIP's tensors (ComfyUI's and sd-scripts' conversions agree on them)."""
    ends = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
    }
    if name in ends:
        return [ends[name]]
    name = name.replace("ln_final", "final_layer_norm").replace("transformer.resblocks", "encoder.layers")
    for old, new in (("ln_", "layer_norm"), ("c_fc", "fc1"), ("c_proj", "fc2"), ("attn.out", "self_attn.out")):
        name = name.replace(f".{old}", f".{new}")
    if ".attn.in_proj_" in name:
        return [f"text_model.{name.replace('.attn.in_proj_', f'.self_attn.{p}_proj.')}" for p in ("q", "k", "v")]
    return [f"text_model.{name}"]


# Where the text encoders are in a single file: prefix, layers, and whether by OpenCLIP's names.
TEXT: dict[str, dict[str, tuple[str, int, bool]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", 12, False)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", 23, True)},  # of 24 the last one is never used
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", 12, False),
        "text_encoder_2": ("conditioner.embedders.1.model.", 32, True),
    },
}


@pytest.mark.parametrize("family", NAMES)
def test_text_encoders_have_the_names_that_are_looked_for(family: str) -> None:
    for part, (prefix, layers, open_clip) in TEXT[family].items():
        needed = clip(layers) | ({"text_projection.weight"} if part == "text_encoder_2" else set())
        stored = [key.removeprefix(prefix) for key in original(family) if key.startswith(prefix)]
        assert sorted(name for key in stored for name in (from_open_clip(key) if open_clip else [key])) == sorted(
            needed
        )
        module = modules(family)[part]
        folder = {published_name(module, name) for name in module.state_dict() if not name.endswith("position_ids")}
        assert folder == needed
        # ComfyUI tells the encoders in a folder apart by these layers (comfy/sd.py, detect_te_model).
        marks = {30: "G", 22: "H", 0: "L"}
        kind = next(kind for i, kind in marks.items() if f"text_model.encoder.layers.{i}.mlp.fc1.weight" in folder)
        assert kind == {12: "L", 23: "H", 32: "G"}[layers]


def vae() -> set[str]:
    """The modules of the VAE's halves (ldm/modules/diffusionmodules/model.py, which all programs have in them)."""
    found = {"quant_conv", "post_quant_conv"}
    for half, way, blocks in (("encoder", "down", 2), ("decoder", "up", 3)):
        resnets = [f"mid.block_{i}" for i in (1, 2)]
        resnets += [f"{way}.{level}.block.{i}" for level in range(4) for i in range(blocks)]
        changing = {"down.1.block.0", "down.2.block.0", "up.1.block.0", "up.0.block.0"}  # the number of channels
        names = {f"{r}.{layer}" for r in resnets for layer in ("norm1", "conv1", "norm2", "conv2")}
        names |= {f"{r}.nin_shortcut" for r in resnets if r in changing}
        names |= {f"mid.attn_1.{layer}" for layer in ("norm", "q", "k", "v", "proj_out")}
        names |= {f"{way}.{level}.{way}sample.conv" for level in ((0, 1, 2) if way == "down" else (1, 2, 3))}
        found |= {f"{half}.{name}" for name in (*names, "conv_in", "norm_out", "conv_out")}
    return found


@pytest.mark.parametrize("family", NAMES)
def test_a_single_file_holds_the_modules_of_the_original_model_and_no_others(family: str) -> None:
    prefixes = ["model.diffusion_model.", "first_stage_model.", *(prefix for prefix, *_ in TEXT[family].values())]
    assert all(key.startswith(tuple(prefixes)) for key in original(family))
    held = [
        {key.removeprefix(prefix).rpartition(".")[0] for key in original(family) if key.startswith(prefix)}
        for prefix in prefixes[:2]
    ]
    there = {name for name, _ in modules(family)["unet"].named_modules()}
    assert held == [{place for name, place in comfyui(family).items() if name in there}, vae()]


def shape(family: str, key: str) -> Any:
    return tuple(original(family).get(key, ()))


@pytest.mark.parametrize("family", NAMES)
def test_programs_tell_the_family_of_a_single_file(family: str) -> None:
    unet, attention = "model.diffusion_model.", ".1.transformer_blocks.0.attn2.to_k.weight"
    # ComfyUI (comfy/model_detection.py): the prompts' width, the first channels, the added embedding, a linear proj_in.
    width = next(shape(family, key)[1] for key in original(family) if key.endswith(attention))
    linear = len(next(shape(family, key) for key in original(family) if key.endswith("1.proj_in.weight"))) == 2
    added = shape(family, f"{unet}label_emb.0.0.weight")[1:]
    found = (width, shape(family, f"{unet}input_blocks.0.0.weight")[0], added, linear)
    comfy = {"sd1": (768, 320, (), False), "sd2": (1024, 320, (), True), "sdxl": (2048, 320, (2816,), True)}
    assert found == comfy[family]
    # A1111 (modules/sd_models_config.py): two tensors of the text encoders.
    xl = "conditioner.embedders.1.model.ln_final.weight" in original(family)
    two = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in original(family)
    assert (xl, two) == (family == "sdxl", family == "sd2")
    # InvokeAI (backend/model_manager): the prompts' width in one of two layers.
    read = (shape(family, f"{unet}input_blocks.{block}{attention}")[1:] for block in (2, 4))
    assert next(filter(None, read)) == {"sd1": (768,), "sd2": (1024,), "sdxl": (2048,)}[family]
