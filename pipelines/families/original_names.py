"""The names of tensors in original checkpoints, under which Stable Diffusion was published.

AUTOMATIC1111 and ComfyUI load this layout. diffusers gives the same weights other names: it counts the UNet's blocks
level by level, where the original counts them through. How many levels, layers and attentions there are is read from
the names themselves. A *module* here is a tensor's name without its last part, "weight" or "bias".
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from erase_concept.pipelines.families.family import Layout, State

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _PROJECTIONS),
)
_VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_RESNET = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", **dict(zip(_PROJECTIONS, ("q", "k", "v", "proj_out"), strict=True))}
_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_CLIP_LAYER = {
    **{f"self_attn.{which}_proj": "attn.in_proj" for which in "qkv"},
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_table(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each of a UNet2DConditionModel's tensors.

    Raises ValueError for the first name that the original UNet has no tensor for.
    """
    names = dict.fromkeys(names)
    places = dict(_UNET_ENDS)
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    attentions = {"mid_block.attentions.0": "middle_block.1"}
    for way, blocks, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):  # input_blocks.0 is conv_in
        index = first
        for level in range(_count(names, f"{way}_blocks", "resnets.0.conv1")):
            here = f"{way}_blocks.{level}"
            for layer in range(_count(names, f"{here}.resnets", "conv1")):
                resnets[f"{here}.resnets.{layer}"] = f"{blocks}.{index}.0"
                attentions[f"{here}.attentions.{layer}"] = f"{blocks}.{index}.1"
                index += 1
            if way == "up":  # an upsampler gets no number of its own: it comes last in the last block of its level
                last = 2 if f"{here}.attentions.0.norm.weight" in names else 1
                places[f"{here}.upsamplers.0.conv"] = f"{blocks}.{index - 1}.{last}.conv"
            elif f"{here}.downsamplers.0.conv.weight" in names:
                places[f"{here}.downsamplers.0.conv"] = f"{blocks}.{index}.0.op"
                index += 1
    places |= _inside(resnets, _UNET_RESNET)
    for here, there in attentions.items():
        depth = range(_count(names, f"{here}.transformer_blocks", "norm1"))
        inner = (f"transformer_blocks.{block}.{name}" for block in depth for name in _TRANSFORMER)
        places |= _inside({here: there}, {name: name for name in ("norm", "proj_in", "proj_out", *inner)})
    return _table(names, places, _UNET)


