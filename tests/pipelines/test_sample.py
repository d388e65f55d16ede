"""Sampling: one generator per image, resumable folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erase_concept.errors import RequestError
from erase_concept.pipelines.diffusion import Diffusion, weights_hash
from erase_concept.pipelines.sample import read_images, sample, sample_images
from erase_concept.prompts.promptset import PromptRow, PromptSet

ROWS = tuple(PromptRow(f"prompt {i}", seed=i * 7, guidance=None if i % 2 else 3.0) for i in range(5))


def images(model: Diffusion, rows: tuple[PromptRow, ...], batch_size: int) -> np.ndarray:
    found = dict(sample_images(model, rows, steps=3, batch_size=batch_size))
    return np.stack([found[i] for i in range(len(rows))])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batch_size_changes_no_image(tiny: Diffusion, batch_size: int) -> None:
    whole = images(tiny, ROWS, 5).astype(int)
    other = images(tiny, ROWS, batch_size).astype(int)
    # Sums of floats may be taken in another order in batches of another size: the last bit of a pixel at most.
    assert np.abs(whole - other).max() <= 1
    assert (whole != other).mean() < 0.01


def test_an_image_depends_on_its_own_row_alone(tiny: Diffusion) -> None:
    whole = images(tiny, ROWS, 5).astype(int)
    alone = images(tiny, ROWS[3:4], 5).astype(int)
    assert np.abs(whole[3] - alone[0]).max() <= 1
    reseeded = images(tiny, (replace(ROWS[3], seed=1),), 5).astype(int)
    assert np.abs(whole[3] - reseeded[0]).max() > 1
    regarded = images(tiny, (replace(ROWS[0], guidance=None),), 5).astype(int)
    assert np.abs(whole[0] - regarded[0]).max() > 1


def test_sizes_are_grouped_and_kept(tiny: Diffusion) -> None:
    rows = (PromptRow("a", 0), PromptRow("b", 1, width=32, height=16), PromptRow("c", 2))
    found = dict(sample_images(tiny, rows, steps=2))
    assert [found[i].shape for i in range(3)] == [(16, 16, 3), (16, 32, 3), (16, 16, 3)]


def test_matches_the_diffusers_pipeline(family: Diffusion) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(family.scheduler.config, algorithm_type="dpmsolver++")
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    theirs = pipeline("a prompt", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np").images[0]
    ours = next(iter(sample_images(family, (PromptRow("a prompt", 11, guidance=3.0),), steps=4)))[1]
    assert np.abs(ours - theirs * 255).max() <= 1
    assert ours.std() > 1


def test_goes_on_where_it_was_killed(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("p", ROWS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert len(list(sample(tiny, prompts, whole, steps=2, batch_size=1))) == 5
    stopped = sample(tiny, prompts, killed, steps=2, batch_size=1)
    next(stopped)
    next(stopped)
    stopped.close()
    with (killed / "manifest.jsonl").open("a") as stream:
        stream.write('{"image": "0000')  # a line cut short
    assert len(list(sample(tiny, prompts, killed, steps=2, batch_size=1))) == 3
    assert list(sample(tiny, prompts, killed, steps=2, batch_size=1)) == []
    first, second = read_images(whole), read_images(killed)
    assert first.rows == second.rows == ROWS
    assert np.array_equal(first.arrays(), second.arrays())


def test_folder_of_another_model_is_refused(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("p", ROWS[:1])
    list(sample(tiny, prompts, tmp_path, steps=2))
    with pytest.raises(RequestError, match=r"--out .*another model"):
        list(sample(tiny, prompts, tmp_path, steps=3))
    with torch.no_grad():
        tiny.unet.conv_out.bias += 1
    with pytest.raises(RequestError, match="another model"):
        list(sample(tiny, prompts, tmp_path, steps=2))


def test_changed_images_are_noticed(tiny: Diffusion, tmp_path: Path) -> None:
    list(sample(tiny, PromptSet("p", ROWS[:2]), tmp_path, steps=2))
    prompts = PromptSet("p", ROWS[:2])
    whole = read_images(tmp_path).arrays()
    for harm in (lambda file: file.write_bytes(b"other"), Path.unlink):
        harm(tmp_path / "00001.png")
        with pytest.raises(RequestError, match=r"00001\.png is missing or differs"):
            read_images(tmp_path)
        assert [file.name for file in sample(tiny, prompts, tmp_path, steps=2)] == ["00001.png"]
        assert np.abs(read_images(tmp_path).arrays().astype(int) - whole).max() <= 1
    with pytest.raises(RequestError, match=r"no manifest\.jsonl"):
        read_images(tmp_path / "absent")


def test_prompts_are_data_not_paths(tiny: Diffusion, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(sample(tiny, PromptSet("p", (PromptRow("../../etc/x/\n", 0),)), out, steps=1))
    assert {file.name for file in out.iterdir()} == {"00000.png", "manifest.jsonl", "sampling.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_weights_hash_sees_every_bit(tiny: Diffusion) -> None:
    before = weights_hash(tiny.unet)
    assert weights_hash(tiny.unet) == before
    with torch.no_grad():
        tiny.unet.conv_in.weight[0, 0, 0, 0] = torch.nextafter(tiny.unet.conv_in.weight[0, 0, 0, 0], torch.tensor(9.0))
    assert weights_hash(tiny.unet) != before
