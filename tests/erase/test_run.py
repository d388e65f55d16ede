"""A whole run on the tiny model: one folder, resumable, reproducible, checked."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erase_concept import masks
from erase_concept.errors import EraseError, RequestError
from erase_concept.frozen import check_frozen
from erase_concept.make_data import data_key, make_data_for
from erase_concept.masks.make import compute_mask, make_mask, mask, mask_key, saliency
from erase_concept.masks.mask import Mask
from erase_concept.methods import METHODS
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept, combine
from erase_concept.recipe import Recipe, earlier_runs, make_recipe, read_recipe, recipe_for
from erase_concept.run import Run, erase, iter_erase, run_recipe
from erase_concept.run_folder import read_run
from erase_concept.training.checkpoint import steps_done
from erase_concept.training.loop import Record, Training
from erase_concept.training.offload import offload_to_disk


@pytest.fixture
def model(tiny: Diffusion, tmp_path: Path) -> Path:
    save_pipeline(tiny, tmp_path / "model")
    return tmp_path / "model"


def recipe(model: Path, concept: Concept, **changes: object) -> Recipe:
    settings = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 2}
    values = {"model": str(model), "concept": concept, "data": {"forget": 4, "retain": 4, "steps": 2}}
    return make_recipe(values | {"settings": settings} | changes)


def run(recipe: Recipe, out: Path) -> list[Record | str]:
    return list(iter_erase(recipe, out))


def test_a_run_changes_the_masked_unet_weights_and_nothing_else(
    tiny: Diffusion, model: Path, square: Concept, tmp_path: Path
) -> None:
    events = run(recipe(model, square), tmp_path / "run")
    assert [e for e in events if isinstance(e, str)] == ["load", "data", "mask", "erase", "export"]
    assert [e.step for e in events if isinstance(e, Record)] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    erased, mask = load(tmp_path / "run" / "pipeline"), Mask.load(tmp_path / "run" / "mask.safetensors")
    assert weights_hash(erased.vae) == weights_hash(tiny.vae)
    assert weights_hash(erased.text_encoder) == weights_hash(tiny.text_encoder)
    changed = 0
    for name, p in erased.unet.named_parameters():
        differs = p != tiny.unet.get_parameter(name)
        assert not bool((differs & ~mask.dense(name)).any())
        changed += int(differs.sum())
    run_info = read_run(tmp_path / "run")
    surviving = run_info["checks"].pop("surviving")
    assert changed >= surviving["float16"] >= surviving["bfloat16"] >= surviving["float8_e4m3fn"] > 0
    assert run_info["checks"] == {"weights": mask.total, "changed": changed, "changed_outside_mask": 0}
    assert mask.count == round(mask.total / 2)
    assert run_info["base"]["unet"] == weights_hash(tiny.unet)
    assert run_info["erased"]["unet"] == weights_hash(erased.unet)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "*square* was erased" in card
    assert run_info["erased"]["unet"] in card


@pytest.mark.parametrize(
    ("method", "data", "steps"),
    [
        # Five forget rows in batches of two are three steps, anchor rows too; a mask's rows are not the method's.
        ("salun", {"forget": 5, "anchor": 0}, 2 * 3),
        ("salun", {"forget": 5, "anchor": 4}, 2 * 5),
        ("selective-amnesia", {"forget": 5, "anchor": 3}, 2 * 2),
        ("erasediff", {"forget": 3}, 2 * 2 * 2),
        ("l1-sparse", {"forget": 5, "retain": 7}, 2 * 4),
    ],
)
def test_epochs_are_passes_over_the_rows(
    model: Path, square: Concept, tmp_path: Path, method: str, data: dict[str, int], steps: int
) -> None:
    settings = {"epochs": 2, "batch_size": 2, "lr": 1e-3} | ({"fisher_rows": 1} if "amnesia" in method else {})
    data = {"retain": 4, "steps": 2} | data
    asked = recipe(model, square, method=method, settings=settings, data=data, mask={"kind": "salient"})
    records = [event for event in run(asked, tmp_path / "run") if isinstance(event, Record)]
    assert [record.step for record in records] == [*range(1, steps + 1)]
    told = read_run(tmp_path / "run")["settings"]
    assert (told["steps"], told["epochs"]) == (steps, None)
    assert make_recipe(read_recipe(tmp_path / "run" / "recipe.yaml")) == asked


def test_every_family_can_be_erased(family: Diffusion, square: Concept, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model")
    run(recipe(tmp_path / "model", square, mask={"guidance": 2.0}), tmp_path / "run")
    run_info = read_run(tmp_path / "run")
    assert run_info["checks"]["changed_outside_mask"] == 0
    erased = load(tmp_path / "run" / "pipeline")
    assert weights_hash(erased.unet) == run_info["erased"]["unet"]
    for name, encoder in erased.text_encoders.items():
        assert weights_hash(encoder) == weights_hash(family.text_encoders[name])


def test_same_recipe_same_bits_and_no_work_twice(model: Path, square: Concept, tmp_path: Path) -> None:
    for name in "ab":
        run(recipe(model, square), tmp_path / name)
    first, second = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    assert first["erased"] == second["erased"]
    assert first["mask"] == second["mask"]
    assert run(recipe(model, square), tmp_path / "a") == []
    run(recipe(model, square, seed=1), tmp_path / "c")
    assert read_run(tmp_path / "c")["erased"] != first["erased"]


@pytest.mark.parametrize("stop", ["mask", "erase", 1, 3])
def test_killed_anywhere_it_goes_on_to_the_same_bits(
    model: Path, square: Concept, tmp_path: Path, stop: str | int
) -> None:
    run(recipe(model, square), tmp_path / "whole")
    for event in iter_erase(recipe(model, square), tmp_path / "killed"):
        if stop in (event, getattr(event, "step", None)):
            break
    run(recipe(model, square), tmp_path / "killed")
    assert read_run(tmp_path / "killed")["erased"] == read_run(tmp_path / "whole")["erased"]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


@pytest.mark.parametrize("line", ["{}", "[1]", '{"loss": "0.5"}', '{"loss": true}', "[" * 1000, "\xff"])
def test_a_damaged_log_is_refused_and_without_it_the_run_goes_on(
    model: Path, square: Concept, tmp_path: Path, line: str
) -> None:
    often = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 1}
    run(recipe(model, square, settings=often), tmp_path / "whole")
    for event in iter_erase(recipe(model, square, settings=often), tmp_path / "killed"):
        if getattr(event, "step", 0) == 3:
            break
    log = tmp_path / "killed" / "log.jsonl"
    log.write_bytes(f"{line}\n".encode("latin-1"))
    with pytest.raises(RequestError, match=r"log\.jsonl: is (damaged: line 1 is no step's record|no text in UTF-8)"):
        run(recipe(model, square, settings=often), tmp_path / "killed")
    log.unlink()
    run(recipe(model, square, settings=often), tmp_path / "killed")
    assert read_run(tmp_path / "killed")["erased"] == read_run(tmp_path / "whole")["erased"]


def test_the_checkpoint_of_another_training_is_refused(model: Path, square: Concept, tmp_path: Path) -> None:
    often = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 1}
    for name, settings in (("adam", often), ("sgd", {**often, "optimizer": "sgd"}), ("short", {**often, "steps": 1})):
        for event in iter_erase(recipe(model, square, settings=settings), tmp_path / name):
            if getattr(event, "step", 0) == (1 if name == "short" else 3):
                break
    checkpoint = "checkpoints/last.safetensors"
    for name, settings, said in (
        ("sgd", {**often, "optimizer": "sgd"}, "is the checkpoint of another training: "),
        ("short", {**often, "steps": 1}, "has 2 steps behind it, and this training 1 in all"),
    ):
        (tmp_path / name / "checkpoints").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "adam" / checkpoint, tmp_path / name / checkpoint)
        with pytest.raises(RequestError, match=f"checkpoint .*: {said}.*; delete it to train from the start"):
            run(recipe(model, square, settings=settings), tmp_path / name)


def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one(model: Path, square: Concept, tmp_path: Path) -> None:
    often = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 1}
    run(recipe(model, square, settings=often), tmp_path / "whole")
    for event in iter_erase(recipe(model, square, settings=often), tmp_path / "killed"):
        if getattr(event, "step", 0) == 4:
            break
    last = tmp_path / "killed" / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    again = run(recipe(model, square, settings=often), tmp_path / "killed")
    assert [event.step for event in again if isinstance(event, Record)] == [3, 4]
    assert read_run(tmp_path / "killed")["erased"] == read_run(tmp_path / "whole")["erased"]


@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_lets_the_step_end_and_saves_it(model: Path, square: Concept, tmp_path: Path, step: int) -> None:
    rarely = {"steps": 4, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 100}
    asked = recipe(model, square, settings=rarely)
    run(asked, tmp_path / "whole")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted() -> None:
        for event in iter_erase(asked, tmp_path / "run"):
            if getattr(event, "step", 0) == step:
                signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps_done(tmp_path / "run" / "checkpoints" / "last.safetensors") == step
    again = run(asked, tmp_path / "run")
    assert [event.step for event in again if isinstance(event, Record)] == [*range(step + 1, 5)]
    assert read_run(tmp_path / "run")["erased"] == read_run(tmp_path / "whole")["erased"]


def test_a_run_that_was_killed_as_it_began_can_begin(model: Path, square: Concept, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml.partial").write_text("model:")
    run(recipe(model, square), tmp_path / "run")
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_two_processes_do_not_work_in_one_folder(model: Path, square: Concept, tmp_path: Path) -> None:
    first = iter_erase(recipe(model, square), tmp_path / "run")
    assert [next(first), next(first)] == ["load", "data"]
    with pytest.raises(RequestError, match="another process is at work in it"):
        run(recipe(model, square), tmp_path / "run")
    first.close()
    assert len(run(recipe(model, square), tmp_path / "run")) > 2
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0


def test_folders_of_other_things_are_refused(model: Path, square: Concept, tmp_path: Path) -> None:
    run(recipe(model, square), tmp_path / "run")
    with pytest.raises(RequestError, match=r"out .*another recipe"):
        run(recipe(model, square, seed=1), tmp_path / "run")
    with pytest.raises(RequestError, match=r"out .*is no run folder"):
        run(recipe(model, square), model)
    with pytest.raises(RequestError, match="holds no complete run"):
        read_run(model)


def test_a_base_model_that_changed_meanwhile_is_noticed(
    tiny: Diffusion, model: Path, square: Concept, tmp_path: Path
) -> None:
    for event in iter_erase(recipe(model, square), tmp_path / "run"):
        if event == "mask":
            break
    with torch.no_grad():
        tiny.unet.conv_out.bias += 1
    save_pipeline(tiny, model)
    with pytest.raises(RequestError, match="has changed since"):
        run(recipe(model, square), tmp_path / "run")
    # Without what was made from it, its mask and its checkpoint would still be another model's.
    (tmp_path / "run" / "data.safetensors").unlink()
    with pytest.raises(RequestError, match=r"has changed since the run in .* began"):
        run(recipe(model, square), tmp_path / "run")


@pytest.mark.parametrize("what", ["scheduler", "vae", "text_encoder"])
def test_a_base_model_that_changed_in_another_part_is_noticed(
    tiny: Diffusion, model: Path, square: Concept, tmp_path: Path, what: str
) -> None:
    for event in iter_erase(recipe(model, square), tmp_path / "run"):
        if event == "mask":
            break
    if what == "scheduler":
        told = type(tiny.scheduler).from_config(tiny.scheduler.config, beta_end=0.02)
        tiny = tiny.with_components(scheduler=told)
    else:
        with torch.no_grad():
            next(tiny.modules[what].parameters()).add_(1)
    save_pipeline(tiny, model)
    with pytest.raises(RequestError, match="has changed since"):
        run(recipe(model, square), tmp_path / "run")


def test_images_that_changed_are_told_by_their_bytes(model: Path, square: Concept, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    shown = recipe(model, replace(square, images=str(tmp_path)))
    keys = [(data_key(shown, "base"), mask_key(shown, "base"))]
    (tmp_path / "._1.png").write_bytes(b"no picture")
    keys.append((data_key(shown, "base"), mask_key(shown, "base")))
    assert keys[0] == keys[1]
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "1.png")
    after = (data_key(shown, "base"), mask_key(shown, "base"))
    assert after[0] != keys[0][0]
    assert after[1] != keys[0][1]


@pytest.mark.parametrize("kind", ["none", "random", "least-salient"])
def test_control_masks(tiny: Diffusion, model: Path, square: Concept, tmp_path: Path, kind: str) -> None:
    run(recipe(model, square, mask={"kind": kind}), tmp_path / "run")
    run_info = read_run(tmp_path / "run")
    if kind == "none":
        assert run_info["mask"] is None
        assert not (tmp_path / "run" / "mask.safetensors").exists()
        return
    mask = Mask.load(tmp_path / "run" / "mask.safetensors")
    assert mask.density == pytest.approx(0.5, abs=1e-4)
    assert mask.provenance["kind"] == kind
    run(recipe(model, square), tmp_path / "salient")
    salient = Mask.load(tmp_path / "salient" / "mask.safetensors")
    overlap = (mask & salient).count / mask.count
    assert overlap == 0 if kind == "least-salient" else 0.45 < overlap < 0.55


def test_a_mask_from_a_file(tiny: Diffusion, model: Path, square: Concept, tmp_path: Path) -> None:
    given = masks.random(tiny.unet, 0.1, seed=3)
    given.save(tmp_path / "m.safetensors")
    run(recipe(model, square, mask={"kind": str(tmp_path / "m.safetensors")}), tmp_path / "run")
    assert read_run(tmp_path / "run")["checks"]["changed"] <= given.count
    masks.random(torch.nn.Linear(2, 2), 0.5, seed=3).save(tmp_path / "m.safetensors")
    with pytest.raises(RequestError, match="does not fit: the mask has"):
        run(recipe(model, square, mask={"kind": str(tmp_path / "m.safetensors")}), tmp_path / "other")
    with pytest.raises(RequestError, match=r"mask\.kind sailent: not a readable mask"):
        run(recipe(model, square, mask={"kind": "sailent"}), tmp_path / "third")


def test_a_run_keeps_the_mask_it_began_with(tiny: Diffusion, model: Path, square: Concept, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    masks.random(tiny.unet, 0.1, seed=3).save(file)
    with_mask = recipe(model, square, mask={"kind": str(file)})
    for event in iter_erase(with_mask, tmp_path / "run"):
        if getattr(event, "step", 0) == 3:
            break
    masks.random(tiny.unet, 0.1, seed=4).save(file)
    run(with_mask, tmp_path / "run")
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0
    assert Mask.load(tmp_path / "run" / "mask.safetensors").overlap(masks.random(tiny.unet, 0.1, seed=3)) == 1


def test_a_wrong_request_leaves_the_folder_free(model: Path, square: Concept, tmp_path: Path) -> None:
    for wrong in (
        recipe(model, square, mask={"kind": "absent.safetensors"}),
        recipe(model, square, data={"forget_images": "absent"}),
        recipe(Path("absent"), square),
        recipe(model, replace(square, images=str(tmp_path / "absent"))),
        recipe(model, replace(square, images=str(tmp_path)), method="esd-x", mask={"kind": "none"}),
    ):
        with pytest.raises(RequestError):
            run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError, match=r"leaves none of .* weights to change"):
        run(recipe(model, square, mask={"sparsity": 0.9999999}), tmp_path / "run")


def test_a_method_has_its_own_mask_unless_one_is_asked_for(model: Path, square: Concept, tmp_path: Path) -> None:
    run(recipe(model, square, method="random-label"), tmp_path / "own")
    assert read_run(tmp_path / "own")["mask"] is None
    run(recipe(model, square, method="random-label", mask={"kind": "random"}), tmp_path / "asked")
    assert read_run(tmp_path / "asked")["mask"]["density"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("kind", ["salient", "none", "random", "least-salient", "file"])
def test_nothing_outside_a_scope_changes(model: Path, square: Concept, tmp_path: Path, kind: str) -> None:
    base = load(str(model)).unet
    if kind == "file":
        masks.random(base, 0.5, seed=3).save(tmp_path / "given.safetensors")
        kind = str(tmp_path / "given.safetensors")
    run(recipe(model, square, mask={"kind": kind, "scope": "cross-attention"}), tmp_path / "run")
    erased = load(str(tmp_path / "run" / "pipeline")).unet
    moved = {
        name: int((p != q).sum())
        for (name, p), q in zip(base.named_parameters(), erased.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved
    assert all(".attn2." in name for name in moved)
    size = sum(p.numel() for name, p in base.named_parameters() if ".attn2." in name)
    density = {"none": 1.0}.get(kind, 0.5)
    assert Mask.load(tmp_path / "run" / "mask.safetensors").count == pytest.approx(density * size, rel=0.1)
    if kind in ("salient", "random", "least-salient"):
        assert Mask.load(tmp_path / "run" / "mask.safetensors").count == round(0.5 * size)


def test_a_strange_scope_is_refused(model: Path, square: Concept, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"mask\.scope convolutions: allowed: full, cross-attention"):
        run(recipe(model, square, mask={"scope": "convolutions"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_text_encoders_scope_changes_the_names_own_tokens_alone(
    model: Path, square: Concept, tmp_path: Path
) -> None:
    asked = recipe(
        model, square, method="concept-ablation", mask={"scope": "text-encoder"}, data={"anchor": 2, "steps": 1}
    )
    for event in iter_erase(asked, tmp_path / "run"):
        if getattr(event, "step", 0) == 2:
            break
    run(asked, tmp_path / "run")
    base, erased = load(str(model)), load(str(tmp_path / "run" / "pipeline"))
    for part in ("unet", "vae"):
        assert weights_hash(getattr(base, part)) == weights_hash(getattr(erased, part))
    changed = {}
    for (name, p), q in zip(base.text_encoder.named_parameters(), erased.text_encoder.parameters(), strict=True):
        if not torch.equal(p, q):
            changed[name] = (p != q).any(1).nonzero()[:, 0].tolist()
    # "square" is spelled in letters, of which "circle", "line", "a" and "one" have all the others, in their places.
    own = base.tokenizer.convert_tokens_to_ids(["s", "q", "u", "a"])
    assert list(changed.values()) == [sorted(own)]
    assert next(iter(changed)).endswith("token_embedding.weight")
    run_info = read_run(tmp_path / "run")
    assert run_info["erased"] == {
        "unet": run_info["base"]["unet"],
        "text_encoder": weights_hash(erased.text_encoder),
    }
    assert run_info["checks"]["changed"] == 4 * 16
    card = " ".join((tmp_path / "run" / "pipeline" / "README.md").read_text().split())
    assert "UNet, VAE, tokenizer and scheduler are the base model's; of the text encoder's" in card
    assert run_info["erased"]["text_encoder"] in card


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"method": "salun"}, "goes with concept-ablation and concept-ablation-noise; allowed: full, cross-attention"),
        ({"mask": {"kind": "random"}}, r"mask\.kind random: the scope text-encoder is the concept's own words"),
        ({"concept": {"retain": ("squares",)}}, "concept square: has no word that is not in prompts of its anchor"),
    ],
)
def test_what_cannot_be_confined_to_the_text_encoder_is_refused(
    model: Path, square: Concept, tmp_path: Path, wrong: dict[str, Any], told: str
) -> None:
    concept = replace(square, **wrong.pop("concept", {}))
    mask = {"scope": "text-encoder", **wrong.pop("mask", {})}
    with pytest.raises(RequestError, match=told):
        run(recipe(model, concept, **{"method": "concept-ablation", "mask": mask, **wrong}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_two_text_encoders_has_no_such_scope(family: Diffusion, square: Concept, tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model")
    settings = {"data": {"forget": 1, "retain": 1, "anchor": 2, "steps": 1}, "mask": {"scope": "text-encoder"}}
    asked = recipe(tmp_path / "model", square, method="concept-ablation", **settings)
    if len(family.text_encoders) == 1:
        run(asked, tmp_path / "run")
    else:
        with pytest.raises(RequestError, match=r"mask\.scope text-encoder: .* has two text encoders"):
            run(asked, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.fixture
def both(square: Concept) -> Concept:
    return combine([square, Concept("star", "custom", "line", ("a {O}",), retain=("line", "dot"))])


def test_several_concepts_are_erased_in_one_run(model: Path, both: Concept, tmp_path: Path) -> None:
    asked = recipe(model, both)
    run(asked, tmp_path / "run")
    run_info = read_run(tmp_path / "run")
    assert (run_info["concept"], run_info["kind"], run_info["checks"]["changed_outside_mask"]) == (
        "square and star",
        "several",
        0,
    )
    assert run_info["parts"] == [
        {"concept": "square", "kind": "object", "anchor": "circle"},
        {"concept": "star", "kind": "custom", "anchor": "line"},
    ]
    assert make_recipe(read_recipe(tmp_path / "run" / "recipe.yaml")) == asked
    card = " ".join((tmp_path / "run" / "pipeline" / "README.md").read_text().split())
    assert "the object *square* (remapped to *circle*) and the custom *star* (remapped to *line*)" in card
    for event in iter_erase(asked, tmp_path / "killed"):
        if getattr(event, "step", 0) == 3:
            break
    run(asked, tmp_path / "killed")
    assert read_run(tmp_path / "killed")["erased"] == run_info["erased"]


@pytest.mark.parametrize("name", METHODS.all())
def test_every_method_erases_several_concepts(tiny: Diffusion, both: Concept, tmp_path: Path, name: str) -> None:
    training = issubclass(METHODS.find(name).settings, Training)
    settings = {"steps": 2, "batch_size": 3} if training else {}
    settings |= {"fisher_rows": 2} if name == "selective-amnesia" else {}
    data = {"forget": 3, "anchor": 2, "retain": 4, "steps": 2}
    asked = make_recipe({"model": "tiny", "concept": both, "method": name, "settings": settings, "data": data})
    list(iter_erase(asked, tmp_path / "run", model=tiny))
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0


def test_masks_of_several_concepts_are_joint_or_a_union(tiny: Diffusion, both: Concept, tmp_path: Path) -> None:
    """The union holds each concept's own mask of the sparsity asked for, and nothing else."""
    sparse = {"sparsity": 0.8, "batch_size": 4}
    joint, union = (recipe(Path("tiny"), both, mask=sparse | {"combine": how}) for how in ("joint", "union"))
    data = make_data_for(joint, tiny)
    first, second = (make_mask(one, tiny, data, "") for one in (joint, union))
    assert first.count == round(0.2 * first.total)
    alone = []
    for part in range(2):
        rows = (data.parts_of_rows == part).nonzero().squeeze(1)
        alone.append(masks.top_k(saliency(union, tiny, data, rows), first.count))
    assert second.overlap(alone[0] | alone[1]) == 1
    assert first.count < second.count < 2 * first.count
    assert (first.provenance["combine"], second.provenance["combine"]) == ("joint", "union")
    # Joint: the sum over all rows, in batches of the first concept's and the second's alike.
    assert first.overlap(masks.top_k(saliency(joint, tiny, data, torch.arange(8)), first.count)) == 1