def vae_table(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each of an AutoencoderKL's tensors.

    Raises ValueError for the first name that the original VAE has no tensor for.
    """
    names = dict.fromkeys(names)
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        resnets = {f"{side}.mid_block.resnets.{layer}": f"{side}.mid.block_{layer + 1}" for layer in (0, 1)}
        levels = _count(names, f"{side}.{way}_blocks", "resnets.0.conv1")
        for level in range(levels):
            here = f"{side}.{way}_blocks.{level}"
            # The original counts the levels from the image on, diffusers in the order of computing.
            there = f"{side}.{way}.{level if way == 'down' else levels - level - 1}"
            for layer in range(_count(names, f"{here}.resnets", "conv1")):
                resnets[f"{here}.resnets.{layer}"] = f"{there}.block.{layer}"
            places[f"{here}.{way}samplers.0.conv"] = f"{there}.{way}sample.conv"
        places |= _inside({side: side}, _VAE_ENDS) | _inside(resnets, _VAE_RESNET)
        places |= _inside({f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}, _VAE_ATTENTION)
    return _table(names, places, _VAE)


def open_clip_table(names: Iterable[str]) -> dict[str, str]:
    """Return OpenCLIP's name of each of a text encoder's tensors, one and the same for the queries, keys and values.

    The names are those of CLIPTextModel in transformers 5. Raises ValueError for the first one without a tensor there.
    """
    names = dict.fromkeys(names)
    layers = range(_count(names, "encoder.layers", "layer_norm1"))
    blocks = {f"encoder.layers.{layer}": f"transformer.resblocks.{layer}" for layer in layers}
    table = _table(names, _CLIP_ENDS | _inside(blocks, _CLIP_LAYER), "")
    # These two are no modules there, so their parameters have other names.
    for module, bare in ((".in_proj.", ".in_proj_"), ("positional_embedding.weight", "positional_embedding")):
        table = {name: original.replace(module, bare) for name, original in table.items()}
    return table


def _pack_vae(names: Mapping[str, str], state: State) -> dict[str, Tensor]:
    """Make the attention's matrices [c, c] 1 x 1 convolutions [c, c, 1, 1], as the original has them."""
    tensors = {original: state[name] for name, original in names.items()}
    return {key: value[:, :, None, None] if value.ndim == 2 else value for key, value in tensors.items()}


def _unpack_vae(name: str, original: str, value: Tensor, like: Tensor) -> Tensor:
    return value[:, :, 0, 0] if like.ndim == 2 and value.ndim == 4 else value


def _clip_names(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Name the tensors of OpenAI's text encoder as transformers 4 does, whose names the original has."""
    bare = {name: name.removeprefix("text_model.") for name in names}
    open_clip_table(bare.values())  # refuses what is no part of a text encoder
    return {name: f"{prefix}text_model.{plain}" for name, plain in bare.items()}


def _open_clip_names(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Name the tensors of OpenCLIP's text encoder, and its projection where it has one."""
    full = {name.removeprefix("text_model."): name for name in names}
    projection = full.pop("text_projection.weight", None)
    table = {full[plain]: prefix + original for plain, original in open_clip_table(full).items()}
    return table | ({} if projection is None else {projection: f"{prefix}text_projection"})


def _pack_open_clip(names: Mapping[str, str], state: State) -> dict[str, Tensor]:
    """Stack the matrices of queries, keys and values [c, c] to one [3 c, c], and transpose the projection.

    Of Stable Diffusion 2's 24 layers the last one is never used, and diffusers' models do not have it.
    """
    tensors: dict[str, Tensor] = {}
    for name, original in names.items():
        if original.endswith("text_projection"):
            tensors[original] = state[name].T
        elif ".in_proj_" in original:
            layer, kind = name.partition(".self_attn.")[0], original.rpartition("_")[2]
            pieces = [f"{layer}.self_attn.{which}_proj.{kind}" for which in "qkv"]
            if not state.keys() >= set(pieces):
                raise ValueError(f"{name} has no place in an original checkpoint without the others of {pieces}")
            tensors[original] = torch.cat([state[piece] for piece in pieces])
        else:
            tensors[original] = state[name]
    return tensors


def _unpack_open_clip(name: str, original: str, value: Tensor, like: Tensor) -> Tensor:
    if ".in_proj_" in original:
        return value.chunk(3)["qkv".index(name.rpartition("_proj.")[0][-1])]
    return value.T.contiguous() if original.endswith("text_projection") else value


UNET = Layout(_UNET, unet_table)
VAE = Layout(_VAE, vae_table, _pack_vae, _unpack_vae)


def clip(prefix: str) -> Layout:
    """Return the layout of OpenAI's text encoder, CLIP."""
    return Layout(prefix, partial(_clip_names, prefix))


def open_clip(prefix: str) -> Layout:
    """Return the layout of OpenCLIP's text encoders."""
    return Layout(prefix, partial(_open_clip_names, prefix), _pack_open_clip, _unpack_open_clip)


def _inside(places: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Return the places of the modules inside each of the given ones."""
    return {f"{a}.{name}": f"{b}.{original}" for a, b in places.items() for name, original in names.items()}


def _table(names: Iterable[str], places: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the original name of each tensor, given where in the original each module is."""
    table: dict[str, str] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        if module not in places or kind not in {"weight", "bias"}:
            raise ValueError(f"{name} has no place in an original checkpoint")
        table[name] = f"{prefix}{places[module]}.{kind}"
    return table


def _count(names: Container[str], before: str, after: str) -> int:
    """Return how many modules "before.0.after", "before.1.after" and so on there are, up to the first gap."""
    return next(index for index in itertools.count() if f"{before}.{index}.{after}.weight" not in names)
