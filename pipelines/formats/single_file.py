"""Original checkpoints: a whole Stable Diffusion 1.x, 2.x or XL in one file, under the names it was published with.

This is the layout that AUTOMATIC1111 and ComfyUI load. diffusers gives the same weights other names: it counts the
UNet's blocks level by level where the original counts them through. How many levels, layers and attentions there are
is read from the names themselves. A *module* here is a tensor's name without its last part, "weight" or "bias".
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write

Family = Literal["sd1", "sd2", "sdxl"]

# Where each family has its text encoders: OpenAI's in "transformer", OpenCLIP's in "model".
_TEXT_ENCODERS: dict[Family, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_UNET = "model.diffusion_model."
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
    return _table(names, places, "first_stage_model.")


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


def to_original(parts: Mapping[str, Mapping[str, Tensor]], family: Family) -> dict[str, Tensor]:
    """Return the tensors of an original checkpoint, sharing memory with the given ones where they stay as they are.

    ``parts`` holds the state dicts of "unet", "vae", "text_encoder" and, for "sdxl" alone, "text_encoder_2".

    Raises ValueError when these are not the parts, and one naming the first tensor that has no place.
    """
    encoders = _TEXT_ENCODERS[family]
    if parts.keys() != {"unet", "vae", *encoders}:
        raise ValueError(f"{family} is made of unet, vae, {', '.join(encoders)}; got {', '.join(parts) or 'nothing'}")
    tensors: dict[str, Tensor] = {}
    for part, state in parts.items():
        try:
            if part == "unet":
                tensors |= {original: state[name] for name, original in unet_table(state).items()}
            elif part == "vae":
                tensors |= _vae(state)
            else:
                convert = _open_clip if encoders[part].endswith(".model.") else _clip
                tensors |= {encoders[part] + original: value for original, value in convert(state).items()}
        except ValueError as problem:
            raise ValueError(f"{part}: {problem}") from None
    return tensors


def from_original(
    tensors: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]], family: Family
) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of each part from an original checkpoint's tensors: what ``to_original`` does, undone.

    ``states`` says which tensors the parts need, and of which shapes: their own state dicts, on the meta device maybe.

    Raises ValueError naming the first tensor that is missing or has another shape.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part, state in states.items():
        prefix = _TEXT_ENCODERS[family].get(part, "")
        bare = {name.removeprefix("text_model."): name for name in state}
        if part in ("unet", "vae"):
            table = (unet_table if part == "unet" else vae_table)(state)
        elif prefix.endswith(".model."):
            own = open_clip_table(name for name in bare if name != "text_projection.weight")
            table = {bare[name]: prefix + original for name, original in own.items()}
            table |= {name: f"{prefix}text_projection" for name in state if name == "text_projection.weight"}
        else:
            table = {name: f"{prefix}text_model.{plain}" for plain, name in bare.items()}
        found[part] = {}
        for name, original in table.items():
            if original not in tensors:
                raise ValueError(f"{original} is missing: this is no whole checkpoint of {family}")
            value = tensors[original]
            if ".in_proj_" in original:
                value = value.chunk(3)["qkv".index(name.rpartition("_proj.")[0][-1])]
            elif name == "text_projection.weight":
                value = value.T.contiguous()
            elif part == "vae" and state[name].ndim == 2 and value.ndim == 4:
                value = value[:, :, 0, 0]
            if value.shape != state[name].shape:
                raise ValueError(f"{original} has shape {list(value.shape)}, {family} needs {list(state[name].shape)}")
            found[part][name] = value
    return found


def ema_key(key: str) -> str:
    """Return the name under which a checkpoint keeps the average over its training of a tensor of its UNet."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def save_single_file(
    parts: Mapping[str, Mapping[str, Tensor]], family: Family, file: Path, metadata: Mapping[str, str]
) -> None:
    """Write an original checkpoint as safetensors, each tensor in its present dtype; raises as ``to_original`` does."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in to_original(parts, family).items()}
    with atomic_write(file) as partial:
        save_file(tensors, partial, {"format": "pt", **metadata})


def replace_unet(source: Path, unet: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write ``source``, an original checkpoint, with the given UNet (diffusers' names) in the place of its own.

    The new UNet takes the dtypes of the old one, and the place of its average (EMA) too, so that no loader brings back
    what was erased. All other tensors stay as they are, bit for bit, whatever they are, and so does the source's
    metadata where ours does not say otherwise.

    Raises RequestError when the source cannot be read, is the file to write, or holds another UNet than one of these
    names and shapes, and ValueError when the given UNet has a tensor without a place.
    """
    if source.suffix != ".safetensors":
        raise RequestError("MODEL", source, "a .safetensors file is needed")
    if file.resolve() == source.resolve():
        raise RequestError("MODEL", source, "is the file to write: a source is never written to")
    replacing = {original: unet[name] for name, original in unet_table(unet).items()}
    try:
        with safe_open(source, "pt") as stored:
            about: dict[str, str] = dict(stored.metadata() or {})
            tensors: dict[str, Tensor] = {key: stored.get_tensor(key) for key in stored.keys()}
    except (OSError, SafetensorError) as problem:
        raise RequestError("MODEL", source, f"is not a readable safetensors file: {problem}") from None
    for key in (*replacing, *(key for key in tensors if key.startswith(_UNET))):
        have, want = (list(side[key].shape) if key in side else "nothing" for side in (tensors, replacing))
        if have != want:
            raise RequestError("MODEL", source, f"does not fit: {key} is {have} in the file, {want} in the UNet")
        if not tensors[key].is_floating_point():
            raise RequestError("MODEL", source, f"does not fit: {key} is {tensors[key].dtype}, no kind of float")
    for key, value in replacing.items():
        for place in (key, ema_key(key)):
            if place in tensors:
                tensors[place] = value.detach().to("cpu", tensors[place].dtype, copy=True).contiguous()
    with atomic_write(file) as partial:
        save_file(tensors, partial, {"format": "pt", **about, **metadata})


def _vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a VAE's tensors; its attention is made of 1x1 convolutions [c, c, 1, 1], not of matrices [c, c]."""
    tensors = {original: state[name] for name, original in vae_table(state).items()}
    return {key: value[:, :, None, None] if value.ndim == 2 else value for key, value in tensors.items()}


def _clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of OpenAI's text encoder as transformers 4 does, whose names the original has."""
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    open_clip_table(bare)  # refuses what is no part of a text encoder
    return {f"text_model.{name}": value for name, value in bare.items()}


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenCLIP's tensors; it stacks q, k and v to [3 c, c] and has the projection [p, c] transposed, [c, p].

    Of Stable Diffusion 2's 24 layers the last one is never used, and diffusers' models do not have it.
    """
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    projection = bare.pop("text_projection.weight", None)
    tensors = {} if projection is None else {"text_projection": projection.T}
    for name, original in open_clip_table(bare).items():
        pieces = [name]
        if ".in_proj_" in original:
            layer, kind = name.partition(".self_attn.")[0], original.rpartition("_")[2]
            pieces = [f"{layer}.self_attn.{which}_proj.{kind}" for which in "qkv"]
            if not bare.keys() >= set(pieces):
                raise ValueError(f"{name} has no place in an original checkpoint without the others of {pieces}")
        tensors[original] = torch.cat([bare[piece] for piece in pieces]) if len(pieces) > 1 else bare[name]
    return tensors


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