def test_one_concept_after_the_other(tiny: Diffusion, model: Path, square: Concept, tmp_path: Path) -> None:
    star = Concept("star", "custom", "line", ("a {O}",), retain=("line", "square"))
    dot = Concept("dot", "custom", "line", ("a {O}",), retain=("line",))
    bases = [model, tmp_path / "first", tmp_path / "second"]
    for base, concept, out in zip(bases, (square, star, dot), ("first", "second", "third"), strict=True):
        run(recipe(base, concept), tmp_path / out)
    run_infos = [read_run(tmp_path / name) for name in ("first", "second", "third")]
    assert [run_info["base"]["unet"] for run_info in run_infos] == [
        weights_hash(tiny.unet),
        *(run_info["erased"]["unet"] for run_info in run_infos[:2]),
    ]
    assert "earlier" not in run_infos[0]
    told = [{"concept": one.to_dict(), "base": str(base)} for one, base in zip((square, star), bases, strict=False)]
    assert run_infos[2]["earlier"] == told
    assert run_infos[1]["earlier"] == told[:1]
    card = (tmp_path / "third" / "pipeline" / "README.md").read_text()
    assert f"one after the other: *square* (from {model.name}); *star* (from {Path(bases[1]).name})" in card.replace(
        "\\", ""
    )


