"""Architectures of classifiers by name: ``resnet18-cifar``, torchvision's and timm's; TorchScript files; modules.

Options stand behind the name: ``resnet18-cifar[width=16,stride=2]``. Others: ``torchvision:resnet50``, ``timm:NAME``.
"""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from erase_concept.errors import RequestError, did_you_mean, first_line
from erase_concept.pipelines.classifiers.resnet import ResNet18

CIFAR = "resnet18-cifar"
TORCHSCRIPT = "torchscript:"  # a program, which brings its weights: loading one runs what its author wrote
MODULE = "module:"  # a module that was given in Python, which no name can make again
_OPTIONS = {"width": 64, "stride": 1}


def build(architecture: str, classes: int, channels: int, seed: int) -> nn.Module:
    """Return a network with new weights, in evaluation mode; those of a seed are always the same.

    A TorchScript module comes with the weights of its file. Raises RequestError for an unknown name or option.
    """
    if architecture.startswith(TORCHSCRIPT):
        return _torchscript(architecture.removeprefix(TORCHSCRIPT))
    if architecture.startswith(MODULE):
        raise RequestError("classifier", architecture, "was a module in Python, which must be given there again")
    name, options = _parse(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == CIFAR:
            return ResNet18(classes, channels, **options).eval()
        library, _, model = name.partition(":")
        if library == "torchvision" and model:
            return _torchvision(model, classes, channels).eval()
        if library == "timm" and model:
            return _timm(model, classes, channels).eval()
    raise RequestError("classifier", architecture, f"allowed: {CIFAR}, torchvision:NAME, timm:NAME, or a folder")


def _parse(architecture: str) -> tuple[str, dict[str, int]]:
    """Split a name from its options; raises RequestError for an option that it does not have."""
    found = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", architecture)
    if found is None:
        raise RequestError(
            "classifier", architecture, f"must be NAME or NAME[KEY=VALUE,...], such as {CIFAR}[width=16]"
        )
    options = {}
    for text in (found[2] or "").split(",") if found[2] else ():
        key, _, value = text.partition("=")
        if found[1] != CIFAR or key not in _OPTIONS or not re.fullmatch("[0-9]{1,4}", value) or int(value) < 1:
            has = f"{CIFAR} has width and stride, from 1 to 9999"
            raise RequestError("classifier", architecture, f"{text!r} is no option; {has}")
        options[key] = int(value)
    return found[1], options


def _torchscript(file: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, that it would rather have another format
            module: nn.Module = torch.jit.load(file, map_location="cpu")
    except (OSError, RuntimeError, ValueError) as problem:
        raise RequestError("classifier", file, f"is no TorchScript module: {first_line(problem)}") from None
    return module.eval()


def _torchvision(model: str, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if model not in known:
        raise RequestError("classifier", model, f"{did_you_mean(model, known)}torchvision has no such classifier")
    if channels != 3:
        raise RequestError(
            "classifier", model, f"torchvision's classifiers take 3 channels, and the images have {channels}"
        )
    return models.get_model(model, weights=None, num_classes=classes)


def _timm(model: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise RequestError("classifier", model, 'needs timm: pip install "erase-concept[classifiers]"') from None
    known = timm.list_models()
    if model.partition(".")[0] not in known:
        raise RequestError("classifier", model, f"{did_you_mean(model, known)}timm has no such classifier")
    try:
        return timm.create_model(model, pretrained=False, num_classes=classes, in_chans=channels)
    except RuntimeError as problem:
        raise RequestError("classifier", model, f"timm cannot make it: {first_line(problem)}") from None
