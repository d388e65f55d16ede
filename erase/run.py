"""A run: data, mask, training and export in one folder. The same command on the same folder goes on where it stopped.

The folder holds ``recipe.yaml``, ``run.json`` (versions, hashes, seeds, times, checks), ``data.safetensors``,
``mask.safetensors``, ``log.jsonl``, ``checkpoints/`` and ``pipeline/``, which diffusers opens.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import or_
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from erase_concept.card import write_card
from erase_concept.data import ForgetRetain, draw, image_files, make_data, own_tokens
from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write
from erase_concept.masks import mask as masks
from erase_concept.masks.mask import Mask, Part
from erase_concept.masks.saliency import accumulate, forgetting_loss
from erase_concept.method import method_seed
from erase_concept.methods import METHODS
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.processes import processes
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import Recipe, earlier_runs, read_recipe
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.training.loop import Record, TargetProgress

MASK_KINDS = ("salient", "none", "random", "least-salient")
_SCOPES = ", ".join(masks.SCOPES)


def erase(recipe: Recipe, out: Path, *, model: Diffusion | None = None) -> Iterator[Record | TargetProgress | str]:
    """Run a recipe in a folder, yielding the name of each stage as it begins and a record after each step.

    When it is exhausted, ``out/pipeline`` holds the erased model and ``out/run.json`` the account of the run. A run
    that is already complete yields nothing. ``model`` may give the loaded base, which is then changed in place.

    Raises RequestError when the folder holds another run or the recipe cannot be followed, EraseError when the work
    fails or a weight changed that should not have.
    """
    config, method = recipe.settings, METHODS.find(recipe.method)
    given = check(recipe)
    if _claimed(recipe, out) and complete(out):
        return
    if model is None:
        yield "load"
        model = load(recipe.model, ema=recipe.ema)
    if given is not None:
        given.check(model.unet)
    part: Part = "text_encoder" if recipe.mask.scope == masks.TEXT_ENCODER else "unet"
    if part == "text_encoder":
        own_tokens(model, recipe.concept)  # which refuses what has none
    trained: nn.Module = getattr(model, part)
    # From here on the request is known to be sound: only now does the folder become the run's.
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / "recipe.yaml")
    # What earlier runs erased is retained like anything else: retain rows are sampled from the model as it is, in which
    # those prompts show something else already, so that retaining them keeps the erasure.
    earlier = earlier_runs(recipe.model)
    times: dict[str, float] = {}
    began = time.perf_counter()
    about = model.describe()
    base_hash = about["unet"]
    base = out / f"base-{part.replace('_', '-')}.safetensors"  # until the end, for the comparison
    with atomic_write(base) as partial:
        save_file(trained.state_dict(), partial)

    yield "data"
    data = _data(recipe, model, base_hash, out)
    times["data"] = time.perf_counter() - began

    # Everything is encoded: only the UNet, and what is trained, is needed until the pipeline is written.
    with offload_to_disk(
        [one for one in (model.vae, *model.text_encoders.values()) if one is not trained], out / "parked"
    ):
        mask = None
        if (recipe.mask.kind, recipe.mask.scope) != ("none", "full"):
            yield "mask"
            mask = _mask(recipe, given, model, data, base_hash, out)
        times["mask"] = time.perf_counter() - began - times["data"]

        yield "erase"
        seed = method_seed(recipe.seed)
        checkpoint = out / "checkpoints" / "last.safetensors"
        _keep_log(out / "log.jsonl", checkpoint)
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            for record in method.run(model, data, mask, config, seed=seed, checkpoint=checkpoint):
                if isinstance(record, Record):
                    log.write(json.dumps(asdict(record)) + "\n")
                    log.flush()
                yield record
        times["erase"] = time.perf_counter() - began - times["data"] - times["mask"]

    yield "export"
    account = {
        "schema": 1,
        "method": recipe.method,
        "concept": recipe.concept.name,
        "kind": recipe.concept.kind,
        "anchor": recipe.concept.replacement,
        **({"parts": _told(recipe.concept.combined)} if recipe.concept.combined else {}),
        **({"earlier": earlier} if earlier else {}),
        "seed": recipe.seed,
        "recipe": recipe.fingerprint(),
        "settings": asdict(config),
        "base": about,
        "erased": {"unet": weights_hash(model.unet), part: weights_hash(trained)},
        "mask": mask and {"kind": recipe.mask.kind, "sha256": mask_hash(mask), "density": mask.density},
        "checks": check_frozen(base, trained, mask),
        "seconds": {stage: round(seconds, 2) for stage, seconds in times.items()},
        "versions": versions(),
    }
    save_pipeline(model, out / "pipeline")
    write_card(out, account)
    base.unlink()
    write_json(out / "run.json", account)  # last: it says that the run is complete


def _told(concepts: Sequence[Concept]) -> list[dict[str, str]]:
    return [{"concept": one.name, "kind": one.kind, "anchor": one.anchor} for one in concepts]


@contextmanager
def offload_to_disk(modules: Sequence[nn.Module], folder: Path) -> Iterator[None]:
    """Keep modules' weights in files for a while, where they take no memory, and bring them back the same."""
    places = [(module, next(module.parameters()).device) for module in modules]
    for i, (module, _) in enumerate(places):
        with atomic_write(folder / f"{i}.safetensors") as partial:
            save_file({name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}, partial)
        for p in module.parameters():
            p.data = p.data.new_empty(0)
    try:
        yield
    finally:
        for i, (module, device) in enumerate(places):
            with safe_open(folder / f"{i}.safetensors", "pt") as stored:
                for name, p in module.named_parameters():
                    # A copy, for what safetensors gives is the file itself, and that goes.
                    p.data = stored.get_tensor(name).clone().to(device)
        shutil.rmtree(folder)


