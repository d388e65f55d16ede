"""Classifier: one interface to an image classifier, for unlearning and measuring."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.classifiers.architectures import MODULE, TORCHSCRIPT, build
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.model import weights_hash

BatchNormPolicy = Literal["update", "frozen"]
_BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@dataclass(frozen=True, eq=False)
class Normalisation:
    """What is subtracted from each channel of an image in [0, 1], and what it is then divided by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images [n, c, h, w]."""
        shape = (1, -1, 1, 1)
        return (images - images.new_tensor(self.mean).view(shape)) / images.new_tensor(self.std).view(shape)


@dataclass(frozen=True, eq=False)
class Classifier:
    """An image classifier: its architecture by name, its network, its labels, and how images are normalised.

    The network is in evaluation mode but for the steps of a training. ``size`` is the side of its images in pixels.
    ``data`` describes the images that it learnt from, and is empty where nobody knows. ``batch_norm`` says what becomes
    of BatchNorm's running statistics in a training: "update" lets each step move them, whatever a mask freezes, and
    "frozen" lets the whole training use them as they are. Its affine weights are weights like any others. ``make``
    returns a network with new weights, where the architecture's name does not say how.
    """

    architecture: str
    network: nn.Module
    labels: tuple[str, ...]
    normalisation: Normalisation
    size: int
    source: str
    data: dict[str, Any]
    batch_norm: BatchNormPolicy = "update"
    make: Callable[[], nn.Module] | None = None

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        labels: Sequence[str],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        make: Callable[[], nn.Module] | None = None,
    ) -> Classifier:
        """Copy a module that returns logits [n, classes], with what it does not say itself.

        ``labels`` are those of its outputs, ``size`` is the side of its images in pixels, and ``mean`` and ``std`` are
        how each channel of an image in [0, 1] is normalised. ``make`` returns such a module with new weights; Retrain
        and bad teacher need it. Raises RequestError for a module without weights, for one that shares a weight between
        two names, and where ``make`` returns another kind of module.
        """
        source = module_source(module)
        network = copy.deepcopy(module).eval()
        _check_module(network, source)
        found = cls(source, network, tuple(labels), Normalisation(tuple(mean), tuple(std)), size, source, {}, make=make)
        if make is not None and _shapes(found.fresh(0)) != _shapes(network):
            raise RequestError("classifier", source, "make returns a module with other weights")
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [n, classes] of images [n, c, h, w] in [0, 1]."""
        return self.network(self.normalisation(images))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def part_of(self, weights: Collection[str]) -> str:
        """Return the component that has weights of these names: there is one alone."""
        return "network"

    def with_components(self, **changed: Any) -> Classifier:
        """Return the same model with another network in the place of its own."""
        return replace(self, **changed)

    @contextmanager
    def in_training(self, *, recompute: bool) -> Iterator[None]:
        """Let steps move BatchNorm's statistics, if the policy says so.

        Dropout stays off: it would draw from a generator that all of the process shares. Raises ValueError for
        activations that are computed anew, by which the statistics would move twice.
        """
        if recompute:
            raise ValueError("a classifier's activations are not computed anew in the backward pass")
        norms = [one for one in self.network.modules() if _is_batch_norm(one)]
        try:
            for norm in norms:
                norm.train(self.batch_norm == "update")
            yield
        finally:
            self.network.eval()

    @property
    def renewable(self) -> bool:
        """Whether there can be a network of the same architecture with new weights."""
        return self.make is not None or not self.architecture.startswith((MODULE, TORCHSCRIPT))

    def fresh(self, seed: int) -> nn.Module:
        """Return a network of the same architecture with the first weights of a seed."""
        if self.make is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.make().eval().to(self.device)
        channels = len(self.normalisation.mean)
        return build(self.architecture, len(self.labels), channels, seed).to(self.device)

    def describe(self) -> dict[str, Any]:
        """Return what it is, in plain values: all but its weights."""
        return {
            "architecture": self.architecture,
            "labels": list(self.labels),
            "mean": list(self.normalisation.mean),
            "std": list(self.normalisation.std),
            "size": self.size,
            "data": self.data,
        }

    def sha256(self) -> str:
        """Return the SHA-256 of its weights and statistics."""
        return weights_hash(self.network)

    def save(self, folder: Path) -> None:
        """Write ``classifier.json`` and ``weights.safetensors``."""
        with atomic_write(folder / "weights.safetensors") as partial:
            save_tensors({name: value.contiguous() for name, value in self.network.state_dict().items()}, partial)
        with atomic_write(folder / "classifier.json") as partial:
            partial.write_text(json.dumps(self.describe(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm, or a library's own version of it; a scripted one knows its name alone."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "original_name", "") in _BATCH_NORMS


def module_source(module: nn.Module) -> str:
    """Return what stands for a module in a recipe: the name of its class, and the start of its weights' hash."""
    return f"{MODULE}{type(module).__name__}@{weights_hash(module)[:12]}"


def _check_module(network: nn.Module, source: str) -> None:
    """Raise RequestError for a module whose weights cannot be trained and kept by their names."""
    names = {id(p): name for name, p in network.named_parameters()}
    if not names:
        raise RequestError("classifier", source, "has no weights")
    for name, p in network.named_parameters(remove_duplicate=False):
        if names[id(p)] != name:
            raise RequestError("classifier", source, f"shares a weight between {names[id(p)]} and {name}")
    kinds = {str(p.dtype).removeprefix("torch.") for p in network.parameters()}
    if kinds != {"float32"}:
        raise RequestError("classifier", source, f"has weights of {', '.join(sorted(kinds))}, not float32 alone")


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def head_of(classifier: Classifier) -> str:
    """Return the name of the last linear layer; raises RequestError where its outputs are not the labels."""
    name, layer = "", None
    for name_of, module in classifier.network.named_modules():
        if isinstance(module, nn.Linear):
            name, layer = name_of, module
    if layer is None or layer.out_features != len(classifier.labels):
        needed = f"one of {len(classifier.labels)} outputs is needed"
        if layer is not None:
            has = f"has a last linear layer of {layer.out_features} outputs"
        elif isinstance(classifier.network, torch.jit.ScriptModule):
            has = "is a TorchScript module, which has no linear layer that can be changed"
        else:
            has = "has no linear layer"
        raise RequestError("classifier", classifier.source, f"{has}; {needed}")
    return name