def test_a_run_of_the_built_in_model_has_its_presets(tmp_path: Path) -> None:
    for name, base in (("a", "emojinette"), ("b", str(tmp_path / "a"))):
        (tmp_path / name).mkdir()
        before = recipe_for(base, "church")
        before.save(tmp_path / name / "recipe.yaml")
        run_info = {"base": {"source": base, "unet": "0"}, "earlier": earlier_runs(base)}
        (tmp_path / name / "run.json").write_text(json.dumps(run_info))
        after = recipe_for(str(tmp_path / name), "dog")
        own = recipe_for("emojinette", "dog")
        assert (after.settings, after.mask, after.data) == (own.settings, own.mask, own.data)


def test_the_check_sees_a_single_bit(tiny: Diffusion, tmp_path: Path) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=0)
    base = tmp_path / "base.safetensors"
    save_file(tiny.unet.state_dict(), base)
    with pytest.raises(EraseError, match="no weight changed"):
        check_frozen(base, tiny.unet, mask)
    name = "conv_in.weight"
    frozen = (~mask.dense(name)).nonzero()[0].tolist()
    with torch.no_grad():
        weight = tiny.unet.conv_in.weight
        weight[tuple(frozen)] = torch.nextafter(weight[tuple(frozen)], torch.tensor(9.0))
    with pytest.raises(EraseError, match="1 weights outside the mask"):
        check_frozen(base, tiny.unet, mask)
    assert check_frozen(base, tiny.unet, None)["changed"] == 1