def check(recipe: Recipe) -> Mask | None:
    """Refuse what cannot be followed before anything is written; return the mask of a file, where one is named."""
    kind = recipe.mask.kind
    if (count := processes().num_processes) > 1:
        raise RequestError("processes", count, "a run folder is written by one process alone")
    check_scope(recipe)
    for part, folder in (("forget", recipe.data.forget_images), ("retain", recipe.data.retain_images)):
        if folder is not None and not recipe.latents[part]:
            raise RequestError(f"--{part}-images", folder, f"{recipe.method} learns from prompts alone")
        if folder is not None:
            image_files(folder, recipe.concept, part=part)
    for one in recipe.concept.parts:
        if one.images and recipe.data.forget_images is None:
            if not recipe.latents["forget"]:
                raise RequestError(
                    "--concept", one.images, f"{recipe.method} learns from prompts alone, not from images"
                )
            image_files(Path(one.images), one, part="forget", argument="--concept")
    if kind in MASK_KINDS:
        return None
    given = Mask.load(Path(kind))
    if given.count == 0:
        raise RequestError("--mask", kind, "allows no weight to change")
    return given


def check_scope(recipe: Recipe) -> None:
    """Raise RequestError when the recipe's method cannot be confined to its scope."""
    if recipe.mask.scope == masks.TEXT_ENCODER:
        able = [name for name, one in METHODS.all().items() if one.text_encoder]
        if recipe.method not in able:
            raise RequestError("--scope", recipe.mask.scope, f"goes with {' and '.join(able)}; allowed: {_SCOPES}")
        if recipe.mask.kind != "none":
            allowed = "the scope text-encoder is the concept's own words; allowed: none"
            raise RequestError("--mask", recipe.mask.kind, allowed)
    elif recipe.mask.scope not in masks.SCOPES:
        raise RequestError("--scope", recipe.mask.scope, f"allowed: {_SCOPES}, {masks.TEXT_ENCODER}")


def _claimed(recipe: Recipe, out: Path) -> bool:
    """Tell whether the folder is this recipe's run; refuse one that holds another run or other files."""
    file = out / "recipe.yaml"
    if file.exists():
        if read_recipe(file) != recipe.to_dict():
            raise RequestError("--out", out, "holds a run with another recipe; choose another folder")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("--out", out, "exists and is no run folder; choose another one")
    return False


def complete(out: Path) -> bool:
    """Tell whether a run folder's erasing is done."""
    return (out / "run.json").is_file()


def read_run(out: Path) -> dict[str, Any]:
    """Return a complete run's account, raising RequestError when the folder holds none."""
    if not complete(out):
        raise RequestError("RUN", out, "holds no complete run (no run.json)")
    account: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return account


def _data(recipe: Recipe, model: Diffusion, base_hash: str, out: Path) -> ForgetRetain:
    fingerprint = recipe.fingerprint(base_hash)
    file = out / "data.safetensors"
    data = ForgetRetain.load(file, fingerprint)
    if data is None and file.exists():
        raise RequestError("--out", out, "the base model has changed since this run began; choose another folder")
    if data is None:
        data = make_data_for(recipe, model)
        data.save(file, fingerprint)
    return data


def make_data_for(recipe: Recipe, model: Diffusion) -> ForgetRetain:
    """Make the recipe's data with the recipe's seed."""
    counted = asdict(recipe.data) | recipe.latents
    return make_data(model, recipe.concept, seed=stage_seed(recipe.seed, "data"), **counted)


def _mask(recipe: Recipe, given: Mask | None, model: Diffusion, data: ForgetRetain, base_hash: str, out: Path) -> Mask:
    """Return the run's mask: the one in its folder, else the given one or a new one, which is then kept there."""
    file = out / "mask.safetensors"
    if not file.exists():
        choose_mask(recipe, given, model, data, base_hash).save(file)
    return Mask.load(file)


def choose_mask(recipe: Recipe, given: Mask | None, model: Diffusion, data: ForgetRetain, base_hash: str) -> Mask:
    """Return the part of a given mask that lies in the recipe's scope, or where none is given a new mask."""
    if given is None:
        return make_mask(recipe, model, data, base_hash)
    if recipe.mask.scope == "full":
        return given
    part = masks.expand_to(masks.all_ones(masks.in_scope(model.unet, recipe.mask.scope)), model.unet)
    return Mask((given & part).bits, given.shapes, given.provenance)


