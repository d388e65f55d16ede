"""Load a classifier: a folder that a run wrote, an architecture with a file of weights, or a module."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase_concept.errors import RequestError, first_line
from erase_concept.files import read_json, regular_size
from erase_concept.pipelines.classifiers.architectures import CIFAR, MODULE, TORCHSCRIPT, build
from erase_concept.pipelines.classifiers.classifier import Classifier, Normalisation, module_source
from erase_concept.pipelines.classifiers.images import ImageData
from erase_concept.pipelines.classifiers.weights import fill_weights, labels_beside, read_state
from erase_concept.pipelines.processes import processes

Module = nn.Module | Callable[[], nn.Module]  # or a function that returns one with new weights, such as its class
InPython = Module | Classifier  # a classifier that is no name
_MOST_EXPANDED = 4  # fp32 in memory for fp8 in the file


def load_classifier(source: str, data: ImageData, module: Module | None = None) -> Classifier:
    """Load a classifier for a data set.

    ``source`` is the folder of a run or of its classifier, ``ARCHITECTURE=FILE`` with a state dict, or
    ``torchscript:FILE``, a module that normalises images itself. Labels may lie beside a file, with the suffix .txt;
    without them they are the data's. So is the normalisation of a state dict that has none of its own
    ("normalize.mean", "normalize.std"). The folder of a module that was given in Python needs ``module``, one like it
    or a function that returns one.
    Raises RequestError when it is not there, has other classes than the data, or weights of another architecture.
    """
    folder = _folder(source)
    try:
        found = _from_file(source, data) if folder is None else _from_folder(source, folder, data, module)
    except ValueError as problem:
        raise RequestError("classifier", source, getattr(problem, "allowed", str(problem))) from None
    return _checked(found, data)


def take_classifier(given: InPython, data: ImageData, seed: int, source: str) -> Classifier:
    """Return a copy of a classifier that is there in Python, for a data set.

    A module takes images in [0, 1], which it normalises itself where it needs it, and its outputs are the data's
    classes; ``Classifier.from_module`` says otherwise. A function gives a module with the first weights of a seed.
    ``source`` is what stands for it in a recipe. Raises RequestError where it does not fit the data.
    """
    device = processes().device
    if isinstance(given, Classifier):
        found = replace(given, network=copy.deepcopy(given.network).to(device))
        return _checked(found, data)
    channels, size = data.train.shape[0], data.train.shape[-1]
    about: dict[str, Any] = {"labels": data.labels, "size": size, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    if isinstance(given, nn.Module):
        found = Classifier.from_module(given, **about)
    else:
        found = Classifier.from_module(_new_module(given, seed, source), make=given, **about)
    found = replace(found, architecture=source, source=source, network=found.network.to(device))
    return _checked(found, data)


def source_of(given: InPython) -> str:
    """Return what stands in a recipe for a classifier that is there in Python."""
    if isinstance(given, Classifier):
        return given.source
    return module_source(given) if isinstance(given, nn.Module) else f"{MODULE}{getattr(given, '__qualname__', given)}"


def _new_module(make: Callable[[], nn.Module], seed: int, source: str) -> nn.Module:
    """Return a module with the first weights of a seed; raises RequestError where a function returns something else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    if not isinstance(module, nn.Module):
        raise RequestError("classifier", source, f"returns {type(module).__name__}, not a torch module")
    return module


def _checked(found: Classifier, data: ImageData) -> Classifier:
    """Return a classifier; raises RequestError where it does not fit the data, or its weights are not finite."""
    (channels, size), mean = (data.train.shape[0], data.train.shape[-1]), found.normalisation.mean
    if (len(mean), found.size) != (channels, size):
        allowed = f"takes {len(mean)} channels of {found.size} pixels; {data.name} has {channels} of {size}"
        raise RequestError("classifier", found.source, allowed)
    if found.labels != data.labels:
        raise RequestError("classifier", found.source, _other_classes(found.labels, data))
    _check_outputs(found, data)
    if not all(bool(p.isfinite().all()) for p in found.network.parameters()):
        raise RequestError("classifier", found.source, "has weights that are NaN or infinite")
    return found


def new_classifier(architecture: str, data: ImageData, seed: int) -> Classifier:
    """Return a classifier with the first weights of a seed, for a data set; raises RequestError for an unknown name."""
    channels, size = data.train.shape[0], data.train.shape[-1]
    network = build(architecture, len(data.labels), channels, seed).to(processes().device)
    made = Classifier(architecture, network, data.labels, data.normalisation, size, architecture, {})
    _check_outputs(made, data)
    return made


@torch.no_grad()
def _check_outputs(model: Classifier, data: ImageData) -> None:
    """Raise RequestError for a network that cannot take the data's images, or has another number of outputs."""
    images = data.train[torch.arange(2)].to(model.device).float() / 255
    try:
        logits = model.logits(images)
    except (RuntimeError, ValueError, AssertionError) as problem:
        allowed = f"cannot take {data.name}'s images of {tuple(images.shape[1:])}: {first_line(problem)}"
        raise RequestError("classifier", model.source, allowed) from None
    if not isinstance(logits, Tensor) or logits.shape != (2, len(model.labels)):
        if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == 2:
            allowed = f"has {logits.shape[1]} outputs, and {data.name} has {len(model.labels)} classes"
        else:
            got = [*logits.shape] if isinstance(logits, Tensor) else type(logits).__name__
            allowed = f"returns {got} for 2 images, not [2, {len(model.labels)}]"
        raise RequestError("classifier", model.source, allowed)


