"""The built-in DDPM of Fashion-MNIST: its training leaves out what it should, and what is shipped draws its labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.judge import LoadedJudge
from erase_concept.pipelines.classifiers.images import ImageData, InMemory
from erase_concept.pipelines.fashion_ddpm import HOME, LABELS, MODEL, SIZE
from erase_concept.pipelines.fashion_ddpm.train import new_unet, save_model, train_unet
from erase_concept.pipelines.load import load
from erase_concept.pipelines.sample import Sampling, sample_images
from erase_concept.prompts.promptset import PromptRow
from erase_concept.settings import NoSettings


@pytest.fixture(scope="module")
def judge() -> LoadedJudge:
    return JUDGES.find("fashion-ddpm").load(NoSettings(), None)


@pytest.fixture
def data() -> ImageData:
    """Ten random images of each class."""
    images = InMemory(torch.randint(0, 256, (100, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte())
    classes = torch.arange(100) % 10
    return ImageData("noise", images, classes, images, classes, LABELS)


def test_retrain_never_sees_the_class(data: ImageData, tmp_path: Path) -> None:
    rest = data.train_labels != LABELS.index("bag")
    alone = replace(data, train=InMemory(data.train[rest.nonzero()[:, 0]]), train_labels=data.train_labels[rest])
    found = train_unet(data, tmp_path / "a", steps=1, without="bag").state_dict()
    assert all(torch.equal(one, found[name]) for name, one in train_unet(alone, tmp_path / "b", 1).state_dict().items())
    other = train_unet(data, tmp_path / "c", steps=1).state_dict()
    assert not all(torch.equal(one, found[name]) for name, one in other.items())


def test_what_is_written_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = new_unet()
    save_model(unet, tmp_path / "model")
    model = load(tmp_path / "model")
    assert (model.family.name, model.stored, model.size) == ("class-ddpm", "float16", SIZE)
    assert model.encode_prompts(LABELS).flatten().tolist() == [*range(10)]
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_the_shipped_model_draws_its_labels(judge: LoadedJudge, tmp_path: Path) -> None:
    rows = [PromptRow(label, 40 + seed, object=label) for seed in range(2) for label in LABELS]
    files = []
    for place, image in sample_images(load("fashion-ddpm"), rows, Sampling(steps=10, guidance=3.0, batch_size=20)):
        files.append(tmp_path / f"{place}.png")
        Image.fromarray(image).save(files[-1])
    shown = judge.judge(files).words
    assert sum(row.object == one for row, one in zip(rows, shown, strict=True)) >= 18


def test_what_is_shipped_is_small() -> None:
    files = [file for file in HOME.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert MODEL / "model_index.json" in files
    assert sum(file.stat().st_size for file in files) < 5e6


def test_the_judge_reads_images_of_any_size(judge: LoadedJudge, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), np.uint8)
    for name, image in (("grey", Image.fromarray(pixels)), ("rgb", Image.fromarray(np.stack([pixels] * 3, 2)))):
        image.save(tmp_path / f"{name}.png")
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).resize((40, 32)).save(tmp_path / "large.png")
    found = judge.judge([tmp_path / f"{name}.png" for name in ("grey", "rgb", "large")])
    assert found.scores.shape == (3, 10)
    assert found.scores.sum(1) == pytest.approx(1)
    assert found.scores[0] == pytest.approx(found.scores[1], abs=1e-6)
    assert found.features is not None
    assert judge.label("Ankle boot", "object") == "boot"
    assert judge.held_out is not None
    assert set(judge.held_out.labels) == {(label, "") for label in LABELS}
    assert judge.held_out.features.shape[1] == found.features.shape[1]
