"""A whole model in one file, under the names it was published with, as AUTOMATIC1111 and ComfyUI load it.

A file holds weights alone. The configurations are the family's, or come from the diffusers folder that bears the file's
name, ``model/`` beside ``model.safetensors``, where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from torch import Tensor, nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.families import family_of_file
from erase_concept.pipelines.families.family import Configs, Family, SingleFile, State
from erase_concept.pipelines.formats.ema import choose_unet, ema_key
from erase_concept.pipelines.formats.folder import INDEX, read_configs
from erase_concept.pipelines.formats.modelspec import of_any_model, write_content_hash
from erase_concept.pipelines.formats.prediction import (
    V_PRED,
    ZTSNR,
    Prediction,
    marks,
    prediction_metadata,
    prediction_of,
    read_prediction,
)
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.formats.tokenizer import limit_tokenizers, load_tokenizer
from erase_concept.pipelines.formats.weights import (
    assign_weights,
    check_same,
    dtype_names,
    is_safetensors,
    published_name,
    read_tensors,
)
from erase_concept.pipelines.model import Diffusion

SUFFIXES = (".safetensors", ".ckpt")


def load_single_file(file: Path, name: str, *, ema: bool | None = None) -> Diffusion:
    """Load a checkpoint on the CPU, with weights as they are in the file; ``name`` is the one that the user gave.

    Where the file has the UNet's weights twice, live and averaged over the last of the training, ``ema`` chooses as
    ``choose_unet`` says. Where it has them once, either choice takes these.

    Raises RequestError when the file cannot be read, is something else than a whole checkpoint of a known family, holds
    two UNets of which one must be chosen, or when there is no tokenizer.
    """
    opened = _open(file, name, ema)
    family, tensors, modules = opened.family, opened.tensors, opened.modules
    layout = _layout(family)
    components: dict[str, Any] = {"scheduler": DDIMScheduler.from_config(opened.configs["scheduler"]), **modules}
    try:
        family.check_fit(components)
        states = from_original(tensors, {part: module.state_dict() for part, module in modules.items()}, family)
    except ValueError as problem:
        raise RequestError("model", file, str(problem)) from None
    for part, module in modules.items():
        assign_weights(module, states[part])
    components = _with_tokenizers(components, family, file)
    if layout.settle is not None and not opened.told:
        layout.settle(components, opened.metadata)
    stored = dtype_names(states["unet"].values())
    return Diffusion(family, components, source=name, settings=dict(family.settings), stored=stored, taken=opened.taken)


def original_weights(
    file: Path, name: str, part: str, *, ema: bool | None = None, like: tuple[Family, Configs] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield a component's weights by their published names, in the order of the names, in the dtypes of the file.

    They are mapped to the file and let go one by one. ``like`` are the family and the configurations that the file's
    model has, where they are known from elsewhere. Raises RequestError as ``load_single_file`` does.
    """
    opened = _open(file, name, ema, like)
    module, layout = opened.modules[part], _layout(opened.family).layouts[part]
    state = module.state_dict()
    places = {one: _present(original, opened.tensors) for one, original in layout.names(state).items()}
    tensors = {original: opened.tensors.get(original) for original in places.values()}
    del opened
    left = Counter(places.values())
    for one in sorted(places, key=lambda one: published_name(module, one)):
        original = places[one]
        value = tensors[original]
        if value is None:
            raise RequestError("model", file, f"{original} is missing: this is no whole checkpoint")
        left[original] -= 1
        if not left[original]:
            del tensors[original]
        yield published_name(module, one), layout.unpack(one, original, value, state[one])


def single_file_configs(file: Path, name: str, *, ema: bool | None = None) -> tuple[Family, Configs]:
    """Return the family of a checkpoint and the configurations of its components, by diffusers' names.

    Raises RequestError where ``load_single_file`` does but for a missing tokenizer, a missing tensor or another shape.
    """
    opened = _open(file, name, ema)
    family, configs = opened.family, opened.configs
    if _layout(family).settle is not None and not opened.told:  # only its weights tell which model it is
        del opened
        components = load_single_file(file, name, ema=ema).components
        configs |= {part: dict(components[part].config) for part in ("unet", "vae", "scheduler")}
    return family, configs


