"""Loading a whole Stable Diffusion from one file in the original layout, without asking any hub for its make-up.

The file holds weights alone. What its parts are made of comes from ``families/layouts.yaml``, or from the diffusers
folder that bears the file's name, ``model/`` beside ``model.safetensors``, where there is one. CLIP's tokenizer, which
is not ours to ship, comes from the folder ``tokenizer`` in that folder or beside the file, or from the hub.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase_concept.errors import RequestError
from erase_concept.pipelines.formats.single_file import Family, ema_key, from_original
from erase_concept.pipelines.model import check_fit, dtype_names

SUFFIXES = (".safetensors", ".ckpt")
TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")  # one of them makes a tokenizer
_CLIP = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
MODEL_CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}


def load_parts(file: Path, *, ema: bool = True) -> dict[str, Any]:
    """Return the parts of a model by diffusers' names, with weights as they are in the file.

    Where the file has the UNet's weights twice, live and averaged over the last of the training, ``ema`` takes the
    averages, with which a model is meant to be used; where it has them once, either choice takes these.

    Raises RequestError when the file cannot be read, is something else than a whole checkpoint of a known family, or
    when there is no tokenizer.
    """
    tensors, about = read(file)
    family = family_of(file, tensors)
    beside = file.with_suffix("")
    makes = _makes()
    told = about.get("modelspec.prediction_type", "")
    configs = read_configs(beside) or makes["sd2-v" if family == "sd2" and told.startswith("v") else family]
    configs["unet"] |= _seen(tensors)
    if ema:
        tensors |= {key: tensors[ema_key(key)] for key in tensors if ema_key(key) in tensors}
    parts: dict[str, Any] = {"scheduler": DDIMScheduler.from_config(configs.pop("scheduler"))}
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {part: MODEL_CLASSES[part](config) for part, config in configs.items()}
    try:
        check_fit(parts | modules)
        states = from_original(tensors, {part: module.state_dict() for part, module in modules.items()}, family)
    except ValueError as problem:
        raise RequestError("MODEL", file, str(problem)) from None
    parts["stored"] = dtype_names(states["unet"].values())
    for part, module in modules.items():
        assign_weights(module, states[part])
        parts[part] = module
        if part.startswith("text_encoder"):
            parts[part.replace("text_encoder", "tokenizer")] = _tokenizer(
                file, part.replace("text_encoder", "tokenizer"), open_clip=family == "sd2" or part == "text_encoder_2"
            )
    if family == "sd2" and not told and not beside.is_dir() and not predicts_noise(parts["unet"]):
        parts["scheduler"] = DDIMScheduler.from_config(makes["sd2-v"]["scheduler"])
        for part in ("unet", "vae"):
            parts[part].register_to_config(sample_size=makes["sd2-v"][part]["sample_size"])
    return parts | {"force_zeros_for_empty_prompt": family == "sdxl"}


def assign_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module that was made on the meta device exactly these weights; raises RuntimeError when others are due."""
    module.load_state_dict(tensors, assign=True)
    for name, buffer in list(module.named_buffers()):
        owner, _, own = name.rpartition(".")
        if buffer.is_meta:  # the numbers of the positions, the only ones that no file holds
            places = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(own, places, persistent=False)