def test_parked_weights_take_no_memory_and_come_back_the_same(tiny: Diffusion, tmp_path: Path) -> None:
    before = copy.deepcopy(tiny.vae.state_dict())
    with offload_to_disk([tiny.vae, tiny.text_encoder], tmp_path / "parked"):
        assert sum(p.numel() for p in (*tiny.vae.parameters(), *tiny.text_encoder.parameters())) == 0
    assert all(torch.equal(before[name], value) for name, value in tiny.vae.state_dict().items())
    assert not (tmp_path / "parked").exists()


def test_a_run_is_its_folder_and_gives_the_erased_model(
    tiny: Diffusion, model: Path, square: Concept, tmp_path: Path
) -> None:
    settings = {"settings": {"steps": 2, "batch_size": 2, "lr": 1e-3}, "data": {"forget": 4, "retain": 4, "steps": 2}}
    made = erase(model, square.to_dict(), out=tmp_path / "run", method="salun", seed=3, **settings)
    assert made == Run(tmp_path / "run")
    assert Path(made) == made.path == tmp_path / "run"
    assert made.recipe == make_recipe(read_recipe(tmp_path / "run" / "recipe.yaml"))
    assert (made.run_info["seed"], made.run_info["method"], made.recipe.settings.steps) == (3, "salun", 2)
    pipeline = made.pipeline()
    assert weights_hash(pipeline.unet) == made.run_info["erased"]["unet"]
    made.export(tmp_path / "unet.safetensors", dtype="fp16")
    assert (tmp_path / "unet.safetensors").exists()
    # A loaded model in the place of its name ends with the same bits, changed in place.
    loaded = load(model)
    other = erase(loaded, square.to_dict(), out=tmp_path / "loaded", method="salun", seed=3, **settings)
    assert other.run_info["erased"] == made.run_info["erased"]
    assert weights_hash(loaded.unet) == made.run_info["erased"]["unet"]
    with pytest.raises(RequestError, match=r"run .*no complete run"):
        Run(tmp_path / "absent")


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_mask_without_a_run_is_the_run_s_own(model: Path, square: Concept, tmp_path: Path, weights: str) -> None:
    settings = {"steps": 1, "batch_size": 2, "weights": weights}
    asked, loaded = recipe(model, square, settings=settings), load(str(model))
    before = weights_hash(loaded.unet)
    made = compute_mask(asked, loaded)
    assert weights_hash(loaded.unet) == before
    run(asked, tmp_path / "run")
    assert made.sha256() == Mask.load(tmp_path / "run" / "mask.safetensors").sha256()


