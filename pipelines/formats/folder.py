"""A model as a diffusers folder, and its UNet alone as a file."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write, to_disk, write_error
from erase_concept.pipelines.families import FAMILIES, families_of_pipeline, find_family
from erase_concept.pipelines.families.family import Configs, Family
from erase_concept.pipelines.formats.modelspec import write_content_hash
from erase_concept.pipelines.formats.scheduler import with_zero_snr, write_stated
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.formats.tokenizer import check_tokenizer, limit_tokenizers, write_vocabulary
from erase_concept.pipelines.formats.weights import (
    assign_weights,
    check_same,
    dtype_names,
    is_safetensors,
    published_name,
    read_json,
    read_tensors,
)
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.model import Diffusion

INDEX = "model_index.json"
# What the VAE's attention was called when Stable Diffusion 1.x was published; diffusers renames it while loading.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# What no model comes near, and would take too long to make: SD XL has 60 layers by this count.
_LAYERS = ("num_hidden_layers", "num_layers", "layers_per_block", "transformer_layers_per_block")
_BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
_MOST_LAYERS, _MOST_TIMESTEPS, _LARGEST_NUMBER = 4096, 100_000, 10_000_000
_LIBRARIES = ("diffusers", "transformers")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", re.IGNORECASE
)


def read_configs(folder: Path, family: Family) -> Configs:
    """Return the configurations of the scheduler and of all components with weights, by diffusers' names.

    What diffusers' first versions wrote is corrected as its pipeline of Stable Diffusion 1.x and 2.x does.
    """
    files = {name: part.files[0] for name, part in family.components.items() if part.make or name == "scheduler"}
    configs = {name: _read_config(folder / name / file) for name, file in files.items()}
    if family.pipeline.__name__ == "StableDiffusionPipeline":
        configs["scheduler"] |= {"steps_offset": 1, "clip_sample": False}
        unet = configs["unet"]
        version = [int(number) for number in re.findall(r"\d+", str(unet.get("_diffusers_version", "")))]
        if version and version < [0, 9] and isinstance(side := unet.get("sample_size"), int):
            unet["sample_size"] = max(side, 64)
    return configs


def _read_config(file: Path) -> dict[str, Any]:
    """Read a component's configuration; raises RequestError where it asks for more than any model has.

    A few letters in it could ask for a million layers, and to make them would take hours.
    """
    config = read_json(file)
    if numbers := [number for number in _numbers(list(config.values())) if number > _LARGEST_NUMBER]:
        raise RequestError("model", file, f"is damaged: {numbers[0]:g} is larger than any number of a model")
    layers = math.prod(max(_numbers([config.get(name)]), default=1) or 1 for name in _LAYERS)
    blocks = [config.get(name) for name in _BLOCKS]
    layers *= max((len(one) for one in blocks if isinstance(one, list)), default=1) or 1
    if layers > _MOST_LAYERS:
        raise RequestError("model", file, f"is damaged: it asks for {layers:,} layers, and at most {_MOST_LAYERS:,}")
    if max(_numbers([config.get("num_train_timesteps")]), default=1) > _MOST_TIMESTEPS:
        raise RequestError("model", file, f"is damaged: it has more than {_MOST_TIMESTEPS:,} num_train_timesteps")
    return config


def _numbers(values: list[Any]) -> list[float]:
    """Return the numbers of a list, and of the lists and mappings in it."""
    found: list[float] = []
    for value in values:
        if isinstance(value, list | dict):
            found += _numbers([*value.values()] if isinstance(value, dict) else value)
        elif isinstance(value, int | float):
            found.append(value)
    return found


def _check_code(folder: Path, index: dict[str, Any], family: Family, name: str) -> None:
    """Raise RequestError for a folder that would have diffusers import or run anything but a known library's classes.

    diffusers imports the modules that ``model_index.json`` names, and files of these names in the model's folder.
    """
    own = family.pipeline.__module__.partition(".")[0]  # where a plug-in's own components are
    for part, component in family.components.items():
        line = index.get(part)
        if not isinstance(line, list) or len(line) != 2 or not all(isinstance(one, str) for one in line):
            raise RequestError("model", name, f"{INDEX} is damaged: {part} must be a library and a class")
        library, kind = line
        plain = kind.isidentifier() and not kind.startswith("Auto")
        known = plain and kind.endswith(("Scheduler", "Tokenizer", "TokenizerFast", "TokenizersBackend"))
        if component.make is None and not (known and library in _LIBRARIES):
            raise RequestError("model", name, f"{INDEX} asks for {library}.{kind} as its {part}; code is not run")
        if library.partition(".")[0] not in (*_LIBRARIES, own):
            raise RequestError("model", name, f"{INDEX} asks for {library}.{kind} as its {part}; code is not run")
        if code := sorted((folder / part).glob("*.py")):
            raise RequestError("model", name, f"holds {part}/{code[0].name}, which is code; code in a model is not run")


def read_family(folder: Path, name: str) -> Family:
    """Return the family of a folder's model; raises RequestError when there is none, or a component is missing."""
    if not (folder / INDEX).is_file():
        raise RequestError("model", name, f"the folder holds no {INDEX}: it is not a diffusers pipeline")
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    families = families_of_pipeline(kind)
    if not families:
        known = dict.fromkeys(family.pipeline.__name__ for family in FAMILIES.all().values())
        raise RequestError("model", name, f"is a {kind}; needed: {' or '.join(known)}")
    for part, component in families[0].components.items():
        line = index.get(part)
        if not (isinstance(line, list) and any(line)) or not any(
            (folder / part / file).is_file() for file in component.files
        ):
            needed = f"{' or '.join(component.files)} in {part}/ and a line in {INDEX}"
            raise RequestError("model", name, f"has no {part}: a {kind} needs {needed}")
    _check_code(folder, index, families[0], name)
    family = find_family(kind, read_configs(folder, families[0]))
    if family is None:
        raise RequestError("model", name, f"is a {kind} of an unknown family: its configurations fit none")
    return family


