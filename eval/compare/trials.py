"""A grid of erasures on one base model: every cell is erased, sampled and judged in a process of its own.

What cells share is made once and kept in the grid's folder: the base model's samples, the latents that the erasing
learns from, and the masks. A cell's result is one line of ``cells.jsonl``; a line that is there is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write

if TYPE_CHECKING:
    from erase_concept.data import ForgetRetain
    from erase_concept.eval.images import Asked
    from erase_concept.eval.report.report import Pair
    from erase_concept.masks.mask import Mask
    from erase_concept.pipelines.model import Diffusion
    from erase_concept.pipelines.sample import ImageSet
    from erase_concept.recipe import Recipe

PRESETS = ("default", "paper")
KEPT = 4  # pairs of images of the concept that are kept of a cell, and twice as many of all else
METRICS = ("ua", "ira", "cra", "frechet")  # of a cell; what a benchmark of other metrics does not have is left out
_HEAVY = ("erase_concept.run", "erase_concept.methods", "erase_concept.eval.benchmark")


@dataclass(frozen=True)
class Cell:
    """One erasure. ``entry`` is a method, a preset of SalUn, or either with settings: ``esd-x[eta=2,mask.sparsity=0]``.

    ``mask`` None is the entry's own; ``strength`` multiplies the method's tuned_setting.
    """

    entry: str
    concept: str
    seed: int
    mask: str | None = None
    strength: float = 1.0

    @property
    def name(self) -> str:
        """The cell in words."""
        parts = (self.entry, self.mask or "", f"{self.strength:g}", self.concept, str(self.seed))
        return re.sub(r"[^\w.=-]+", "-", "_".join(parts))


def split_entry(entry: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return an entry's name and what its brackets set of a recipe; raises RequestError where it has another form."""
    from erase_concept.recipe import read_settings

    matched = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?", entry)
    if matched is None:
        raise RequestError("--methods", entry, "must be NAME or NAME[KEY=VALUE,...]")
    texts = matched[2].split(",") if matched[2] else ()
    return matched[1], {part: given for part, given in read_settings(texts, "--methods").items() if given}


def split_mask(mask: str | None) -> tuple[str | None, float]:
    """Return a mask and the factor of its strengths, which KIND@FACTOR gives; raises RequestError for a bad one."""
    from erase_concept.run import MASK_KINDS

    kind, _, factor = (mask or "").rpartition("@")
    if kind not in MASK_KINDS:  # none at all, one without a factor, or a file, whose name may have the sign
        return mask, 1.0
    try:
        number = float(factor)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise RequestError("--masks", str(mask), "the factor must be a number above 0, as in least-salient@4")
    return kind, number


def is_guard(entry: str) -> bool:
    """Tell whether an entry is a guard, which changes no weights."""
    from erase_concept.pipelines.guards import GUARDS

    return split_entry(entry)[0] in GUARDS.all()


def recipe_of(model: str, cell: Cell) -> Recipe:
    """Return the recipe of a cell, the tuned_setting turned; raises RequestError where it cannot be followed.

    Of a guard's, which erases nothing, only the concept and the seed count.
    """
    from erase_concept.pipelines.guards import GUARDS
    from erase_concept.recipe import recipe_for
    from erase_concept.run import check_scope

    name, given = split_entry(cell.entry)
    if name in GUARDS.all():
        if given or cell.mask is not None or cell.strength != 1:
            raise RequestError("--methods", cell.entry, "a guard changes no weights: it has no settings and no mask")
        return recipe_for(model, cell.concept, seed=cell.seed)
    values: dict[str, Any] = {"seed": cell.seed, **given}
    if cell.mask is not None:
        values["mask"] = given.get("mask", {}) | {"kind": cell.mask}
    preset = name if name in PRESETS else "default"
    if name not in PRESETS:
        values["method"] = name
    recipe = recipe_for(model, cell.concept, preset_name=preset, **values)
    check_scope(recipe)
    tuned_setting, config = recipe.erasure().tuned_setting, recipe.config()
    if cell.strength != 1:
        turned = recipe.settings | {tuned_setting: getattr(config, tuned_setting) * cell.strength}
        recipe = recipe.model_copy(update={"settings": turned})
        recipe.config()  # such as a share that became more than 1
    return recipe


