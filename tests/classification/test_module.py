"""A torch module in the place of a classifier's name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import erase_concept as ec
from erase_concept.classification.data import split_data
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.images import read_images
from erase_concept.pipelines.model import weights_hash

SHORT = {"epochs": 1, "batch_size": 50}


class Net(nn.Module):
    """A small network with a statistic, for images of any size."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def network(seed: int = 0, **options: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options).eval()


@pytest.fixture
def asked(fashion: str) -> dict[str, Any]:
    data = {"source": fashion, "train": 100, "test": 50, "crop": 1}
    return {"data": data, "forget": "random:10%", "settings": SHORT}


def test_a_module_is_unlearned_in_a_copy(asked: dict[str, Any], tmp_path: Path) -> None:
    net = network()
    before = weights_hash(net)
    run = ec.unlearn(net, out=tmp_path / "run", **asked)
    assert weights_hash(net) == before == run.run_info["base"]["sha256"]
    assert run.run_info["unlearned"]["sha256"] != before
    assert run.run_info["base"]["source"] == f"module:Net@{before[:12]}"
    split = split_data(run.recipe.data)
    found = run.classifier(split, module=net)
    assert weights_hash(found.network) == run.run_info["unlearned"]["sha256"]
    images = torch.rand(3, 1, 8, 8)
    net.load_state_dict(load_file(run.path / "classifier" / "weights.safetensors"))
    assert torch.equal(found.logits(images), net(images))  # it normalises images itself
    with pytest.raises(RequestError, match="was a module in Python, which must be given there again"):
        run.classifier(split)
    with pytest.raises(RequestError, match="was a module in Python, which must be given there again"):
        ec.unlearn(run.recipe.classifier, out=tmp_path / "b", **asked)
    with pytest.raises(RequestError, match="holds a run with another recipe"):
        ec.unlearn(network(1), out=run.path, **asked)


def test_its_labels_and_normalisation_can_be_given(asked: dict[str, Any], fashion: str, tmp_path: Path) -> None:
    """New weights come from ``make``; the next run and the measuring go on from the first run's classifier."""
    pytest.importorskip("sklearn")
    labels = read_images(fashion).labels
    about: dict[str, Any] = {"labels": labels, "size": 8, "mean": (0.25,), "std": (0.5,)}
    given = ec.Classifier.from_module(network(), **about, make=Net)
    run = ec.unlearn(given, out=tmp_path / "a", **asked)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(given.logits(images), network()((images - 0.25) / 0.5))
    split = split_data(run.recipe.data)
    again = ec.unlearn(run.classifier(split, module=network()), out=tmp_path / "b", method="fine-tune", **asked)
    assert again.recipe.classifier == str(run.path)
    assert again.run_info["base"]["sha256"] == run.run_info["unlearned"]["sha256"]
    retrain = ec.unlearn(given, out=tmp_path / "c", method="retrain", **asked)
    report = ec.evaluate_classifier(run, retrain=retrain, module=network())
    assert report.gap is not None
    with pytest.raises(RequestError, match=r"method retrain: needs new weights, which module:Net@.* cannot be given"):
        ec.unlearn(network(), out=tmp_path / "d", method="retrain", **asked)
    with pytest.raises(RequestError, match="make returns a module with other weights"):
        ec.Classifier.from_module(network(), **about, make=lambda: Net(9))


def test_training_begins_with_the_weights_of_a_seed_or_of_a_module(asked: dict[str, Any], tmp_path: Path) -> None:
    hardly = {"epochs": 1, "lr": 1e-6, "batch_size": 50}
    data = asked["data"]

    def start(architecture: Any, out: str, seed: int) -> dict[str, torch.Tensor]:
        run = ec.train_classifier(architecture, data=data, out=tmp_path / out, settings=hardly, seed=seed)
        return load_file(run.path / "classifier" / "weights.safetensors")

    state = torch.random.get_rng_state()
    first, second, other = start(Net, "a", 1), start(Net, "b", 1), start(Net, "c", 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first["conv.weight"], second["conv.weight"])
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    torch.testing.assert_close(start(network(7), "d", 1)["conv.weight"], network(7).conv.weight, atol=1e-4, rtol=0)
    for out, name in (("a", "module:Net"), ("d", f"module:Net@{weights_hash(network(7))[:12]}")):
        run = UnlearnRun(tmp_path / out)
        assert run.recipe.classifier == run.run_info["base"]["architecture"] == name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 10)
        self.b = nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x.flatten(1))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: network(classes=4), "has 4 outputs, and fashion-mnist has 10 classes"),
        (lambda: network(channels=3), r"cannot take fashion-mnist's images of \(1, 8, 8\): .*3 channels"),
        (lambda: nn.Sequential(nn.Conv2d(1, 10, 3)), r"returns \[2, 10, 6, 6\] for 2 images, not \[2, 10\]"),
        (lambda: nn.Flatten(), "has no weights"),
        (lambda: network().double(), "has weights of float64, not float32 alone"),
        (Tied, "shares a weight between a.weight and b.weight"),
    ],
)
def test_a_module_that_does_not_fit(module: Any, words: str, asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words) as problem:
        ec.unlearn(module(), out=tmp_path / "run", **asked)
    assert problem.value.setting == "classifier"
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_a_module_must_fit_the_data(asked: dict[str, Any], fashion: str, tmp_path: Path) -> None:
    labels = read_images(fashion).labels
    swapped = (labels[1], labels[0], *labels[2:])
    cases: dict[str, dict[str, Any]] = {
        "takes 3 channels of 8 pixels; fashion-mnist has 1 of 8": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        "takes 1 channels of 32 pixels; fashion-mnist has 1 of 8": {"size": 32},
        "has 9 classes, and fashion-mnist has 10": {"labels": labels[:9]},
        "has the class 'Trouser' where fashion-mnist has 'T-shirt/top'": {"labels": swapped},
    }
    for words, changed in cases.items():
        about = {"labels": labels, "size": 8, "mean": (0.5,), "std": (0.5,)} | changed
        with pytest.raises(RequestError, match=words):
            ec.unlearn(ec.Classifier.from_module(network(), **about), out=tmp_path / "run", **asked)
    broken = copy.deepcopy(network())
    nn.init.constant_(broken.fc.bias, torch.nan)
    with pytest.raises(RequestError, match="NaN or infinite"):
        ec.unlearn(broken, out=tmp_path / "run", **asked)
    with pytest.raises(RequestError, match="classifier module:dict: returns dict, not a torch module"):
        ec.train_classifier(dict, data=asked["data"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