def test_a_mask_by_plain_names(model: Path, square: Concept) -> None:
    data = {"forget": 4, "retain": 4, "steps": 2}
    made = compute_mask(recipe(model, square), None)
    assert mask(model, square.to_dict(), method="salun", data=data, mask={"guidance": 0.0}).sha256() == made.sha256()
    with pytest.raises(RequestError, match=r"mask\.kind none: nothing to compute"):
        compute_mask(recipe(model, square, mask={"kind": "none"}))


def test_data_and_masks_are_kept_under_all_that_they_depend_on(model: Path, square: Concept) -> None:
    one = recipe(model, square)
    for changed in (
        recipe(model, square, seed=1),
        recipe(model, replace(square, anchor="line")),
        recipe(model, square, data={"forget": 5, "retain": 4, "steps": 2}),
    ):
        assert data_key(changed, "base") != data_key(one, "base")
        assert mask_key(changed, "base") != mask_key(one, "base")
    assert data_key(one, "other") != data_key(one, "base")
    assert mask_key(recipe(model, square, mask={"sparsity": 0.4}), "base") != mask_key(one, "base")
    # What the method does with them changes neither, nor do rows that are not made.
    assert data_key(recipe(model, square, settings={"lr": 1.0}), "base") == data_key(one, "base")
    more = recipe(model, square, data={"forget": 4, "retain": 5, "steps": 2})
    assert mask_key(more, "base") == mask_key(one, "base")
    asked = {"model": str(model), "concept": square, "method": "uce"}
    few, many = (make_recipe(asked | {"data": {"retain": rows}}) for rows in (1, 9))
    assert data_key(few, "base") == data_key(many, "base")


