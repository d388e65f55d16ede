"""Sampling: one generator per image, resumable folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.image_set import read_images
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.sample import SCHEDULERS, Sampling, iter_sample, sample, sample_images
from erase_concept.prompts.promptset import PromptRow, PromptSet, read_prompts

ROWS = tuple(PromptRow(f"prompt {i}", seed=i * 7, guidance=None if i % 2 else 3.0) for i in range(5))


def images(
    model: Diffusion, rows: tuple[PromptRow, ...], batch_size: int, scheduler: str | None = None, steps: int = 3
) -> np.ndarray:
    found = dict(sample_images(model, rows, Sampling(steps=steps, batch_size=batch_size, scheduler=scheduler)))
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
    found = dict(sample_images(tiny, rows, Sampling(steps=2)))
    assert [found[i].shape for i in range(3)] == [(16, 16, 3), (16, 32, 3), (16, 16, 3)]


@torch.no_grad()
def as_before(model: Diffusion, rows: list[PromptRow], batch_size: int, steps: int) -> np.ndarray:
    """Sample as the published results were: every batch encodes its own prompts, with one solver for all."""
    found = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        embeddings = model.encode_prompts([row.prompt for row in batch])
        solver = diffusers.DPMSolverMultistepScheduler.from_config(model.scheduler.config, algorithm_type="dpmsolver++")
        solver.set_timesteps(steps)
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(row.seed)) for row in batch]
        latents = torch.stack(noise) * solver.init_noise_sigma
        scale = torch.tensor([7.5 if row.guidance is None else row.guidance for row in batch]).view(-1, 1, 1, 1)
        for timestep in solver.timesteps:
            noisy = solver.scale_model_input(latents, timestep)
            predicted = model.cfg(noisy, timestep, embeddings, model.encode_uncond(), scale)
            latents = solver.step(predicted, timestep, latents).prev_sample
        found.append(model.decode(latents).numpy())
    return np.concatenate(found)


def test_the_defaults_give_the_same_bits_as_ever(family: Diffusion) -> None:
    rows = [PromptRow(f"prompt {i % 4}", seed=i, guidance=None if i % 3 else 2.0) for i in range(11)]
    found = dict(sample_images(family, rows, Sampling(steps=4, batch_size=4)))
    assert np.array_equal(np.stack([found[i] for i in range(11)]), as_before(family, rows, 4, 4))


def test_each_prompt_is_encoded_once(tiny: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = Diffusion.encode_prompts

    def spy(model: Diffusion, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return encode(model, prompts)

    monkeypatch.setattr(Diffusion, "encode_prompts", spy)
    rows = [PromptRow("abc"[i % 3], i, width=16 + 8 * (i % 2), height=16) for i in range(12)]
    assert len(list(sample_images(tiny, rows, Sampling(steps=1, batch_size=2)))) == 12
    assert sorted(seen) == ["", "a", "b", "c"]


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers, of numpy
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_size_changes_no_image_with_any_scheduler(tiny: Diffusion, scheduler: str) -> None:
    if scheduler == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    whole = images(tiny, ROWS, 5, scheduler, 6).astype(int)
    assert np.abs(whole - images(tiny, ROWS, 2, scheduler, 6).astype(int)).max() <= 1
    assert whole.std() > 1
    alone = images(tiny, ROWS[2:3], 1, scheduler, 6).astype(int)
    assert np.abs(whole[2] - alone[0]).max() <= 1


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler"]
)
def test_schedulers_match_the_diffusers_pipeline(tiny: Diffusion, scheduler: str) -> None:
    pipeline = tiny.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(tiny.scheduler.config)
    generator = torch.Generator().manual_seed(ROWS[2].seed)
    theirs = pipeline(
        ROWS[2].prompt, num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np"
    ).images[0]
    assert np.abs(images(tiny, ROWS, 5, scheduler)[2] - theirs * 255).max() <= 1


def test_schedulers_are_told_and_refused(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("p", ROWS[:1])
    list(iter_sample(tiny, prompts, tmp_path, Sampling(steps=2, scheduler="DDIMScheduler")))
    assert read_images(tmp_path).settings["sampler"] == "DDIMScheduler"
    with pytest.raises(RequestError, match="another model, prompt set or setting"):
        list(iter_sample(tiny, prompts, tmp_path, Sampling(steps=2)))
    for name in ("DDIM", "FlowMatchEulerDiscreteScheduler", "StableDiffusionPipeline", "__version__"):
        with pytest.raises(RequestError, match=f"scheduler {name}: allowed: DDIMScheduler, DDPMScheduler"):
            list(iter_sample(tiny, prompts, tmp_path / "no", Sampling(steps=2, scheduler=name)))
    with pytest.raises(RequestError, match="scheduler DDIMScheduler: cannot take 1001 steps"):
        list(iter_sample(tiny, prompts, tmp_path / "no", Sampling(steps=1001, scheduler="DDIMScheduler")))
    assert not (tmp_path / "no").exists()


def test_too_little_memory_is_told_in_a_line(tiny: Diffusion) -> None:
    side = 8 * 10**8  # more bytes than a processor can address, so that nothing is really taken
    rows = [PromptRow("a", 0, width=side, height=side), PromptRow("b", 1, width=side, height=side)]
    with pytest.raises(EraseError, match=f"sample 2 images of {side} x {side} pixels at once: choose a smaller batch"):
        next(sample_images(tiny, rows, Sampling(steps=1)))
    with pytest.raises(EraseError, match=f"too little memory to sample an image of {side} x {side} pixels"):
        next(sample_images(tiny, rows, Sampling(steps=1, batch_size=1)))


def test_matches_the_diffusers_pipeline(family: Diffusion) -> None:
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        family.scheduler.config, algorithm_type="dpmsolver++"
    )
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    theirs = pipeline("a prompt", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np").images[0]
    ours = next(iter(sample_images(family, (PromptRow("a prompt", 11, guidance=3.0),), Sampling(steps=4))))[1]
    assert np.abs(ours - theirs * 255).max() <= 1
    assert ours.std() > 1


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_up_to_1_there_is_no_guidance_as_in_diffusers(family: Diffusion, scale: float) -> None:
    # Turbo models are sampled with 0, which by the formula of guidance would not see the prompt at all.
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(family.scheduler.config)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    theirs = pipeline("a prompt", num_inference_steps=2, guidance_scale=scale, latents=noise, output_type="np")
    sampling = Sampling(steps=2, scheduler="EulerDiscreteScheduler")
    ours = next(iter(sample_images(family, (PromptRow("a prompt", 11, guidance=scale),), sampling)))[1]
    assert np.abs(ours - theirs.images[0] * 255).max() <= 1


def test_goes_on_where_it_was_killed(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("p", ROWS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert len(list(iter_sample(tiny, prompts, whole, Sampling(steps=2, batch_size=1)))) == 5
    stopped = iter_sample(tiny, prompts, killed, Sampling(steps=2, batch_size=1))
    next(stopped)
    next(stopped)
    stopped.close()
    with (killed / "manifest.jsonl").open("a") as stream:
        stream.write('{"image": "0000')  # a line cut short
    assert len(list(iter_sample(tiny, prompts, killed, Sampling(steps=2, batch_size=1)))) == 3
    assert list(iter_sample(tiny, prompts, killed, Sampling(steps=2, batch_size=1))) == []
    first, second = read_images(whole), read_images(killed)
    assert first.rows == second.rows == ROWS
    assert np.array_equal(first.arrays(), second.arrays())


def test_sample_runs_to_the_end_and_returns_the_images(
    tiny: Diffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = PromptSet("p", ROWS)
    next(iter_sample(tiny, prompts, tmp_path / "one", Sampling(steps=2, guidance=4)))  # and sample goes on from there
    made = sample(tiny, prompts, str(tmp_path / "one"), steps=2, guidance=4)
    list(iter_sample(tiny, prompts, tmp_path / "other", Sampling(steps=2, guidance=4)))
    again = read_images(tmp_path / "other")
    assert (made.rows, made.settings) == (again.rows, again.settings)
    assert made.rows == ROWS
    assert np.abs(made.arrays().astype(int) - again.arrays()).max() <= 1
    assert capsys.readouterr().out == ""  # the bar is for stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("guidance", -1.0), ("guidance", float("nan")), ("batch_size", 0), ("guard", "sld")],
)
def test_settings_out_of_range_are_refused(tiny: Diffusion, tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        sample(tiny, PromptSet("p", ROWS), tmp_path / "out", **{setting: value})
    assert refused.value.setting == setting
    assert not (tmp_path / "out").exists()


def test_labels_follow_the_prompt_set(tiny: Diffusion, tmp_path: Path) -> None:
    list(iter_sample(tiny, PromptSet("p", ROWS[:2]), tmp_path, Sampling(steps=1)))
    told = tuple(replace(row, category="hate", case_number=7 + i) for i, row in enumerate(ROWS[:2]))
    assert list(iter_sample(tiny, PromptSet("p", told), tmp_path, Sampling(steps=1))) == []
    assert [(row.category, row.case_number) for row in read_images(tmp_path).rows] == [("hate", 7), ("hate", 8)]


SCRIPT = """
import json
import os
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from erase_concept.pipelines.load import load
from erase_concept.pipelines.image_set import read_images
from erase_concept.pipelines.sample import Sampling, iter_sample, sample_images
from erase_concept.prompts.find_prompts import find_prompts

