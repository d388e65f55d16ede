"""How far images moved, against differences by hand, formulas written out, and LPIPS with weights made up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.eval.features import image_features
from erase_concept.eval.metrics.extractors import extractor
from erase_concept.eval.metrics.similarity import feature_distance, pixel_distance, similarity
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.prompts.promptset import PromptRow


def _set(folder: Path, images: np.ndarray) -> ImageSet:
    folder.mkdir()
    files = tuple(folder / f"{place:05d}.png" for place in range(len(images)))
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return ImageSet(files, tuple(PromptRow("a dog", seed) for seed in range(len(images))), {})


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]]:
    """Return a function that gives base images, their set, and one of the same with other pixels up to a shift."""

    def make(shift: int) -> tuple[np.ndarray, ImageSet, ImageSet]:
        generator = np.random.default_rng(0)
        base = generator.integers(0, 200, (6, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        erased = base + generator.integers(0, shift + 1, base.shape, dtype=np.uint8)
        return erased, _set(tmp_path / f"erased-{shift}", erased), _set(tmp_path / f"base-{shift}", base)

    return make


def test_pixel_distance_is_the_mean_absolute_difference() -> None:
    black, white = (np.full((4, 5, 3), level, np.uint8) for level in (0, 255))
    assert pixel_distance(black, white) == pixel_distance(white, black) == 255
    assert pixel_distance(white, white) == 0
    half = black.copy()
    half[:2] = 10
    assert pixel_distance(black, half) == 5


def test_feature_distance_is_of_angles() -> None:
    left = np.array([[1.0, 0], [1, 0], [1, 0], [3, 4]], np.float32)
    right = np.array([[2.0, 0], [0, 5], [-1, 0], [4, 3]], np.float32)
    np.testing.assert_allclose(feature_distance(left, right), [0, 1, 2, 1 - 24 / 25])


def test_scores_are_means_over_pairs(pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]]) -> None:
    images, erased, base = pictures(40)
    network = extractor("emojinette")
    pixels, features = similarity(erased, base, extractor=network, target="church", batch_size=4)
    gaps = np.abs(images.astype(float) - base.arrays()).mean((1, 2, 3))
    assert (pixels.metric, pixels.target, pixels.n, pixels.unit) == ("pixel_distance", "church", 6, "grey levels")
    assert pixels.value == pytest.approx(gaps.mean())
    assert gaps.min() <= pixels.ci95[0] < pixels.value < pixels.ci95[1] <= gaps.max()
    assert (features.metric, features.n) == ("feature_distance_emojinette", 6)
    assert "Emojinette's classifier, 1 - cos of the features" in features.protocol
    left, right = (image_features(images.files, network).astype(float) for images in (erased, base))
    cosines = [a @ b / (a @ a * (b @ b)) ** 0.5 for a, b in zip(left, right, strict=True)]
    assert features.value == pytest.approx(1 - np.mean(cosines), rel=1e-4)
    (single,) = similarity(erased, base, (), network, target="church", batch_size=1)
    assert single.value == pytest.approx(features.value, rel=1e-3)


def test_every_measure_grows_with_the_change(pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]]) -> None:
    pytest.importorskip("skimage")
    network = extractor("emojinette")
    found = []
    for shift in (0, 10, 50):
        _, erased, base = pictures(shift)
        found.append([s.value for s in similarity(erased, base, ("pixel_distance", "ssim"), network, target="church")])
    pixels, ssim, features = zip(*found, strict=True)
    assert pixels[0] == 0
    assert ssim[0] == pytest.approx(1)
    assert features[0] == pytest.approx(0, abs=1e-6)
    assert list(pixels) == sorted(pixels)
    assert list(ssim) == sorted(ssim, reverse=True)
    assert list(features) == sorted(features)
    assert pixels[1] < pixels[2]
    assert ssim[1] > ssim[2]
    assert features[1] < features[2]


def test_ssim_is_the_papers(pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]]) -> None:
    pytest.importorskip("skimage")
    ndimage = pytest.importorskip("scipy.ndimage")
    images, erased, base = pictures(40)
    x, y = images.astype(float), base.arrays().astype(float)

    def mean(some: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(some, (0, 1.5, 1.5, 0), truncate=3.5)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    expected = index[:, 5:-5, 5:-5].mean()  # where the window of 11 x 11 lies inside
    (score,) = similarity(erased, base, ("ssim",), target="church")
    assert score.value == pytest.approx(expected, rel=1e-6)


def test_lpips_needs_its_weights_and_is_lpips(
    pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _, erased, base = pictures(40)
    with pytest.raises(RequestError, match=r"metric lpips: needs AlexNet's weights: put https://\S+7be5be79\.pth"):
        similarity(erased, base, ("lpips",), target="church")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(alexnet.state_dict(), tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    (score,) = similarity(erased, base, ("lpips",), target="church")
    # The paper's formula: differences of channel-normalised activations, weighted by the package's own layers.
    package = pytest.importorskip("lpips")
    layers = torch.load(Path(package.__file__).parent / "weights/v0.1/alex.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def activations(images: ImageSet) -> list[torch.Tensor]:
        hidden = ((torch.tensor(images.arrays()) / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2)
        found = []
        for place, layer in enumerate(alexnet.features):
            hidden = layer(hidden) if not isinstance(layer, torch.nn.ReLU) else hidden.relu()
            if place in (1, 4, 7, 9, 11):
                found.append(hidden / hidden.norm(dim=1, keepdim=True))
        return found

    with torch.no_grad():
        expected = sum(
            ((a - b) ** 2 * layers[f"lin{place}.model.1.weight"]).sum(1).mean((1, 2))
            for place, (a, b) in enumerate(zip(activations(erased), activations(base), strict=True))
        )
    assert score.value == pytest.approx(expected.mean().item(), rel=1e-3)
    assert score.metric == "lpips"


def test_sets_that_are_no_pairs_are_refused(
    pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]], tmp_path: Path
) -> None:
    images, erased, base = pictures(10)
    for rows in (base.rows[::-1], base.rows[:-1], (*base.rows[:-1], replace(base.rows[-1], prompt="a cat"))):
        with pytest.raises(RequestError, match=r"baseline .*base-10: its prompts or seeds are not those of .*erased"):
            similarity(erased, replace(base, rows=rows), target="church")
    small = _set(tmp_path / "small", images[:, :32])
    with pytest.raises(RequestError, match=r"baseline .*00000\.png: is of 64 x 32 pixels, .* of 64 x 64"):
        similarity(erased, small, target="church")
    with pytest.raises(RequestError, match="no images"):
        similarity(ImageSet((), (), {}), ImageSet((), (), {}), target="church")
    base.files[0].write_bytes(b"")
    with pytest.raises(RequestError, match=r"baseline .*00000\.png: no readable image"):
        similarity(erased, base, target="church")


def test_measures_that_cannot_be_had_are_refused(
    pictures: Callable[[int], tuple[np.ndarray, ImageSet, ImageSet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, erased, base = pictures(10)
    with pytest.raises(RequestError, match="metric psnr: no such measure; allowed: pixel_distance, ssim, lpips"):
        similarity(erased, base, ("psnr",), target="church")
    for package, name in (("skimage.metrics", "ssim"), ("lpips", "lpips")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RequestError, match=rf"metric {name}: needs [\w-]+: pip install [\w-]+$"):
            similarity(erased, base, (name,), target="church")