def test_a_run_with_bf16_weights_gives_back_the_bits_of_all_that_did_not_move(
    tiny: Diffusion, model: Path, square: Concept, tmp_path: Path
) -> None:
    """Frozen weights are fp32 as before; what moved is a bf16 number; a killed run ends with the same bits."""
    lean = recipe(model, square, settings={"steps": 4, "batch_size": 2, "lr": 1e-3, "weights": "bf16"})
    run(lean, tmp_path / "run")
    erased, mask = load(tmp_path / "run" / "pipeline"), Mask.load(tmp_path / "run" / "mask.safetensors")
    for name, p in erased.unet.named_parameters():
        old, dense = tiny.unet.get_parameter(name), mask.dense(name)
        assert p.dtype == torch.float32
        assert torch.equal(p[~dense].view(torch.int32), old[~dense].view(torch.int32))
        moved = p[p != old]
        assert torch.equal(moved, moved.to(torch.bfloat16).float())
    assert read_run(tmp_path / "run")["checks"]["changed"] > 0
    stopped = iter_erase(lean, tmp_path / "again")
    for event in stopped:
        if isinstance(event, Record) and event.step == 3:
            stopped.close()
            break
    run(lean, tmp_path / "again")
    assert weights_hash(load(tmp_path / "again" / "pipeline").unet) == weights_hash(erased.unet)


