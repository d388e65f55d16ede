"""Images are sampled once, kept, read from folders, and matched with those of the other model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erase_concept.cli.main import main
from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Report

Measured = Callable[..., tuple[list[tuple[str, int, int]], Report]]
Noise = Callable[[Path, int, int], str]
MOVED = """metrics: [pixel_distance, feature_distance]
settings: {limit: 3, steps: 2, metric.extractor: emojinette}
blur: false
"""


def test_a_base_model_that_was_measured_is_found_again(
    shaken: str, i2p: str, tmp_path: Path, measured: Measured
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"prompts: {i2p}\n{MOVED}")
    asked = {"benchmark": str(own), "baseline": "emojinette", "concept": "church"}
    _, first = measured(shaken, out=tmp_path / "a", **asked)
    assert first.provenance["sampled"] == {"erased": 3, "base": 3}
    events, second = measured("emojinette", out=tmp_path / "b", **asked)
    assert [event for event in events if event[0] == "base"] == [("base", 3, 3)]
    assert second.provenance["sampled"] == {"erased": 3, "base": 0}
    for name in ("00000.png", "00002.png"):
        one, two = (tmp_path / out / "samples" / "base" / name for out in "ab")
        assert one.stat().st_mtime_ns == two.stat().st_mtime_ns
    assert {score.metric: score.value for score in second.scores} == {
        "pixel_distance": 0,
        "feature_distance_emojinette": pytest.approx(0, abs=1e-6),
    }
    assert first.score("pixel_distance").value > 1
    # Another setting is another image.
    _, third = measured(shaken, out=tmp_path / "c", settings={"steps": 1}, **asked)
    assert third.provenance["sampled"]["base"] == 3
    # What was damaged on the shelf is made again.
    for file in (tmp_path / ".baselines").glob("*/00001.png"):
        file.unlink()
        file.write_bytes(b"")
    _, fourth = measured(shaken, out=tmp_path / "d", **asked)
    assert fourth.provenance["sampled"]["base"] == 1
    # Sampled in a batch of another size, it may differ by a grey level here and there.
    assert fourth.score("pixel_distance").value == pytest.approx(first.score("pixel_distance").value, rel=1e-3)


def test_folders_of_images_made_elsewhere(i2p: str, tmp_path: Path, measured: Measured, noise: Noise) -> None:
    erased, base = noise(tmp_path / "erased", 8, 0), noise(tmp_path / "base", 7, 1)
    (tmp_path / "erased" / "params.txt").write_text("steps: 20")
    asked = {"benchmark": "coco", "prompts": i2p, "concept": "church", "settings": {"metric.extractor": "emojinette"}}
    events, report = measured(erased, baseline=base, out=tmp_path / "out", **asked)
    assert events == []
    notes = report.provenance["notes"]
    assert "1 file is no image: params.txt" in notes["erased"]
    assert "of 8 prompts 1 without an image: case number 7" in notes["base"]
    assert any("1 images left out" in note for note in notes["erased"])
    score = report.score("frechet_emojinette")
    assert score is not None
    assert score.n == 7
    assert "images made elsewhere, matched by case number" in score.protocol
    assert "not measured" in report.provenance  # no CLIP model is here, and the network is not asked
    assert "clip_score" in report.provenance["not measured"]
    # Against real images both models are measured, and alone one is.
    reference = {"metric.extractor": "emojinette", "metric.reference": base}
    _, against = measured(erased, baseline=base, out=tmp_path / "b", **asked | {"settings": reference})
    assert against.score("frechet_emojinette").baseline == pytest.approx(0, abs=1e-6)
    _, alone = measured(erased, out=tmp_path / "c", **asked | {"settings": reference})
    assert alone.score("frechet_emojinette").baseline is None
    assert alone.base is None


def test_images_are_not_asked_for_again(i2p: str, tmp_path: Path, measured: Measured, noise: Noise) -> None:
    folder = noise(tmp_path / "erased", 8, 0)
    asked = {"benchmark": "coco", "prompts": i2p, "concept": "church", "baseline": folder}
    with pytest.raises(RequestError, match=r"seeds 2: .* holds images"):
        measured(folder, out=tmp_path / "out", settings={"metric.extractor": "emojinette", "seeds": 2}, **asked)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.jsonl").touch()
    with pytest.raises(RequestError, match=r"baseline .*holds no manifest"):
        measured(folder, out=tmp_path / "out", **asked | {"baseline": str(tmp_path / "empty")})


@pytest.mark.slow
def test_processes_share_the_sampling_and_one_measures(
    shaken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes write what one does, tell it once, and keep the base model's images once."""
    asked = [f"{place},some {noun} or other,{noun},{place}" for place, noun in enumerate(("church", "dog", "church"))]
    (tmp_path / "p.csv").write_text("\n".join(["case_number,prompt,object,seed", *asked]))
    command = ["eval", shaken, "-b", "imagenette", "-c", "church", "-p", "p.csv"]
    command += ["--judge", "emojinette", "--baseline", "emojinette", "--steps", "2", "--batch-size", "1"]
    command += ["--json", "-o", "out"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "p.csv", tmp_path / name)
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(sys, "argv", ["erase-concept", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "erase_concept", *command],
        cwd=tmp_path / "two",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = {}
    for name, (out, err) in {"one": capsys.readouterr(), "two": (done.stdout, done.stderr)}.items():
        told[name] = json.loads(out)  # one report, and nothing else
        assert err.count("recall_emojinette not measured") == 1
        assert len([entry for entry in (tmp_path / name / ".baselines").iterdir() if entry.is_dir()]) == 1
        for volatile in ("evaluated", "seconds"):
            del told[name]["provenance"][volatile]
    assert told["two"] == told["one"]
    assert told["two"]["provenance"]["sampled"] == {"erased": 3, "base": 3}
    for who in ("erased", "base"):
        one, two = (tmp_path / name / "out" / "samples" / who for name in told)
        assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
        assert all(file.read_bytes() == (two / file.name).read_bytes() for file in one.iterdir())