def load_folder(folder: Path, name: str) -> Diffusion:
    """Load a folder's model on the CPU, in the dtypes of its files; ``name`` is the one that the user gave.

    Raises RequestError when it does not load whole, and ValueError when its components do not fit each other.
    """
    family = read_family(folder, name)
    modules: dict[str, Any] = {
        part: _load_component(folder / part, family, name) for part, one in family.components.items() if one.make
    }
    stored = dtype_names(modules["unet"].state_dict().values())
    components, settings = _with_rest(folder, family, modules)
    return Diffusion(family, components, source=name, settings=settings, stored=stored)


def folder_beside_weights(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a folder's scheduler and tokenizers, and its pipeline's settings, as ``load_folder`` gives them.

    No weights are read. Raises as ``load_folder`` does.
    """
    family = read_family(folder, name)
    with torch.device("meta"):
        modules = {
            part: one.make(_read_config(folder / part / "config.json"))
            for part, one in family.components.items()
            if one.make
        }
    components, settings = _with_rest(folder, family, modules)
    return {part: one for part, one in components.items() if part not in modules}, settings


def _with_rest(folder: Path, family: Family, modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return components with weights and, from a folder, those without; and the pipeline's settings."""
    tokenizers = [part for part in family.components if part.startswith("tokenizer")]
    for part in tokenizers:
        check_tokenizer(folder / part)
    # What the index names beside the family's components, such as a safety checker, is not used: it may be gone.
    unused = {part: None for part, line in read_json(folder / INDEX).items() if isinstance(line, list)}
    unused = {part: None for part in unused if part not in family.components}
    given = {**unused, **modules, **family.pipeline_options}
    pipeline = family.pipeline.from_pretrained(folder, local_files_only=True, **given)
    components = limit_tokenizers({part: getattr(pipeline, part) for part in family.components})
    for part in tokenizers:
        components[part]("a photo of 1")  # one that can read no text is refused here, and not in the middle of a run
    family.check_fit(components)
    components["scheduler"] = with_zero_snr(components["scheduler"])
    return components, {key: pipeline.config.get(key, default) for key, default in family.settings.items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a component's folder, under the names of its files; of several variants, the first.

    A variant is the middle of ``diffusion_pytorch_model.fp16.safetensors``; the one without a name comes first. Returns
    nothing when there are no weights; raises RequestError when a file is damaged.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match[1] or "", []).append(file)
    files = found[min(found)] if found else []
    files = [file for file in files if is_safetensors(file)] or files
    return {key: value for file in files for key, value in read_tensors(file)[0].items()}


def _load_component(folder: Path, family: Family, name: str) -> nn.Module:
    """Return the UNet, the VAE or a text encoder of a folder, with the weights of its files, in their dtypes.

    The libraries' own loaders do not do this: where they know a weight by another name, they put random numbers in its
    place. Raises RequestError naming the first weight that is missing, has another shape, or has no place.
    """
    module, tensors = _places(folder, family, name)
    assign_weights(module, {key: tensors[published_name(module, key)] for key in module.state_dict()})
    return module


def _places(folder: Path, family: Family, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a component on the meta device, and the tensors of its files by the published names of its weights.

    Raises RequestError as ``_load_component`` does.
    """
    make = family.components[folder.name].make
    assert make is not None  # only components with weights come here
    with torch.device("meta"):
        module = make(_read_config(folder / "config.json"))
    places = {published_name(module, key): list(value.shape) for key, value in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for stored, value in read_weights(folder).items():
        key = stored
        for old, new in _RENAMED.items():
            key = key.replace(old, new) if "attentions" in stored else key
        place = published_name(module, key)
        if place in tensors:
            raise RequestError("model", name, f"{folder.name}: {place} is in its files twice")
        if not key.endswith("position_ids"):  # the numbers 0, 1, 2 ..., which older files hold
            tensors[place] = value
    if not tensors:
        raise RequestError("model", name, f"no weights in {folder.name}/")
    for key, asked in places.items():
        has = f"has shape {list(tensors[key].shape)}" if key in tensors else "is missing"
        if key not in tensors or list(tensors[key].shape) != asked:
            raise RequestError("model", name, f"{folder.name}: {key} {has}, its configuration asks for {asked}")
    if extra := sorted(tensors.keys() - places.keys()):
        raise RequestError("model", name, f"{folder.name}: {extra[0]} has no place in what its configuration describes")
    return module, tensors


def component_weights(folder: Path, family: Family, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield a component's weights by their published names, in the order of the names, in the dtypes of its files.

    They are mapped to the files and let go one by one. Raises RequestError as loading does.
    """
    tensors = _places(folder, family, name)[1]
    for place in sorted(tensors):
        yield place, tensors.pop(place)


def save_pipeline(model: Diffusion, folder: str | Path, card: str = "") -> None:
    """Write the model as a diffusers folder in its present dtype, and load it back; ``card`` becomes its README.md.

    The weights have the names of published models, whatever version of the libraries writes them.

    A folder of that name is replaced as a whole. Raises EraseError, and leaves that as it was, when a file cannot be
    written or when what loads is not what was written.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with silence_hub_logs():
            _save_components(model, partial)
        _drop_sources(partial)
        for weights in partial.rglob("*.safetensors"):
            weights.chmod((partial / INDEX).stat().st_mode)  # safetensors writes for the owner alone
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for name, module in model.modules.items():
            with silence_hub_logs():  # one at a time, so that the model is never in memory twice
                kind: Any = type(module)  # of diffusers or transformers, which mypy sees as a plain module
                found = kind.from_pretrained(partial / name, local_files_only=True).state_dict()
            check_same(module.state_dict(), found, folder / name)
            if read_weights(partial / name).keys() != {published_name(module, key) for key in found}:
                raise EraseError(f"{folder / name}: its weights were written under other names than published models'")
            del found  # where files in use cannot be renamed, a component that is read from its file would hold it
        for path in (*partial.rglob("*"), partial):  # so that they outlive a power cut
            to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        to_disk(folder.parent)
    except SafetensorError as problem:
        raise write_error(problem, folder) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_components(model: Diffusion, folder: Path) -> None:
    """Write all that diffusers' own ``save_pretrained`` writes, but for the names of the text encoders' weights."""
    pipeline = model.pipeline()
    for name, part in pipeline.components.items():
        if name in model.text_encoders:
            state = {published_name(part, key): value for key, value in part.state_dict().items()}
            # transformers 5 would name them as the file did from which it loaded them.
            part.save_pretrained(folder / name, state_dict=state, save_original_format=False)
        elif part is not None:
            part.save_pretrained(folder / name)
    write_stated(model.scheduler, folder / "scheduler")
    for name, tokenizer in model.tokenizers.items():
        write_vocabulary(tokenizer, folder / name)
    pipeline.save_config(folder)


def _drop_sources(folder: Path) -> None:
    """Drop from configurations whence the libraries loaded a component: a folder of this machine, or another model."""
    for file in (folder / INDEX, *folder.rglob("*config.json")):
        config = read_json(file)
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_unet(unet: nn.Module, file: str | Path, metadata: dict[str, str]) -> None:
    """Write the UNet's weights under diffusers' names as one safetensors file, and read it back.

    Raises EraseError, and leaves no file, when what is read back is not what was written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    with atomic_write(Path(file)) as partial:
        save_tensors(tensors, partial, {"format": "pt", **metadata})
        write_content_hash(partial)
        check_same(tensors, load_file(partial), Path(file))