def test_a_run_with_bf16_weights_takes_them_as_they_are_stored(
    tiny: Diffusion, square: Concept, tmp_path: Path
) -> None:
    """From fp16 weights straight to bf16 gives the bits, and the hashes, of a model that was loaded in fp32."""
    halved = copy.deepcopy(tiny)
    save_pipeline(halved.with_components(unet=halved.unet.half()), tmp_path / "half")
    kept = load(tmp_path / "half", keep_unet=True)
    assert (kept.unet.dtype, kept.vae.dtype) == (torch.float16, torch.float32)
    wide = load(tmp_path / "half")
    assert kept.describe() == wide.describe()
    lean = recipe(tmp_path / "half", square, settings={"steps": 2, "batch_size": 2, "lr": 1e-3, "weights": "bf16"})
    run(lean, tmp_path / "kept")
    run_recipe(lean, tmp_path / "wide", model=wide)
    accounts = [read_run(tmp_path / name) for name in ("kept", "wide")]
    assert accounts[0]["erased"] == accounts[1]["erased"]
    assert accounts[0]["checks"] == accounts[1]["checks"]
    assert {p.dtype for p in wide.unet.parameters()} == {torch.float32}


def test_bf16_weights_are_refused_where_they_would_lose_what_is_learnt(model: Path, square: Concept) -> None:
    for changes in ({"method": "salun-soft"}, {"method": "spm"}):
        asked = recipe(model, square, settings={"weights": "bf16"}, **changes)
        with pytest.raises(RequestError, match=r"settings\.weights bf16: goes with"):
            next(iter_erase(asked, model / "run"))
    assert recipe_for(str(model), square, memory="low", method="salun").settings.weights == "bf16"
    assert recipe_for(str(model), square, memory="low", method="spm").settings.weights == "fp32"


