"""Several processes on the CPU do what one does: the same data and mask, and the same training but for rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from erase_concept.masks.mask import Mask
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.formats.tokenizer import clip_tokenizer
from erase_concept.pipelines.model import Diffusion

UNET = "unet/diffusion_pytorch_model.safetensors"
# Gradients are summed in another order. What comes of it, beside how far the weights have moved, is some 1e-6.
TOLERANCE = 1e-4
# A loss that some weights have no part in, and one that goes back to earlier weights.
METHODS = ("forget-me-not", "erasediff")


@pytest.fixture(scope="module")
def ran(new_model: Callable[..., Diffusion], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the scenarios of ``ranks.py``, how the ranks of each ended, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    save_pipeline(new_model(clip_tokenizer()), folder / "model")
    (folder / "concept.json").write_text(json.dumps("church"))
    generator = np.random.default_rng(0)
    for part, count in (("train", 50), ("test", 20)):
        for label in ("a", "b"):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / label / f"{i}.png")
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), *METHODS]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ended = dict(json.loads(line) for line in lines if line.startswith("["))
    return folder, {"said": [line for line in lines if not line.startswith("[")], "stderr": done.stderr, **ended}


def difference(one: Path, other: Path, base: Path) -> float:
    """How far the weights of two files are apart, beside how far those of the first have moved from a base's."""
    a, b, start = (load_file(file) for file in (one, other, base))
    apart = torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt()
    moved = torch.stack([(a[name] - start[name]).float().square().sum() for name in a]).sum().sqrt()
    assert moved > 0
    return float(apart / moved)