@torch.no_grad()
def predicts_noise(unet: UNet2DConditionModel) -> bool:
    """Tell the two makes of Stable Diffusion 2 apart by giving the UNet pure noise at the last time step.

    One predicts the noise and so gives it back; the other predicts the velocity, which is then the image. Leaves the
    UNet in fp32, in which a CPU is many times as fast as in fp16.
    """
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(1, 8, unet.config.cross_attention_dim)
    predicted = unet.float().eval()(noise, 999, empty).sample
    return bool(torch.corrcoef(torch.stack([noise.flatten(), predicted.flatten()]))[0, 1] > 0.95)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata; a ``.ckpt`` is unpickled for tensors alone, no code in it is run.

    Raises RequestError when it is damaged or holds anything but tensors.
    """
    if file.stat().st_size == 0:
        raise RequestError("MODEL", file, "is an empty file")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys()}, dict(stored.metadata() or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's age
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever unpickling may run into in a file that is no pickle
        if out_of_memory(problem):
            raise
        if code := re.search(r"GLOBAL (\S+)", str(problem)):
            what = f"asks for {code[1]}, which is no tensor; code in a file is not run, and a .safetensors has none"
        elif isinstance(problem, pickle.UnpicklingError):  # its text is advice on how to run the code after all
            what = "is damaged or no file of weights: it must be a pickle of tensors alone"
        else:
            first = re.split(r"\. |\n", str(problem).strip() or type(problem).__name__)[0]
            what = f"is damaged or no file of weights: {first}"
        raise RequestError("MODEL", file, what) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}, {}


def family_of(file: Path, tensors: Mapping[str, Tensor]) -> Family:
    """Tell the family by its text encoder; raises RequestError saying what the file seems to be when it has none."""
    marks: dict[str, Family] = {
        "conditioner.embedders.0.transformer.": "sdxl",
        "cond_stage_model.model.": "sd2",
        "cond_stage_model.transformer.": "sd1",
    }
    for mark, family in marks.items():
        if any(key.startswith(mark) for key in tensors):
            return family
    what = "holds no text encoder of Stable Diffusion 1.x, 2.x or XL"
    if any("lora" in key for key in tensors):
        what = "is a LoRA"
    elif any(key.startswith(("decoder.", "first_stage_model.")) for key in tensors) and not any(
        key.startswith("model.diffusion_model.") for key in tensors
    ):
        what = "is a VAE alone"
    raise RequestError("MODEL", file, f"{what}; a whole checkpoint is needed")


def out_of_memory(problem: BaseException | None) -> bool:
    """Tell whether an error, or what led to it, says that there was too little memory, on the machine or a device."""
    while problem is not None:
        if isinstance(problem, MemoryError) or re.search("allocate memory|out of memory", str(problem)):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def read_json(file: Path) -> dict[str, Any]:
    """Read a configuration; raises RequestError when it is damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise RequestError("MODEL", file, f"is damaged: {problem}") from None
    if not isinstance(found, dict):
        raise RequestError("MODEL", file, "is damaged: it holds no mapping")
    return found


def _seen(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the widths that a UNet's own tensors tell, so that one of another kind is refused for what it is."""
    unet, found = "model.diffusion_model.", {}
    for key, value in tensors.items():
        if key == f"{unet}input_blocks.0.0.weight":
            found["in_channels"] = value.shape[1]
        elif key.startswith(unet) and key.endswith(".attn2.to_k.weight"):
            found["cross_attention_dim"] = value.shape[1]
    return found


def _makes() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent.parent / "families" / "layouts.yaml").read_text(encoding="utf-8"))


def read_configs(path: Path) -> dict[str, Any]:
    """Return the configurations of a model's parts: a diffusers folder's, or a file's; nothing where there is none."""
    if path.is_file():
        return read_configs(path.with_suffix("")) or _makes()[family_of(path, read(path)[0])]
    folder = path
    if not (folder / "model_index.json").is_file():
        return {}
    index = read_json(folder / "model_index.json")
    files = {part: folder / part / "config.json" for part in MODEL_CLASSES if part in index}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: read_json(file) for part, file in files.items()}


def _tokenizer(file: Path, name: str, *, open_clip: bool) -> CLIPTokenizer:
    """Return CLIP's tokenizer; OpenCLIP's has the same words, and fills up with the first of them."""
    own, shared = file.with_suffix("") / name, file.parent / "tokenizer"
    folder = next(
        (folder for folder in (own, shared) if any((folder / word).is_file() for word in TOKENIZER_FILES)), None
    )
    try:
        if folder is None:
            # By file: the library's own loader asks the hub for many more, and waits for each of them in vain.
            hf_hub_download(TOKENIZER, "merges.txt")
            folder = Path(hf_hub_download(TOKENIZER, "vocab.json")).parent
        told = {} if (folder / "tokenizer_config.json").is_file() else _CLIP
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **told)
    except (OSError, ValueError):
        how = "put its vocab.json and merges.txt into a folder 'tokenizer' beside the file"
        raise RequestError("MODEL", file, f"needs the tokenizer {TOKENIZER}, which is not here: {how}") from None
    if open_clip and folder != own:
        tokenizer.pad_token = "!"  # noqa: S105 - no password
    return tokenizer