home = Path(sys.argv[1])
rank = int(os.fork() == 0)  # the imports are paid for once
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
model, asked = load(home / "model", device="cpu"), find_prompts(str(home / "p.csv"))
made = []
for name in ("fresh", "resumed"):
    made.append([file.name for file in iter_sample(model, asked, home / name, Sampling(steps=2, batch_size=2))])
files = read_images(home / "fresh").files
alone = dict(sample_images(model, asked.rows, Sampling(steps=2, batch_size=2)))  # by this process alone
assert len(alone) == len(files)
assert all(np.array_equal(alone[i], np.asarray(Image.open(file))) for i, file in enumerate(files))
(home / f"made-{rank}.json").write_text(json.dumps(made))
if rank:
    os._exit(0)
assert os.wait()[1] == 0
"""


def test_processes_share_the_work(tiny: Diffusion, tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    rows = tuple(PromptRow(f"prompt {i % 3}", i, width=16 if i % 2 else None) for i in range(9))
    PromptSet("p", rows).save(tmp_path / "p.csv")
    model = load(tmp_path / "model", device="cpu")
    list(iter_sample(model, read_prompts(tmp_path / "p.csv"), tmp_path / "alone", Sampling(steps=2, batch_size=2)))
    # Two processes were killed before their parts of the manifest were merged, one of them while it wrote a line.
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "alone", resumed)
    lines = {json.loads(line)["image"]: line for line in (resumed / "manifest.jsonl").read_text().splitlines(True)}
    lines = {name: lines[name] for name in sorted(lines)}
    (resumed / "manifest.jsonl").unlink()
    for name in ("00004.png", "00007.png", "00008.png"):
        (resumed / name).unlink()
    kept = list(lines.values())
    (resumed / "manifest-0.jsonl").write_text("".join(kept[:4]) + kept[4][:20])
    (resumed / "manifest-1.jsonl").write_text("".join(kept[5:7]))
    assert len(read_images(resumed).rows) == 6

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    given = {**os.environ, **there, "WORLD_SIZE": "2"}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = [json.loads((tmp_path / f"made-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(len(of[0]) for of in made) == [4, 5]
    assert sorted(name for of in made for name in of[0]) == list(lines)
    assert sorted(name for of in made for name in of[1]) == ["00004.png", "00007.png", "00008.png"]
    assert all(len(of[1]) < 3 for of in made)
    for name in ("fresh", "resumed"):
        assert {file.name for file in (tmp_path / name).iterdir()} == {*lines, "manifest.jsonl", "sampling.json"}
        assert read_images(tmp_path / name).rows == rows
    whole, again = (read_images(tmp_path / name) for name in ("alone", "resumed"))
    for one, two in zip(whole.files, again.files, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


def test_folder_of_another_model_is_refused(tiny: Diffusion, tmp_path: Path) -> None:
    prompts = PromptSet("p", ROWS[:1])
    list(iter_sample(tiny, prompts, tmp_path, Sampling(steps=2)))
    with pytest.raises(RequestError, match=r"^out .*another model"):
        list(iter_sample(tiny, prompts, tmp_path, Sampling(steps=3)))
    with torch.no_grad():
        tiny.unet.conv_out.bias += 1
    with pytest.raises(RequestError, match="another model"):
        list(iter_sample(tiny, prompts, tmp_path, Sampling(steps=2)))


@pytest.mark.parametrize("what", ["scheduler", "settings", "size", "eta"])
def test_all_that_shapes_an_image_is_told_apart(tiny: Diffusion, tmp_path: Path, what: str) -> None:
    rows = PromptSet("p", ROWS[:1])
    list(iter_sample(tiny, rows, tmp_path / "out", Sampling(steps=1)))
    sampling = Sampling(steps=1, eta=0.5, scheduler=None) if what == "eta" else Sampling(steps=1)
    if what == "scheduler":
        changed = diffusers.DDIMScheduler.from_config(tiny.scheduler.config, prediction_type="v_prediction")
        tiny = tiny.with_components(scheduler=changed)
    elif what == "settings":
        tiny = replace(tiny, settings={"force_zeros_for_empty_prompt": True})
    elif what == "size":
        tiny.unet.register_to_config(sample_size=16)
    with pytest.raises(RequestError, match="another model, prompt set or setting"):
        list(iter_sample(tiny, rows, tmp_path / "out", sampling))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("vae", {"scaling_factor": 0.5}),
        ("unet", {"act_fn": "relu"}),
        ("unet", {"attention_head_dim": 4}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder", {"num_attention_heads": 4}),
    ],
)
def test_the_same_weights_under_another_configuration_are_another_model(
    tiny: Diffusion, tmp_path: Path, part: str, changed: dict[str, Any]
) -> None:
    save_pipeline(tiny, tmp_path)
    before = load(tmp_path).besides_unet(["a"])
    file = tmp_path / part / "config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | changed))
    after = load(tmp_path).besides_unet(["a"])
    assert [name for name in before if before[name] != after[name]] == ["configurations"]


def test_what_a_configuration_leaves_to_its_class_makes_no_other_model(family: Diffusion, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path)
    before = load(tmp_path).besides_unet(["a"])
    assert before == family.besides_unet(["a"])  # made here, and loaded from a folder that says everything
    for part in family.modules:
        file = tmp_path / part / "config.json"
        told = json.loads(file.read_text())
        left_out = (
            "resnet_time_scale_shift",
            "act_fn",
            "layer_norm_eps",
            "transformers_version",
            "dtype",
            "shift_factor",
        )
        file.write_text(json.dumps({name: value for name, value in told.items() if name not in left_out}))
    assert load(tmp_path).besides_unet(["a"]) == before


def test_prompts_that_are_too_long_are_counted(tiny: Diffusion) -> None:
    longest = tiny.tokenizer.model_max_length - 2  # beside its start and its end
    letters = [" ".join("a" * count) for count in (longest, longest + 1)]
    assert tiny.cut_prompts([letters[0], letters[1], letters[1], "a"]) == 1
    assert tiny.cut_prompts([]) == 0
    ids = tiny.token_ids([letters[1], f"{letters[1]} b"])[0]
    assert torch.equal(ids[0], ids[1])  # which is why they are counted


def test_a_unet_says_its_size_in_any_way(tiny: Diffusion) -> None:
    for told, size in (([8, 8], 16), ((12, 12), 24), (None, 128)):
        tiny.unet.register_to_config(sample_size=told)
        assert tiny.size == size
    tiny.unet.register_to_config(sample_size=[8, 12])
    with pytest.raises(ValueError, match=r"sample_size is \[8, 12\]: set one number"):
        tiny.family.check_fit(tiny.components)


def test_changed_images_are_noticed(tiny: Diffusion, tmp_path: Path) -> None:
    list(iter_sample(tiny, PromptSet("p", ROWS[:2]), tmp_path, Sampling(steps=2)))
    prompts = PromptSet("p", ROWS[:2])
    whole = read_images(tmp_path).arrays()
    for harm in (lambda file: file.write_bytes(b"other"), Path.unlink):
        harm(tmp_path / "00001.png")
        with pytest.raises(RequestError, match=r"00001\.png is missing or differs"):
            read_images(tmp_path)
        assert [file.name for file in iter_sample(tiny, prompts, tmp_path, Sampling(steps=2))] == ["00001.png"]
        assert np.array_equal(read_images(tmp_path).arrays(), whole)
    with pytest.raises(RequestError, match=r"no manifest\.jsonl"):
        read_images(tmp_path / "absent")


def test_prompts_are_data_not_paths(tiny: Diffusion, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(iter_sample(tiny, PromptSet("p", (PromptRow("../../etc/x/\n", 0),)), out, Sampling(steps=1)))
    assert {file.name for file in out.iterdir()} == {"00000.png", "manifest.jsonl", "sampling.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_any_text_is_a_prompt(tiny: Diffusion, tmp_path: Path) -> None:
    texts = ("x" * 10**5, "🪦 שלום \u2067rtl\u2069", "a\u2028b\x85c\x0bd\r\ne", '"quoted", {"a": 1}', "<script>", "")
    rows = tuple(PromptRow(text, i) for i, text in enumerate(texts))
    list(iter_sample(tiny, PromptSet("p", rows), tmp_path, Sampling(steps=1)))
    assert read_images(tmp_path).rows == rows
    assert list(iter_sample(tiny, PromptSet("p", rows), tmp_path, Sampling(steps=1))) == []
    assert {file.name for file in tmp_path.glob("*.png")} == {f"{i:05d}.png" for i in range(len(rows))}


def test_manifests_name_no_paths(tiny: Diffusion, tmp_path: Path) -> None:
    list(iter_sample(tiny, PromptSet("p", ROWS[:1]), tmp_path / "out", Sampling(steps=1)))
    manifest = tmp_path / "out" / "manifest.jsonl"
    [line] = map(json.loads, manifest.read_text().splitlines())
    (tmp_path / "00000.png").write_bytes((tmp_path / "out" / "00000.png").read_bytes())
    manifest.write_text("".join(json.dumps(o) + "\n" for o in ({**line, "image": "../00000.png"}, 3, {"image": 4}, [])))
    with pytest.raises(RequestError, match=r"no manifest\.jsonl with images"):
        read_images(tmp_path / "out")
    manifest.write_bytes(b"\xff")
    with pytest.raises(RequestError, match=r"out .*manifest\.jsonl: is no text in UTF-8"):
        list(iter_sample(tiny, PromptSet("p", ROWS[:1]), tmp_path / "out", Sampling(steps=1)))


def test_weights_hash_sees_every_bit(tiny: Diffusion) -> None:
    before = weights_hash(tiny.unet)
    assert weights_hash(tiny.unet) == before
    with torch.no_grad():
        tiny.unet.conv_in.weight[0, 0, 0, 0] = torch.nextafter(tiny.unet.conv_in.weight[0, 0, 0, 0], torch.tensor(9.0))
    assert weights_hash(tiny.unet) != before