def single_file_beside_weights(
    file: Path, name: str, *, ema: bool | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's scheduler and tokenizers, and the pipeline's settings, as ``load_single_file`` gives them.

    Raises RequestError as that does.
    """
    family, configs = single_file_configs(file, name, ema=ema)
    with torch.device("meta"):
        modules = {part: one.make(configs[part]) for part, one in family.components.items() if one.make}
    scheduler = DDIMScheduler.from_config(configs["scheduler"])
    components = _with_tokenizers({"scheduler": scheduler, **modules}, family, file)
    return {part: one for part, one in components.items() if part not in modules}, dict(family.settings)


def _with_tokenizers(components: dict[str, Any], family: Family, file: Path) -> dict[str, Any]:
    pads = _layout(family).pad_tokens
    found = {
        part: load_tokenizer(file, part, pads.get(part)) for part in family.components if part.startswith("tokenizer")
    }
    return limit_tokenizers({**components, **found})


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that was read: its modules are on the meta device, and ``tensors`` hold one UNet, that was chosen.

    ``told`` says whether the file or a folder of its name tells the prediction type, ``taken`` which UNet was taken.
    """

    family: Family
    configs: Configs
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    told: bool
    taken: str


def _open(file: Path, name: str, ema: bool | None, like: tuple[Family, Configs] | None = None) -> _Opened:
    """Read a checkpoint, and find out what it is; raises RequestError as ``load_single_file`` does."""
    tensors, metadata = read_tensors(file)
    family, configs, told = _what_it_is(file, tensors, metadata) if like is None else (*like, True)
    layout = _layout(family)
    makes = {part: one.make for part, one in family.components.items() if one.make}
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {part: make(configs[part]) for part, make in makes.items()}
    try:
        names = layout.layouts["unet"].names(modules["unet"].state_dict()).values()
    except ValueError as problem:
        raise RequestError("model", file, str(problem)) from None
    tensors, taken = choose_unet(tensors, names, ema, name)
    return _Opened(family, configs, modules, tensors, metadata, told, taken)


def _what_it_is(file: Path, tensors: State, metadata: Mapping[str, str]) -> tuple[Family, Configs, bool]:
    """Return a checkpoint's family and configurations, and whether anything tells its prediction type."""
    family = _family(file, tensors)
    configs, told = _configs(file, family, tensors, metadata)
    for part, widths in _layout(family).widths(tensors).items():
        configs[part] |= widths
    return family, configs, told


def _configs(file: Path, family: Family, tensors: State, metadata: Mapping[str, str]) -> tuple[Configs, bool]:
    """Return the configurations, and whether the file or a folder of its name tells the prediction type.

    Raises RequestError where the two contradict each other.
    """
    folder, marked = file.with_suffix(""), read_prediction(file, tensors, metadata)
    if (folder / INDEX).is_file():
        configs = read_configs(folder, family)
        own = configs["scheduler"].get("prediction_type", "epsilon")
        if marked.type not in (None, own):
            what = f"is marked as {marked.type}, but {folder / 'scheduler'} says {own}"
            raise RequestError("model", file, f"{what}: one of the two is wrong, correct it")
        if marked.zero_snr and not configs["scheduler"].get("rescale_betas_zero_snr"):
            what = f"is marked as one with zero terminal SNR, but {folder / 'scheduler'} has no rescale_betas_zero_snr"
            raise RequestError("model", file, what)
        return configs, True
    told = {} if marked.type is None else {**metadata, **prediction_metadata(marked)}
    configs = _layout(family).configs(told)
    configs["scheduler"] |= marked.scheduler()
    return configs, marked.type is not None


def _family(file: Path, tensors: State) -> Family:
    """Return the family of a file; raises RequestError saying what the file seems to be when it has none."""
    family = family_of_file(tensors)
    if family is not None:
        return family
    what = "holds no text encoder of Stable Diffusion 1.x, 2.x or XL"
    if any("lora" in key for key in tensors):
        what = "is a LoRA"
    elif any(key.startswith(("decoder.", "first_stage_model.")) for key in tensors) and not any(
        key.startswith("model.diffusion_model.") for key in tensors
    ):
        what = "is a VAE alone"
    raise RequestError("model", file, f"{what}; a whole checkpoint is needed")


def _layout(family: Family) -> SingleFile:
    if family.single_file is None:
        raise RequestError("format", "single-file", f"a model of the family {family.title} has no layout in one file")
    return family.single_file


def to_original(parts: Mapping[str, State], family: Family) -> dict[str, Tensor]:
    """Return the tensors of an original checkpoint, sharing memory with the given ones where they stay as they are.

    ``parts`` holds the state dict of each component with weights.

    Raises ValueError when these are not the family's components, and one naming the first tensor that has no place.
    """
    layouts = _layout(family).layouts
    if parts.keys() != layouts.keys():
        raise ValueError(f"{family.name} has the parts {', '.join(layouts)}; got {', '.join(parts) or 'nothing'}")
    tensors: dict[str, Tensor] = {}
    for part, state in parts.items():
        try:
            tensors |= layouts[part].pack(layouts[part].names(state), state)
        except ValueError as problem:
            raise ValueError(f"{part}: {problem}") from None
    return tensors


def from_original(tensors: State, states: Mapping[str, State], family: Family) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of each component from an original checkpoint's tensors: the inverse of ``to_original``.

    ``states`` says which tensors the components need, and of which shapes: their state dicts, on any device.

    Raises ValueError naming the first tensor that is missing or has another shape.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part, state in states.items():
        layout = _layout(family).layouts[part]
        found[part] = {}
        for name, original in layout.names(state).items():
            present = _present(original, tensors)
            if present not in tensors:
                raise ValueError(f"{original} is missing: this is no whole checkpoint of {family.title}")
            value = layout.unpack(name, original, tensors[present], state[name])
            if value.shape != state[name].shape:
                needed = f"{family.title} needs {list(state[name].shape)}"
                raise ValueError(f"{original} has shape {list(value.shape)}, {needed}")
            found[part][name] = value
    return found


def _present(original: str, tensors: State) -> str:
    """Return the name under which a tensor is in a file: some merges leave a part of it out."""
    return original if original in tensors else original.replace("text_model.", "", 1)


def save_original(model: Diffusion, file: str | Path, dtype: torch.dtype | None, metadata: dict[str, str]) -> int:
    """Write the model as one safetensors file in the original layout, and read it back.

    A model that came from such a file gets its UNet put into a copy of it; everything else stays as it was, bit for
    bit. Without ``dtype`` the copy keeps its dtypes, and any other model is written in fp32. The file is marked with
    the model's prediction type and zero terminal SNR. Returns how many weights of the UNet differ from those of the
    file that was copied; 0 where none was.

    Raises EraseError, and leaves no file, when what is read back is not what was written.
    """
    source, file, changed = Path(model.source), Path(file), 0
    prediction = prediction_of(model.scheduler)
    metadata = metadata | prediction_metadata(prediction)
    if source.is_file() and is_safetensors(source):
        unet = model.unet.state_dict()
        changed = replace_unet(source, unet, model.family, file, metadata, prediction=prediction, dtype=dtype)
    else:
        kind = dtype or torch.float32
        parts = {part: {name: v.to(kind) for name, v in state.items()} for part, state in model.states().items()}
        save_single_file(parts, model.family, file, metadata, prediction)
    states = model.states()
    try:
        tensors, stored = read_tensors(file)
        if read_prediction(file, tensors, stored) != prediction:
            raise EraseError(f"{prediction.type} was not written as it is; what was written is removed")
        for part, found in from_original(tensors, states, model.family).items():
            check_same(states[part], found, file)
    except (EraseError, RequestError, SafetensorError, ValueError) as problem:
        file.unlink()
        raise EraseError(f"{file} could not be read back: {problem}") from None
    return changed


def save_single_file(
    parts: Mapping[str, State],
    family: Family,
    file: Path,
    metadata: Mapping[str, str],
    prediction: Prediction | None = None,
) -> None:
    """Write an original checkpoint as safetensors, each tensor in its present dtype; raises as ``to_original`` does."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in to_original(parts, family).items()}
    tensors |= marks(prediction or Prediction())
    with atomic_write(file) as partial:
        save_tensors(tensors, partial, {"format": "pt", **metadata})
        write_content_hash(partial)


def replace_unet(
    source: Path,
    unet: State,
    family: Family,
    file: Path,
    metadata: Mapping[str, str],
    *,
    prediction: Prediction | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write ``source``, an original checkpoint, with the given UNet (diffusers' names) in the place of its own.

    The new UNet takes the dtypes of the old one, and the place of its average (EMA) too, so that no loader brings back
    what was erased. All other tensors stay as they are, bit for bit, and so does the source's metadata where ours does
    not say otherwise; what names the source itself (its title, author, hashes) is left out. With ``dtype`` all parts of
    the model take that one, and with ``prediction`` its marks replace those of the source. Returns how many weights of
    the UNet differ from the source's, in the dtype that was written.

    Raises RequestError when the source cannot be read, is the file to write, or holds another UNet than one of these
    names and shapes, and ValueError when the given UNet has a tensor without a place.
    """
    if not is_safetensors(source):
        raise RequestError("model", source, "a .safetensors file is needed")
    if file.resolve() == source.resolve():
        raise RequestError("model", source, "is the file to write: a source is never written to")
    layout = _layout(family).layouts["unet"]
    replacing = layout.pack(layout.names(unet), unet)
    try:  # scaled weights come back plain, so that no old scale meets a new weight
        tensors, about = read_tensors(source)
    except (OSError, RequestError) as problem:
        raise RequestError("model", source, f"is not a readable safetensors file: {problem}") from None
    if not any(key in tensors for key in replacing):  # a file with averages alone
        replacing = {ema_key(key): value for key, value in replacing.items()}
    _check_places(tensors, replacing, layout.prefix, source)
    if dtype is not None:
        prefixes = (*(one.prefix for one in _layout(family).layouts.values()), ema_key(layout.prefix))
        own = (key for key, value in tensors.items() if key.startswith(prefixes) and value.is_floating_point())
        tensors |= {key: tensors[key].to(dtype) for key in own}
    changed = 0
    for key, value in replacing.items():
        new = value.detach().to("cpu", tensors[key].dtype, copy=True).contiguous()
        changed += int((new.float() != tensors[key].float()).sum())
        tensors[key] = new
        if (average := ema_key(key)) in tensors:
            tensors[average] = value.detach().to("cpu", tensors[average].dtype, copy=True).contiguous()
    if prediction is not None:
        kept = {key: value for key, value in tensors.items() if key not in (V_PRED, ZTSNR)}
        tensors = kept | {key: tensors.get(key, mark) for key, mark in marks(prediction).items()}
    with atomic_write(file) as partial:
        save_tensors(tensors, partial, {"format": "pt", **of_any_model(about), **metadata})
        write_content_hash(partial)
    return changed


def _check_places(tensors: State, replacing: State, prefix: str, source: Path) -> None:
    """Raise RequestError for the first tensor of a file's UNet that is not of the name, shape and kind of the new one.

    ``prefix`` is that of the file's live UNet.
    """
    for key in (*replacing, *(key for key in tensors if key.startswith(prefix))):
        have, want = (list(side[key].shape) if key in side else "nothing" for side in (tensors, replacing))
        if have != want:
            raise RequestError("model", source, f"does not fit: {key} is {have} in the file, {want} in the UNet")
        if not tensors[key].is_floating_point():
            raise RequestError("model", source, f"does not fit: {key} is {tensors[key].dtype}, no kind of float")