def make_mask(recipe: Recipe, model: Diffusion, data: ForgetRetain, base_hash: str) -> Mask:
    """Compute a mask of the recipe's kind, scope and sparsity for the model, with its provenance.

    Of several concepts the sum of gradients over the rows of all ranks the weights; or, when ``combine`` is union, each
    concept has a mask of that sparsity, and the union of these is as dense as it turns out.
    """
    settings = recipe.mask
    if settings.scope == masks.TEXT_ENCODER:
        mask = masks.token_rows(model.text_encoder, own_tokens(model, recipe.concept))
    else:
        mask = masks.expand_to(_unet_mask(recipe, model, data), model.unet)
    about = {
        "concept": recipe.concept.name,
        "kind": settings.kind,
        "scope": settings.scope,
        "sparsity": settings.sparsity,
        **({"combine": settings.combine} if recipe.concept.combined else {}),
        "accumulate": settings.accumulate,
        "guidance": settings.guidance,
        "seed": recipe.seed,
        "base": base_hash,
        "recipe": recipe.fingerprint(),
    }
    return Mask(mask.bits, mask.shapes, {key: str(value) for key, value in about.items()})


def _unet_mask(recipe: Recipe, model: Diffusion, data: ForgetRetain) -> Mask:
    """Return the mask of the recipe's kind and sparsity over the UNet's weights in its scope."""
    settings = recipe.mask
    shapes = masks.in_scope(model.unet, settings.scope)
    total = sum(math.prod(shape) for shape in shapes.values())
    k = masks.keep_count(1 - settings.sparsity, total)
    if k == 0:
        raise RequestError("--sparsity", settings.sparsity, f"leaves none of {total} weights to change")
    if settings.kind == "none":
        return masks.all_ones(shapes)
    if settings.kind == "random":
        return masks.random(model.unet, 1 - settings.sparsity, stage_seed(recipe.seed, "mask"), settings.scope)
    choose = masks.top_k if settings.kind == "salient" else masks.bottom_k
    rows = torch.arange(len(data.forget_latents))
    groups = [rows]
    if settings.combine == "union":
        groups = [rows[data.parts_of_rows[rows] == part] for part in range(len(recipe.concept.parts))]
    found = (saliency(recipe, model, data, group) for group in groups)
    return reduce(or_, (choose({name: scores[name] for name in shapes}, k) for scores in found))


def saliency(recipe: Recipe, model: Diffusion, data: ForgetRetain, among: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the saliency of every UNet weight over the forget rows of these numbers, each seen ``passes`` times."""
    settings = recipe.mask
    generator = stage_generator(recipe.seed, "saliency")

    def losses() -> Iterator[Any]:
        for _ in range(settings.passes):
            order = among[draw(len(among), len(among), generator)]
            for rows in order.split(settings.batch_size):
                batch = data.forget_batch(model, rows, generator)
                # Weighted by its rows, so that a smaller last batch counts for no more than it holds.
                share = len(rows) / len(order)
                yield (
                    lambda b=batch, share=share: (
                        share
                        * forgetting_loss(
                            model,
                            b.latents,
                            b.noise,
                            b.timesteps,
                            b.embeddings,
                            data.uncond.to(model.device),
                            settings.guidance,
                        )
                    )
                )

    if settings.recompute:
        model.unet.enable_gradient_checkpointing()
    try:
        return accumulate(model.unet, losses(), settings.accumulate, offload=settings.offload)
    finally:
        model.unet.disable_gradient_checkpointing()


def mask_hash(mask: Mask) -> str:
    """Return the SHA-256 over a mask's names, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(mask.bits):
        digest.update(f"{name} {mask.shapes[name]}\n".encode())
        digest.update(mask.bits[name].numpy().tobytes())
    return digest.hexdigest()


def check_frozen(base: Path, erased: nn.Module, mask: Mask | None) -> dict[str, Any]:
    """Compare a UNet bit by bit with a file of its base and return how many weights changed, in all and outside a mask.

    Raises EraseError when a weight outside the mask changed, or none at all.
    """
    changed = outside = total = 0
    with safe_open(base, "pt") as stored:
        for name, after in erased.named_parameters():
            before = stored.get_tensor(name)
            differs = before.view(torch.int32) != after.detach().cpu().view(torch.int32)
            changed += int(differs.sum())
            total += differs.numel()
            if mask is not None:
                outside += int((differs & ~mask.dense(name)).sum())
    if outside:
        raise EraseError(f"{outside} weights outside the mask changed: this is a defect, nothing was exported")
    if not changed:
        raise EraseError("no weight changed: nothing was erased and nothing was exported")
    return {"weights": total, "changed": changed, "changed_outside_mask": outside}


def _keep_log(log: Path, checkpoint: Path) -> None:
    """Drop log lines of steps that will be done again."""
    if not log.exists():
        return
    if not checkpoint.exists():
        log.unlink()
        return
    with safe_open(checkpoint, "pt") as tensors:
        step = int(tensors.metadata()["step"])
    kept = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True)[:step] if line.endswith("\n")]
    with atomic_write(log) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of everything that bears on the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("erase-concept", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON."""
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