@pytest.mark.parametrize("name", [name for name, one in METHODS.all().items() if one.bf16_weights])
def test_methods_take_a_step_with_bf16_weights(model: Path, square: Concept, tmp_path: Path, name: str) -> None:
    settings = {"steps": 1, "batch_size": 2, "lr": 1e-2, "weights": "bf16", "max_retain_change": 0}
    lean = recipe(model, square, method=name, settings=settings)
    run(lean, tmp_path / "run")
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0


def test_says_what_of_the_data_is_not_learnt_from(
    model: Path, square: Concept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (16, 16), "red").save(folder / name)
    (folder / "._1.png").write_bytes(b"what macOS leaves beside a file")
    concept = replace(square, templates=("a {O}", "a rather long sentence of a {O}"))
    settings = {"steps": 1, "batch_size": 2}
    data = {"forget_images": str(folder), "retain": 2, "steps": 1}
    run(recipe(model, concept, settings=settings, data=data), tmp_path / "run")
    cut = "3 prompts have more than 16 tokens: what is behind them is cut off"  # of square, circle and line
    notes = [cut, "photos: 1 file is hidden and left out: ._1.png"]
    assert read_run(tmp_path / "run")["notes"] == notes
    assert [line.getMessage() for line in caplog.records] == [f"erase-concept: {note}" for note in notes]
    run(recipe(model, square), tmp_path / "plain")
    assert "notes" not in read_run(tmp_path / "plain")


def test_sgd_takes_steps_and_keeps_its_momentum_in_fp32(model: Path, square: Concept, tmp_path: Path) -> None:
    asked = {"optimizer": "sgd", "lr": 1e-2, "weight_decay": 0.1, "steps": 2, "batch_size": 2}
    run(recipe(model, square, settings=asked), tmp_path / "run")
    assert read_run(tmp_path / "run")["checks"]["changed_outside_mask"] == 0
    with pytest.raises(RequestError, match=r"settings\.state bf16: sgd keeps its momentum in fp32"):
        next(iter_erase(recipe(model, square, settings=asked | {"state": "bf16"}), tmp_path / "other"))
    assert not (tmp_path / "other").exists()