@pytest.mark.parametrize("name", ["two", "four"])
def test_data_and_mask_have_the_bits_of_one_process(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, ended = ran
    assert ended["one"] == [0]
    assert set(ended[name]) == {0}, ended["stderr"]
    one, other = (load_file(folder / run / "data.safetensors") for run in ("one", name))
    assert all(torch.equal(one[part], other[part]) for part in one)
    one_mask, mask = (Mask.load(folder / run / "mask.safetensors") for run in ("one", name))
    assert mask.sha256() == one_mask.sha256()
    assert mask.provenance == one_mask.provenance


def test_the_mask_alone_is_that_of_a_run(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["mask"] == [0, 0], ended["stderr"]
    assert Mask.load(folder / "mask.safetensors").sha256() == Mask.load(folder / "one" / "mask.safetensors").sha256()


@pytest.mark.parametrize("name", ["two", "four"])
def test_training_is_that_of_one_process_but_for_rounding(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, _ = ran
    files = [folder / run / "pipeline" / UNET for run in ("one", name)]
    assert difference(*files, folder / "model" / UNET) < TOLERANCE
    about = json.loads((folder / name / "run.json").read_text())
    assert about["checks"]["changed_outside_mask"] == 0
    assert about["processes"] == {"two": 2, "four": 4}[name]
    logs = [(folder / run / "log.jsonl").read_text().splitlines() for run in ("one", name)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_one_is_killed_the_others_end_and_as_many_go_on_to_the_same_bits(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["killed"] == [1, -9]
    assert ended["said"].count("rank 0: lost") == 2  # here, and before the training
    assert ended["other"] == [2]
    problem = f"processes 1: the training in {folder / 'killed' / 'checkpoints' / 'last.safetensors'} was begun with 2"
    assert sum(problem in line for line in ended["said"]) == 1
    assert ended["resumed"] == [0, 0], ended["stderr"]
    one, other = (load_file(folder / run / "pipeline" / UNET) for run in ("two", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_where_one_is_told_to_end_nothing_says_that_the_training_is_done(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["told"] == ended["unlearned-told"] == [2, -15], ended["stderr"]
    said = "rank 0: the training was stopped after step {}; the same command goes on"
    assert [line for line in ended["said"] if "was stopped" in line] == [said.format("3 of 4"), said.format("1 of 8")]
    assert not (folder / "told" / "run.json").exists()
    assert ended["unlearned-on"] == [0, 0], ended["stderr"]
    whole, on = (folder / f"unlearned-{name}" for name in ("2", "told"))
    one, other = (load_file(next((run / "classifier").glob("*.safetensors"))) for run in (whole, on))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((on / "unlearn.json").read_text())["resumed_at_step"] == 1


def test_before_the_training_another_number_of_processes_may_go_on(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["stopped"] == [1, -9]
    assert ended["alone"] == [0], ended["stderr"]
    one, other = (load_file(folder / run / "pipeline" / UNET) for run in ("one", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_that_cannot_be_shared_are_refused(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["uneven"] == [2, 2]
    assert sum("settings.accumulation 3: 2 processes share" in line for line in ended["said"]) == 2
    assert not (folder / "uneven").exists()


def test_a_process_with_another_base_model_or_other_versions_is_told(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["other-model"] == ended["other-versions"] == [2, 2], ended["stderr"]
    told = f"model {folder / 'model'}: is another one for process 1 than for the first"
    assert sum(told in line for line in ended["said"]) == 2
    assert not any((folder / "other-model").iterdir())
    assert sum("processes 2: process 1 has torch 1.0, and the first has" in line for line in ended["said"]) == 2
    assert not (folder / "other-versions").exists()


def test_what_needs_whole_weights_is_refused_in_shards(ran: tuple[Path, dict[str, Any]]) -> None:
    _, ended = ran
    assert ended["refused"] == [0, 0], ended["stderr"]


def test_weights_in_shards_are_updated_to_the_same_bits(ran: tuple[Path, dict[str, Any]]) -> None:
    _, ended = ran
    assert ended["same-steps"] == [0, 0], ended["stderr"]
    assert ended["same-module"] == [0, 0], ended["stderr"]


def test_training_in_shards_is_the_same_but_for_rounding(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["fsdp"] == [0, 0], ended["stderr"]
    files = [folder / run / "pipeline" / UNET for run in ("two", "fsdp")]
    assert difference(*files, folder / "model" / UNET) < TOLERANCE
    about = json.loads((folder / "fsdp" / "run.json").read_text())
    assert about["checks"]["changed_outside_mask"] == 0
    kept = [load_file(folder / run / "checkpoints" / "last.safetensors") for run in ("two", "fsdp")]
    layouts = [{name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} for one in kept]
    assert layouts[0] == layouts[1]


def test_a_checkpoint_of_shards_goes_on_in_shards_to_the_same_bits_and_without_them(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    folder, ended = ran
    assert ended["fsdp-half"] == ended["ddp-half"] == [0, 0], ended["stderr"]
    steps = [json.loads(line)["step"] for line in (folder / "ddp-half" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    whole, half, without = (folder / run / "pipeline" / UNET for run in ("fsdp", "fsdp-half", "ddp-half"))
    one, other = load_file(whole), load_file(half)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert difference(whole, without, folder / "model" / UNET) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_special_losses_are_shared(ran: tuple[Path, dict[str, Any]], method: str) -> None:
    folder, ended = ran
    assert ended[f"{method}-2"] == [0, 0], ended["stderr"]
    files = [folder / f"{method}-{ranks}" / "pipeline" / UNET for ranks in (1, 2)]
    assert difference(*files, folder / "model" / UNET) < TOLERANCE


def test_unlearning_is_shared(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = ran
    assert ended["classifier"] == [0], ended["stderr"]
    assert ended["unlearned-2"] == [0, 0], ended["stderr"]
    masks = [Mask.load(folder / f"unlearned-{ranks}" / "mask.safetensors") for ranks in (1, 2)]
    assert masks[0].sha256() == masks[1].sha256()
    files = [next((folder / f"unlearned-{ranks}" / "classifier").glob("*.safetensors")) for ranks in (1, 2)]
    assert difference(*files, next((folder / "classifier" / "classifier").glob("*.safetensors"))) < TOLERANCE