def recorded_data(source: str) -> dict[str, Any]:
    """Return the settings of the images that a classifier learnt from, and how it did; of a mere file, none."""
    folder = _folder(source)
    if folder is None:
        return {}
    try:
        data = read_json(folder / "classifier.json")["data"]
        return {name: value for name, value in data.items() if name != "name"}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise RequestError("classifier", source, f"{folder / 'classifier.json'} is damaged: {problem}") from None


def _folder(source: str) -> Path | None:
    """Return the folder of a classifier, which may be in that of a run."""
    folders = (Path(source), Path(source) / "classifier")
    return next((folder for folder in folders if (folder / "classifier.json").is_file()), None)


def classifier_state(source: str) -> dict[str, Tensor]:
    """Return the weights and statistics of a classifier, by name, without its data; ``source`` is a folder or a file.

    Raises ValueError when it holds none.
    """
    folder = _folder(source)
    if folder is not None:
        return read_state(folder / "weights.safetensors")[0]
    if source.startswith(TORCHSCRIPT):
        return dict(build(source, 2, 3, 0).state_dict())
    _, equals, file = source.partition("=") if "[" not in source else _behind_options(source)
    if not equals:
        raise ValueError("is no folder of a classifier; needed: one, or ARCHITECTURE=FILE with the weights")
    state = {re.sub(r"^module\.", "", name): value for name, value in read_state(Path(file))[0].items()}
    return {name: value for name, value in state.items() if not name.startswith("normalize.")}


def is_architecture(source: str) -> bool:
    """Tell whether a source is an architecture alone, without weights."""
    if source.startswith(TORCHSCRIPT):
        return False
    return not Path(source).exists() and not (_behind_options(source) if "[" in source else source.partition("="))[1]


def _from_folder(source: str, folder: Path, data: ImageData, module: Module | None) -> Classifier:
    try:
        about: dict[str, Any] = read_json(folder / "classifier.json")
        mean, std = (tuple(float(one) for one in about[key]) for key in ("mean", "std"))
        labels, known = tuple(str(one) for one in about["labels"]), dict(about["data"])
        size, architecture = int(about["size"]), str(about["architecture"])
        _check_architecture(architecture, folder)
        network = build(architecture, len(labels), len(mean), 0) if module is None else _like(module, architecture)
    except RequestError:
        raise
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder / 'classifier.json'} is damaged: {problem}") from None
    fill_weights(network, read_state(folder / "weights.safetensors")[0])
    network.to(processes().device)
    make = None if isinstance(module, nn.Module) else module
    return Classifier(architecture, network, labels, Normalisation(mean, std), size, source, known, make=make)


def _like(module: Module, source: str) -> nn.Module:
    return (copy.deepcopy(module) if isinstance(module, nn.Module) else _new_module(module, 0, source)).eval()


def _check_architecture(architecture: str, folder: Path) -> None:
    """Raise ValueError for a program that came with the folder, and for a network larger than its weights' file."""
    program = Path(architecture.removeprefix(TORCHSCRIPT)).resolve()
    if architecture.startswith(TORCHSCRIPT) and program.is_relative_to(folder.parent.resolve()):
        raise ValueError(f"it comes with a program, {program.name}, which is not run; give that itself if you trust it")
    if architecture.startswith(CIFAR):
        with torch.device("meta"):
            size = sum(one.nbytes for one in build(architecture, 2, 1, 0).parameters())
        if size > _MOST_EXPANDED * regular_size(folder / "weights.safetensors"):
            raise ValueError(f"{architecture} has more weights than weights.safetensors can hold")


def _from_file(source: str, data: ImageData) -> Classifier:
    channels, size = data.train.shape[0], data.train.shape[-1]
    if source.startswith(TORCHSCRIPT):
        names = labels_beside(Path(source.removeprefix(TORCHSCRIPT))) or data.labels
        network = build(source, len(names), channels, 0).to(processes().device)
        as_it_is = Normalisation((0.0,) * channels, (1.0,) * channels)
        return Classifier(source, network, names, as_it_is, size, source, {})
    if source.startswith(MODULE):
        build(source, len(data.labels), channels, 0)  # says that it cannot be made
    architecture, equals, file = source.partition("=") if "[" not in source else _behind_options(source)
    if not equals:
        raise ValueError("is no folder of a classifier; needed: one, or ARCHITECTURE=FILE with the weights")
    state, labels = read_state(Path(file))
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    mean, std = (_numbers(state.pop(f"normalize.{name}", None)) for name in ("mean", "std"))
    normalisation = Normalisation(mean, std) if mean and std else data.normalisation
    head = [value for name, value in state.items() if name.endswith(".weight") and value.ndim == 2]
    if head and len(head[-1]) != len(labels or data.labels):
        other = f"{len(labels)} labels beside it" if labels else f"{data.name} has {len(data.labels)} classes"
        raise ValueError(f"has {len(head[-1])} outputs, and {other}")
    network = build(architecture, len(labels or data.labels), channels, 0)
    fill_weights(network, state)
    network.to(processes().device)
    return Classifier(architecture, network, labels or data.labels, normalisation, size, source, {})


def _behind_options(source: str) -> tuple[str, str, str]:
    """Split ARCHITECTURE[KEY=VALUE]=FILE at the sign behind the options."""
    name, bracket, rest = source.partition("]")
    return name + bracket, rest[:1], rest[1:]


def _numbers(value: Tensor | None) -> tuple[float, ...]:
    return () if value is None else tuple(value.to(torch.float64).flatten().tolist())


def _other_classes(labels: tuple[str, ...], data: ImageData) -> str:
    if len(labels) != len(data.labels):
        return f"has {len(labels)} classes, and {data.name} has {len(data.labels)}"
    first = next((ours, theirs) for ours, theirs in zip(labels, data.labels, strict=True) if ours != theirs)
    return f"has the class {first[0]!r} where {data.name} has {first[1]!r}"
