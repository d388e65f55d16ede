"""The records of metrics: names, titles, directions, and the varieties of one metric."""

from __future__ import annotations

import subprocess
import sys

import pytest

from erase_concept.eval.attacks import ATTACKS
from erase_concept.eval.metrics import METRICS, metric_record


def test_every_metric_says_what_it_is() -> None:
    records = METRICS.all()
    assert {"ua", "ira", "cra", "top1", "nudity_images", "fid", "frechet", "clip_score", "ssim", "lpips"} <= set(
        records
    )
    assert len({record.title for record in records.values()}) == len(records)
    for name, record in records.items():
        assert record.name == name
        assert record.summary.endswith(".")
        assert record.title[0].isupper()
        assert record.about in ("forget", "retain", "cost")
        assert record.direction in ("higher", "lower")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("ua", "Unlearning accuracy (UA)"),
        ("ua_top5", "Unlearning accuracy (UA), top5"),
        ("frechet_inception", "Fréchet distance, inception"),
        ("frechet_imagenet", "Fréchet distance to the base model"),
        ("feature_distance_efficientnet_lite2", "Feature distance to the base model's image, efficientnet lite2"),
    ],
)
def test_a_variety_is_found_by_the_metric_it_is_one_of(name: str, title: str) -> None:
    found = metric_record(name)
    assert found is not None
    assert (found.name, found.title) == (name, title)


def test_what_is_no_metric_has_no_record() -> None:
    assert metric_record("charm") is None
    assert metric_record("") is None


def test_records_need_no_torch() -> None:
    code = "import sys; from erase_concept.eval.metrics import METRICS; METRICS.all(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]


def test_there_is_no_attack_yet() -> None:
    assert ATTACKS.all() == {}