def read_cells(file: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a file by their fingerprints; a line that a kill cut short does not count."""
    found = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["fingerprint"]] = line
    return found


def _append(file: Path, result: dict[str, Any]) -> None:
    """Add a line, on a line of its own also after one that a kill cut short."""
    cut = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * cut + json.dumps(result, ensure_ascii=False) + "\n")


def fingerprint(model: str, cell: Cell, benchmark: str = "emojinette") -> str:
    """Return the SHA-256 over all that a cell's result depends on, but for a model's weights and installed versions."""
    guard = cell.entry if is_guard(cell.entry) else ""
    return recipe_of(model, cell).fingerprint(METRICS, KEPT, guard, *_told(benchmark))


def _told(benchmark: str) -> tuple[str, ...]:
    """Return what a benchmark is, if it is not Emojinette's: its name, or the content of its file."""
    if benchmark == "emojinette":
        return ()
    return (Path(benchmark).read_text(encoding="utf-8") if Path(benchmark).is_file() else benchmark,)


def run_cells(model: str, cells: Iterable[Cell], out: Path, benchmark: str = "emojinette") -> Iterator[dict[str, Any]]:
    """Yield the result of each cell in order, measuring those that ``out/cells.jsonl`` does not have.

    Raises RequestError when a cell's recipe, before anything is measured, or its benchmark cannot be followed, and
    EraseError when a process dies; an erasure that fails is a result, with the reason under "failed".
    """
    from erase_concept.masks.mask import Mask
    from erase_concept.run import MASK_KINDS

    cells = list(cells)
    keys = {cell: fingerprint(model, cell, benchmark) for cell in cells}
    for kind in {cell.mask for cell in cells} - {None, *MASK_KINDS}:
        Mask.load(Path(str(kind)), argument="--masks")
    done = read_cells(out / "cells.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    # A server imports once, and forks a fresh process for each cell: no cell sees another's memory, and each has a
    # peak of its own. Where there is no such server, a process starts from nothing.
    way = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(way)
    context.set_forkserver_preload(list(_HEAVY))
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for cell in cells:
            key = keys[cell]
            if key not in done:
                try:
                    processes.submit(prepare, model, cell, out, benchmark).result()
                    found = processes.submit(measure, model, cell, out, benchmark).result()
                except BrokenProcessPool:
                    raise EraseError(f"the process of {cell.name} died, perhaps for want of memory") from None
                done[key] = {"fingerprint": key, **found}
                _append(out / "cells.jsonl", done[key])
            yield done[key] | asdict(cell)  # the same recipe may have been measured under another name


def prepare(model: str, cell: Cell, work: Path, benchmark: str = "emojinette") -> None:
    """Make what the cell shares with others, where it is not there yet, so that its own process need not."""
    from erase_concept.pipelines.load import load

    recipe = recipe_of(model, cell)
    asked = asked_of(benchmark, recipe, cell, work)
    loaded = load(model)
    base_hash = loaded.describe()["unet"]
    _sampled(loaded, asked, _base(work, benchmark, recipe), guarded=False)
    if not is_guard(cell.entry):
        _mask(recipe, loaded, _data(recipe, loaded, base_hash, work), base_hash, work)


def measure(model: str, cell: Cell, work: Path, benchmark: str = "emojinette") -> dict[str, Any]:
    """Erase, sample and judge one cell, and return its result. Keeps a few of its images in ``work/samples``."""
    from erase_concept.eval.images import Gathered
    from erase_concept.eval.report.report import drawn
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.sample import read_images

    began = time.perf_counter()
    recipe = recipe_of(model, cell)
    asked = asked_of(benchmark, recipe, cell, work)
    loaded = load(model)
    result: dict[str, Any] = asdict(cell) | {"kind": recipe.concept.kind}
    if is_guard(cell.entry):
        result |= {"tuned_setting": "", "value": 1.0, "seconds": 0.0, "peak_gib": 0.0, "changed": 0.0, "loss": []}
    else:
        result |= _erased(loaded, recipe, work)
        if "failed" in result:
            return result
    with tempfile.TemporaryDirectory() as folder:
        images = _sampled(loaded, asked, Path(folder) / "erased", guarded=True)
        report = asked.measure(Gathered(images, read_images(_base(work, benchmark, recipe)), {}, 0.0))
        pairs = [report.pairs[place] for place in drawn(report.pairs, KEPT)]
        _keep(pairs, work / "samples" / fingerprint(model, cell, benchmark))
    scores: dict[str, Any] = {}
    for score in report.scores:  # the first of a metric is that of everything together
        # Fréchet distances have names of their own for each network, of which one cell has one.
        name = "frechet" if score.metric.startswith(("fid", "frechet")) else score.metric
        if name in METRICS and name not in scores:
            told = {"value": score.value, "n": score.n, "ci95": score.ci95, "baseline": score.baseline}
            scores[name] = told
    return result | {"scores": scores, "cell_seconds": round(time.perf_counter() - began, 2)}


def _erased(model: Diffusion, recipe: Recipe, work: Path) -> dict[str, Any]:
    """Erase from a loaded model, and return what it took and how much changed, or why it failed."""
    from erase_concept.method import method_seed
    from erase_concept.training.loop import Record

    method, config, base_hash = recipe.erasure(), recipe.config(), model.describe()["unet"]
    data = _data(recipe, model, base_hash, work)
    mask = _mask(recipe, model, data, base_hash, work)
    trained = getattr(model, "unet" if mask is None else mask.part)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    began = time.perf_counter()
    told = {"tuned_setting": method.tuned_setting, "value": getattr(config, method.tuned_setting)}
    losses = []
    try:
        for record in method.run(model, data, mask, config, seed=method_seed(recipe.seed)):
            if isinstance(record, Record):
                losses.append(record.loss)
    except EraseError as problem:
        return told | {"failed": str(problem), "seconds": round(time.perf_counter() - began, 2)}
    return (
        told
        | {
            "seconds": round(time.perf_counter() - began, 2),
            "peak_gib": round(_peak() / 2**30, 2),  # before the sampling, which is the same for all methods
            "changed": sum(int((before[name] != p).sum()) for name, p in trained.named_parameters())
            / sum(p.numel() for p in before.values()),
            "loss": [*losses[:1], *losses[-1:]],
        }
    )


def asked_of(benchmark: str, recipe: Recipe, cell: Cell, work: Path) -> Asked:
    """Return what a benchmark asks of a cell; raises RequestError when it cannot tell what is gone and what is kept."""
    from erase_concept.eval.benchmark import asked_by, find_benchmark
    from erase_concept.eval.images import Plan

    own = benchmark == "emojinette"
    if not own and "classes" not in find_benchmark(benchmark).metrics:
        allowed = "tells neither UA nor IRA; allowed: emojinette, imagenette, style, or a YAML file with metric classes"
        raise RequestError("--benchmark", benchmark, allowed)
    guard = cell.entry if is_guard(cell.entry) else None
    plan = Plan(recipe.model, recipe.model, work / "cells", {}, 16, (), guard)
    asked = asked_by(benchmark, plan, recipe.concept, {"seeds": 1} if own else {}, metrics=METRICS)
    # New noise for every seed, so that no two cells' samples are the same ones.
    rows = tuple(replace(row, seed=(row.seed + 1_000 * cell.seed) % 2**63) for row in asked.prompts.rows)
    return replace(asked, prompts=replace(asked.prompts, rows=rows))


def _base(work: Path, benchmark: str, recipe: Recipe) -> Path:
    told = _digest([recipe.model, recipe.ema, benchmark, *_told(benchmark)])[:8]
    return work / "base" / f"{recipe.concept.name.replace(' ', '-')}-{recipe.seed}-{told}"


def _sampled(model: Diffusion, asked: Asked, folder: Path, *, guarded: bool) -> ImageSet:
    """Return the images that are asked for, and sample them where they are not there."""
    from erase_concept.eval.images import fitting
    from erase_concept.pipelines.sample import read_images, sample

    if asked.size not in (None, model.size):
        raise RequestError("MODEL", model.source, f"draws {model.size} pixels; the benchmark judges {asked.size}")
    if not (folder / "manifest.jsonl").is_file():
        partial = folder.with_name(folder.name + ".partial")  # where a killed sampling goes on
        options = {**asked.options, **(asked.guarded if guarded else {})}
        for _ in sample(model, fitting(asked.prompts, model), partial, **options):
            pass
        partial.rename(folder)
    return read_images(folder)


def _data(recipe: Recipe, model: Diffusion, base_hash: str, work: Path) -> ForgetRetain:
    """Return the recipe's data, which all methods share that ask for the same."""
    from erase_concept.data import ForgetRetain
    from erase_concept.run import make_data_for

    parts = [base_hash, recipe.concept.to_dict(), {**dict(recipe.data), **recipe.latents}, recipe.seed]
    key = _digest(parts)
    file = work / "data" / f"{key}.safetensors"
    data = ForgetRetain.load(file, key)
    if data is None:
        data = make_data_for(recipe, model)
        data.save(file, key)
    return data


def _mask(recipe: Recipe, model: Diffusion, data: ForgetRetain, base_hash: str, work: Path) -> Mask | None:
    """Return the recipe's mask, of which no method changes anything but its kind and scope."""
    from erase_concept.masks.mask import Mask
    from erase_concept.run import MASK_KINDS, choose_mask

    if (recipe.mask.kind, recipe.mask.scope) == ("none", "full"):
        return None
    if recipe.mask.kind not in MASK_KINDS:
        return choose_mask(recipe, Mask.load(Path(recipe.mask.kind)), model, data, base_hash)
    parts = [base_hash, recipe.concept.to_dict(), dict(recipe.mask), recipe.seed, len(data.forget_latents)]
    file = work / "masks" / f"{_digest(parts)}.safetensors"
    if not file.exists():
        choose_mask(recipe, None, model, data, base_hash).save(file)
    return Mask.load(file)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _peak() -> int:
    """Return the most bytes of memory that this process ever held, on an accelerator those of the device."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _keep(pairs: Sequence[Pair], folder: Path) -> None:
    """Keep the images of some pairs, and what they show; the base model's lie where all cells have them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for place, pair in enumerate(pairs):
        shutil.copyfile(pair.erased, folder / f"{place:03d}.png")
        base = "" if pair.base is None else os.path.relpath(pair.base, folder)
        told = asdict(pair) | {"erased": f"{place:03d}.png", "base": base}
        lines.append(json.dumps(told, ensure_ascii=False))
    with atomic_write(folder / "pairs.jsonl") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pairs(work: Path, result: dict[str, Any]) -> list[Pair]:
    """Return the pairs of images that were kept of a cell; none where they are gone."""
    from erase_concept.eval.report.report import Pair

    folder = work / "samples" / result["fingerprint"]
    if not (folder / "pairs.jsonl").is_file():
        return []
    lines = [json.loads(text) for text in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Pair(**line | {"erased": folder / line["erased"], "base": folder / line["base"]}) for line in lines]
