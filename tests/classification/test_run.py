"""The way from a new classifier to a measured one without some images, and what is refused on it."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import erase_concept as ec
from erase_concept.classification.data import DataSettings, split_data
from erase_concept.classification.forget import forget_rows
from erase_concept.classification.recipe import make_unlearn_recipe, unlearn_recipe
from erase_concept.classification.run import UnlearnRun, iter_unlearn
from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.classifiers.images import read_images
from erase_concept.pipelines.classifiers.load import load_classifier, new_classifier
from erase_concept.training.loop import Record

ARCHITECTURE = "resnet18-cifar[width=2,stride=2]"
SHORT = {"epochs": 1, "batch_size": 64}


def settings(fashion: str) -> dict[str, Any]:
    return {"source": fashion, "train": 100, "test": 50, "crop": 1}


@pytest.fixture(scope="module")
def original(fashion: str, tmp_path_factory: pytest.TempPathFactory) -> UnlearnRun:
    """A classifier of 100 images, trained for two epochs."""
    out = tmp_path_factory.mktemp("runs") / "original"
    training = {"epochs": 2, "batch_size": 32, "milestones": []}
    return ec.train_classifier(ARCHITECTURE, data=settings(fashion), out=out, settings=training, seed=4)


@pytest.fixture(scope="module")
def unlearned(original: UnlearnRun, fashion: str, tmp_path_factory: pytest.TempPathFactory) -> UnlearnRun:
    out = tmp_path_factory.mktemp("runs") / "salun"
    data = {"source": fashion}  # all else is as when the original learnt
    return ec.unlearn(original.path, data=data, forget="random:10%", out=out, settings=SHORT, seed=4)


def test_a_run_says_what_it_did(original: UnlearnRun, unlearned: UnlearnRun) -> None:
    info = unlearned.run_info
    assert info["images"] == {"forget": 10, "retain": 90}
    assert info["base"]["sha256"] == original.run_info["unlearned"]["sha256"] != info["unlearned"]["sha256"]
    assert info["checks"]["changed_outside_mask"] == 0
    assert 0 < info["checks"]["changed"] <= round(0.5 * info["checks"]["weights"]) + 1
    assert info["mask"]["kind"] == "salient"
    assert {"recipe.yaml", "forget.txt", "mask.safetensors", "log.jsonl", "classifier"} <= {
        entry.name for entry in unlearned.path.iterdir()
    }
    assert not (unlearned.path / "base-network.safetensors").exists()
    assert (unlearned.recipe.data.train, unlearned.recipe.data.crop) == (100, 1)
    assert len(unlearned.forgotten) == 10
    assert set(unlearned.forgotten.tolist()) <= set(split_data(unlearned.recipe.data).train.tolist())


def test_the_same_command_again_does_nothing_and_another_is_refused(unlearned: UnlearnRun) -> None:
    assert list(iter_unlearn(unlearned.recipe, unlearned.path)) == []
    with pytest.raises(RequestError, match="holds a run with another recipe"):
        list(iter_unlearn(replace(unlearned.recipe, seed=5), unlearned.path))


def test_a_killed_run_goes_on_to_the_same_bits(unlearned: UnlearnRun, tmp_path: Path) -> None:
    recipe = replace(unlearned.recipe, settings=replace(unlearned.recipe.settings, checkpoint_every=1))
    for event in iter_unlearn(recipe, tmp_path / "run"):
        if isinstance(event, Record) and event.step == 2:
            break
    assert not (tmp_path / "run" / "unlearn.json").exists()
    records = [event for event in iter_unlearn(recipe, tmp_path / "run") if isinstance(event, Record)]
    assert records[0].step == 2
    again = UnlearnRun(tmp_path / "run").run_info
    assert again["unlearned"] == unlearned.run_info["unlearned"]
    assert again["resumed_at_step"] == 1
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, records[-1].steps + 1)]


def test_a_loss_that_explodes_stops_the_run(original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    """Resumed, too: the first losses are in the log. What a method raises on purpose may go anywhere."""
    given = {"lr": 50.0, "epochs": 4, "batch_size": 10, "checkpoint_every": 1, "weight_decay": 0.0}
    recipe = unlearn_recipe(
        str(original.path), {"source": fashion}, "random:50%", method="random-label", settings=given
    )
    for _ in range(2):
        with pytest.raises(EraseError, match=r"the loss is .*, more than 100 times .*: lower lr, and choose another"):
            list(iter_unlearn(recipe, tmp_path / "run"))
    assert not (tmp_path / "run" / "unlearn.json").exists()
    raised = unlearn_recipe(str(original.path), {"source": fashion}, "random:50%", method="gradient-ascent")
    assert list(iter_unlearn(raised, tmp_path / "raised"))


@pytest.mark.parametrize("what", ["classifier", "an image", "labels"])
def test_a_classifier_or_images_that_changed_meanwhile_are_noticed(
    what: str, original: UnlearnRun, fashion: str, tmp_path: Path
) -> None:
    shutil.copytree(original.path, tmp_path / "original")
    shutil.copytree(fashion.partition(":")[2], tmp_path / "images")
    data = {"source": f"fashion-mnist:{tmp_path / 'images'}"}
    recipe = unlearn_recipe(str(tmp_path / "original"), data, "random:10%", settings=SHORT, seed=4)
    for event in iter_unlearn(recipe, tmp_path / "run"):
        if event == "unlearn":
            break
    if what == "classifier":
        file = tmp_path / "original" / "classifier" / "weights.safetensors"
        weights = load_file(file)
        next(value for value in weights.values() if value.is_floating_point()).view(-1)[0] += 1
        save_file(weights, file)
    else:
        name = "images-idx3" if what == "an image" else "labels-idx1"
        file = tmp_path / "images" / f"train-{name}-ubyte.gz"
        content = bytearray(gzip.decompress(file.read_bytes()))
        if what == "labels":
            content[8:] = content[8:][::-1]
        else:
            content[-1] ^= 1
        file.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(RequestError, match=r"have changed since the run in .* began"):
        list(iter_unlearn(recipe, tmp_path / "run"))


def test_retrain_is_paired_with_the_original(original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    """Of the same seed it begins with the same weights, and forgets what every other method of the seed forgets."""
    nothing = {"epochs": 1, "lr": 0.0, "batch_size": 64}
    data = settings(fashion)
    first = ec.train_classifier(ARCHITECTURE, data=data, out=tmp_path / "a", settings=nothing, seed=4)
    run = ec.unlearn(
        original.path, data=data, forget="random:10%", method="retrain", out=tmp_path / "b", settings=nothing, seed=4
    )
    ours, theirs = (load_file(one.path / "classifier" / "weights.safetensors") for one in (run, first))
    named = dict(run.classifier(split_data(run.recipe.data)).network.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in named)


def test_measuring_a_run(unlearned: UnlearnRun, original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    """UA, RA and TA are counted again from the logits."""
    pytest.importorskip("sklearn")
    from erase_concept.eval.classification.evaluate import evaluate_classifier
    from erase_concept.eval.classification.report import write_classifier_report

    retrain = ec.unlearn(
        original.path,
        data=settings(fashion),
        forget="random:10%",
        method="retrain",
        out=tmp_path / "retrain",
        settings=SHORT,
        seed=4,
    )
    report = evaluate_classifier(unlearned, retrain=retrain)
    split = split_data(unlearned.recipe.data)
    model = unlearned.classifier(split)
    images, labels, forgotten = split.images.train, split.images.train_labels, unlearned.forgotten
    wrong = [int(model.logits(images[row[None]].float() / 255).argmax()) != int(labels[row]) for row in forgotten]
    assert report.values["ua"] == pytest.approx(sum(wrong) / 10)
    tested = model.logits(split.images.test[split.test].float() / 255).argmax(1)
    assert report.values["ta"] == pytest.approx(float((tested == split.images.test_labels[split.test]).float().mean()))
    assert [score.n for score in report.scores] == [10, 90, 50, 10, 10]
    own = [abs(score.value - score.baseline) for score in report.scores if score.metric != "mia_loss"]
    assert report.gap == pytest.approx(sum(own) / 4)
    write_classifier_report(report, tmp_path / "report")
    content = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert content["gap"] == pytest.approx(report.gap)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "average gap to Retrain" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "| Unlearning accuracy (UA) |" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert evaluate_classifier(retrain, retrain=retrain).gap == 0
    with pytest.raises(RequestError, match="has forgotten nothing"):
        evaluate_classifier(original)


def test_a_forgotten_class_is_no_part_of_ta(original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from erase_concept.eval.classification.evaluate import evaluate_classifier

    run = ec.unlearn(original.path, data=settings(fashion), forget="class:Sandal", method="ssd", out=tmp_path / "run")
    assert [score.n for score in evaluate_classifier(run).scores] == [10, 90, 45, 10, 10]


FORGET: dict[str, tuple[str, str]] = {
    "class": ("class:Sandle", "did you mean Sandal"),
    "kind": ("rows:1", "allowed: random:10%"),
    "no share": ("random:lots", "allowed: random:10%"),
    "nothing": ("random:0%", "there is nothing to forget"),
    "everything": ("random:100%", "are all 100 training images: nothing would be retained"),
    "too many": ("random:101", "there are 100 training images"),
    "no original": ("none", "allowed: random:10%"),
}


@pytest.mark.parametrize("case", FORGET)
def test_what_cannot_be_forgotten(case: str, original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    forget, words = FORGET[case]
    with pytest.raises(RequestError, match=words) as problem:
        ec.unlearn(original.path, data=settings(fashion), forget=forget, out=tmp_path / "run")
    assert problem.value.setting == "forget"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (lambda rows: [rows[0], rows[1], rows[0]], "line 3 is {0}, as line 1: each image once"),
        (lambda rows: [400], "line 1 is 400; fashion-mnist has images 0 to 399"),
        (lambda rows: ["-1"], "line 1 is '-1'; needed: a whole number"),
        (lambda rows: [rows[0], "", "x"], "line 3 is 'x'"),
        (lambda rows: [next(i for i in range(400) if i not in rows)], "which is no training image of this split"),
        (lambda rows: [""], "there is nothing to forget"),
        (lambda rows: rows, "nothing would be retained"),
    ],
)
def test_a_file_of_indices_is_checked(
    lines: Callable[[list[int]], list[Any]], words: str, fashion: str, tmp_path: Path
) -> None:
    split = split_data(DataSettings(**settings(fashion)))
    rows = split.train.tolist()
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(map(str, lines(rows))), encoding="utf-8")
    with pytest.raises(RequestError) as problem:
        forget_rows(f"indices:{file}", split, 0)
    assert words.format(rows[0]) in str(problem.value)


def test_indices_are_numbers_of_the_data_set(fashion: str, tmp_path: Path) -> None:
    split = split_data(DataSettings(**settings(fashion)))
    chosen = split.train[[3, 1, 8]]
    (tmp_path / "rows.txt").write_text("\n".join(map(str, chosen.tolist())), encoding="utf-8")
    assert torch.equal(forget_rows(f"indices:{tmp_path / 'rows.txt'}", split, 0), chosen.sort().values)


def test_a_split_is_even_disjoint_and_its_seeds_alone(fashion: str) -> None:
    split = split_data(DataSettings(**settings(fashion)))
    assert torch.equal(split.images.train_labels[split.train].bincount(), torch.full((10,), 10))
    assert torch.equal(split.images.test_labels[split.test].bincount(), torch.full((10,), 5))
    assert not set(split.train.tolist()) & set(split.validation.tolist())
    assert torch.equal(split.train, split_data(DataSettings(**settings(fashion))).train)
    assert not torch.equal(split.train, split_data(DataSettings(**settings(fashion), split_seed=1)).train)
    with pytest.raises(RequestError, match=r"data\.train 1000: fashion-mnist has 40 of 'T-shirt/top'"):
        split_data(DataSettings(source=fashion, train=1000))


def test_a_class_is_all_of_its_training_images(fashion: str) -> None:
    split = split_data(DataSettings(**settings(fashion)))
    rows = forget_rows("class:Dress", split, 0)
    assert torch.equal(split.images.train_labels[rows], torch.full((10,), 3))


def test_a_classifier_of_other_images_is_refused(original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    other = settings(fashion) | {"split_seed": 3}
    with pytest.raises(RequestError, match=r"data\.split_seed 3: the classifier learnt from fashion-mnist with"):
        ec.unlearn(original.path, data=other, forget="random:10%", out=tmp_path / "run")
    image_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    with pytest.raises(RequestError, match="takes 1 channels of 8 pixels; pets has 3 of 8"):
        ec.unlearn(
            original.path,
            data={"source": f"folder:{tmp_path / 'pets'}", "size": 8, "train": 2, "test": 2, "validation": 0},
            forget="class:cat",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def image_folder(folder: Path, counts: dict[str, int]) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for at, (label, count) in enumerate(counts.items()):
            (folder / part / label).mkdir(parents=True)
            for place in range(count):
                Image.new("RGB", (10, 14), (100 * at, 50, 20 * place)).save(folder / part / label / f"{place}.png")


def test_an_image_folder_is_a_data_set(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", {"cat": 3, "dog": 2})
    images = read_images(f"folder:{tmp_path / 'pets'}", 8)
    assert images.labels == ("cat", "dog")
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert images.train[torch.tensor([4, 0])][:, :, 0, 0].tolist() == [[100, 50, 20], [0, 50, 0]]
    (tmp_path / "pets" / "test" / "dog" / "0.png").unlink()
    (tmp_path / "pets" / "test" / "dog" / "1.png").unlink()
    with pytest.raises(RequestError, match="has no image of 'dog'"):
        read_images(f"folder:{tmp_path / 'pets'}", 8)
    (tmp_path / "loose").mkdir()
    with pytest.raises(RequestError, match="needs a folder of images for each of two classes"):
        read_images(f"folder:{tmp_path / 'loose'}", 8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("fashon-mnist", "did you mean fashion-mnist"),
        ("cifar10", "needs the folder of its files"),
        ("cifar10:{0}", "does not hold the files that torchvision reads"),
        ("fashion-mnist:{0}", "is missing or damaged"),
        ("fashion-mnist:{0}/none", "there is no folder"),
    ],
)
def test_data_that_is_not_there(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words) as problem:
        read_images(source.format(tmp_path))
    assert problem.value.setting == "data.source"
    assert "download=True" not in str(problem.value)


def test_a_state_dict_with_a_named_architecture(original: UnlearnRun, fashion: str, tmp_path: Path) -> None:
    """As the authors' code saves it: under "state_dict", with the names of parallel training and the normalisation."""
    images = read_images(fashion)
    state = load_file(original.path / "classifier" / "weights.safetensors")
    named = {f"module.{name}": value for name, value in state.items()}
    named |= {"module.normalize.mean": torch.tensor([0.25]), "module.normalize.std": torch.tensor([0.75])}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "model.pt")
    model = load_classifier(f"{ARCHITECTURE}={tmp_path / 'model.pt'}", images)
    assert (model.normalisation.mean, model.normalisation.std) == ((0.25,), (0.75,))
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())

    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "model.txt").write_text("\n".join(images.labels[::-1]), encoding="utf-8")
    with pytest.raises(RequestError, match="has the class 'Ankle boot' where fashion-mnist has 'T-shirt/top'"):
        load_classifier(f"{ARCHITECTURE}={tmp_path / 'model.safetensors'}", images)
    (tmp_path / "model.txt").write_text("\n".join(images.labels[:9]), encoding="utf-8")
    with pytest.raises(RequestError, match="has 10 outputs, and 9 labels beside it"):
        load_classifier(f"{ARCHITECTURE}={tmp_path / 'model.safetensors'}", images)
    fewer = state | {"fc.weight": state["fc.weight"][:4], "fc.bias": state["fc.bias"][:4]}
    save_file(fewer, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="has 4 outputs, and fashion-mnist has 10 classes"):
        load_classifier(f"{ARCHITECTURE}={tmp_path / 'other.safetensors'}", images)
    with pytest.raises(RequestError, match="the weights are not this model's"):
        load_classifier(f"resnet18-cifar={tmp_path / 'other.safetensors'}", replace(images, labels=images.labels[:4]))
    with pytest.raises(RequestError, match="is no folder of a classifier"):
        load_classifier(str(tmp_path / "nothing"), images)
    save_file(state | {"fc.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(RequestError, match="NaN"):
        load_classifier(f"{ARCHITECTURE}={tmp_path / 'nan.safetensors'}", images)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("resnet18-cifar[depth=3]", "'depth=3' is no option"),
        ("resnet18-cifar[width=0]", "'width=0' is no option"),
        ("resnet19", "allowed: resnet18-cifar, torchvision:NAME"),
        ("torchvision:resnet19", "did you mean resnet1"),
    ],
)
def test_unknown_architectures(architecture: str, words: str, fashion: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as problem:
        ec.train_classifier(architecture, data=settings(fashion), out=tmp_path / "run")
    assert words in str(problem.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_goes_to_yaml_and_back(unlearned: UnlearnRun) -> None:
    assert make_unlearn_recipe(unlearned.recipe.to_dict()) == unlearned.recipe
    recipe = unlearn_recipe("x", "fashion-mnist", "random:10%", method="retrain")
    assert recipe.settings.milestones == (91, 136)
    assert make_unlearn_recipe(recipe.to_dict()) == recipe
    with pytest.raises(RequestError, match="a recipe has no such entry"):
        make_unlearn_recipe(recipe.to_dict() | {"model": "y"})


def test_libraries_classifiers_take_colours(fashion: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    pets, grey = read_images(f"folder:{tmp_path / 'pets'}", 32), read_images(fashion)
    made = new_classifier("torchvision:resnet18", pets, 0)
    assert made.logits(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    with pytest.raises(RequestError, match="take 3 channels, and the images have 1"):
        new_classifier("torchvision:resnet18", grey, 0)
    with pytest.raises(RequestError, match="cannot take pets's images"):
        new_classifier("torchvision:alexnet", pets, 0)


def test_timms_classifiers_take_any_channels(fashion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    data = settings(fashion)
    original = ec.train_classifier("timm:test_efficientnet", data=data, out=tmp_path / "original", settings=SHORT)
    run = ec.unlearn(original, data=data, forget="random:10%", out=tmp_path / "run", settings=SHORT)
    assert run.run_info["base"]["architecture"] == "timm:test_efficientnet"
    assert run.run_info["checks"]["changed_outside_mask"] == 0
    assert run.classifier(split_data(run.recipe.data)).logits(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    before, after = (load_file(one.path / "classifier" / "weights.safetensors") for one in (original, run))
    statistics = [name for name in before if name.endswith("running_mean")]  # of timm's own kind of BatchNorm
    assert statistics
    assert not any(torch.equal(before[name], after[name]) for name in statistics)
    with pytest.raises(RequestError, match="did you mean test_resnet"):
        new_classifier("timm:test_resne", read_images(fashion), 0)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(RequestError, match=r'needs timm: pip install "erase-concept\[classifiers\]"'):
        new_classifier("timm:test_resnet", read_images(fashion), 0)


def test_cifar_and_svhn_are_read_as_torchvision_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in their formats, with pixels that tell their places; the published hashes alone are not asked for."""
    from torchvision.datasets import cifar, svhn

    io = pytest.importorskip("scipy.io")
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072).reshape(2, 3072) % 251
    batch = {"data": pixels.astype(np.uint8), "labels": [3, 9]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    found = read_images(f"cifar10:{tmp_path}")
    assert (len(found.train), len(found.test), found.train.shape) == (10, 2, (3, 32, 32))
    assert found.test[torch.tensor([1])][0].flatten().tolist() == pixels[1].tolist()
    assert (found.test_labels.tolist(), found.labels[3]) == ([3, 9], "cat")

    numbers = np.arange(32 * 32 * 3 * 2).reshape(32, 32, 3, 2) % 251
    for part in ("train", "test"):
        content = {"X": numbers.astype(np.uint8), "y": np.array([[10], [4]], np.uint8)}
        io.savemat(tmp_path / f"{part}_32x32.mat", content)
    found = read_images(f"svhn:{tmp_path}")
    assert found.train_labels.tolist() == [0, 4]
    assert found.train[torch.tensor([1])][0, 2, 5, 7] == numbers[5, 7, 2, 1]


def test_a_torchscript_module(fashion: str, tmp_path: Path) -> None:
    """It is unlearned and loaded again; what needs new weights is refused before the folder is begun."""
    images = read_images(fashion)
    pooled = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *pooled).eval()
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    source, data = f"torchscript:{tmp_path / 'net.pt'}", settings(fashion)
    for method in ("retrain", "bad-teacher"):
        with pytest.raises(RequestError, match="cannot be given"):
            ec.unlearn(source, data=data, forget="random:10%", method=method, out=tmp_path / "no")
    with pytest.raises(RequestError, match="TorchScript module, which has no linear layer that can be changed"):
        ec.unlearn(source, data=data, forget="random:10%", method="boundary-expand", out=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    run = ec.unlearn(source, data=data, forget="random:10%", out=tmp_path / "run", settings=SHORT)
    assert run.run_info["checks"]["changed_outside_mask"] == 0
    split = split_data(run.recipe.data)
    after = run.classifier(split).network.state_dict()
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, after[name])]
    assert {"5.weight", "1.running_mean"} <= set(moved)
    with pytest.raises(RequestError, match="is no TorchScript module"):
        load_classifier(f"torchscript:{tmp_path / 'run' / 'recipe.yaml'}", images)
