"""One trial of a comparison: erase a concept, sample the benchmark's prompts, and judge the images.

What trials share is made once and kept in the comparison's folder: the base model's images, the latents that methods
learn from, and the masks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.score import Score
from erase_concept.files import atomic_write, parse_json, read_lines

if TYPE_CHECKING:
    from erase_concept.data import ForgetRetain
    from erase_concept.eval.benchmarks import Benchmark
    from erase_concept.eval.metrics.metric import Metric
    from erase_concept.eval.plan import EvalPlan
    from erase_concept.eval.report.report import Pair
    from erase_concept.masks.mask import Mask
    from erase_concept.pipelines.image_set import ImageSet
    from erase_concept.pipelines.model import Diffusion
    from erase_concept.recipe import Recipe

PRESETS = ("default", "paper")
EXAMPLES = 4  # pairs of images of the concept that are kept of a trial, and twice as many of all else


@dataclass(frozen=True)
class Trial:
    """One erasure of a comparison, or the base model under a guard.

    ``method`` is a method, a preset or a guard. Settings stand in brackets: ``esd-x[eta=2,mask.sparsity=0]``. ``mask``
    None is the method's own. ``multiplier`` multiplies the method's tuned setting.
    """

    method: str
    concept: str
    seed: int
    mask: str | None = None
    multiplier: float = 1.0

    @property
    def label(self) -> str:
        """The trial in one word, as progress shows it."""
        parts = (self.method, self.mask or "", f"{self.multiplier:g}", self.concept, str(self.seed))
        return re.sub(r"[^\w.=-]+", "-", "_".join(parts))


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    ``key`` is ``trial_key``, and ``version`` the code that measured it. ``kind`` is the concept's. ``tuned_value`` is
    the value of the method's ``tuned_setting``; both are empty for a guard. ``seconds`` and ``peak_gib`` are those of
    the erasing alone, ``trial_seconds`` is the whole trial. ``changed`` is the share of the trained weights that differ
    from the base model's. ``losses`` are the first and the last. ``scores`` holds the score of everything together for
    each metric. ``failed`` says why the erasing failed; then there are no scores.
    """

    trial: Trial
    key: str
    version: str
    kind: str
    tuned_setting: str
    tuned_value: float
    seconds: float
    trial_seconds: float
    peak_gib: float = 0.0
    changed: float = 0.0
    losses: tuple[float, ...] = ()
    scores: tuple[Score, ...] = ()
    failed: str = ""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a comparison share. ``weights`` is the hash of the base model's, ``code`` is the version."""

    model: str
    weights: str
    code: str
    benchmark: str
    folder: Path
    ema: bool | None = None

    @property
    def shared(self) -> Path:
        """The folder of what trials share. Other weights or other code share nothing of it."""
        return self.folder / "shared" / digest([self.weights, self.code])[:8]

    @property
    def benchmark_text(self) -> str:
        """What the benchmark is: its name, or the content of its file."""
        file = Path(self.benchmark)
        return file.read_text(encoding="utf-8") if file.is_file() else self.benchmark


def split_settings(method: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a method's name and what its brackets set of a recipe; raises RequestError where it has another form."""
    from erase_concept.recipe import read_settings

    matched = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?", method)
    if matched is None:
        raise RequestError("methods", method, "must be NAME or NAME[KEY=VALUE,...]")
    texts = matched[2].split(",") if matched[2] else ()
    return matched[1], {part: given for part, given in read_settings(texts, "methods").items() if given}


def split_mask(mask: str | None) -> tuple[str | None, float]:
    """Return a mask and the factor of its multipliers, from KIND@FACTOR; raises RequestError for a bad factor."""
    from erase_concept.masks.choose import MASK_KINDS

    kind, _, factor = (mask or "").rpartition("@")
    if kind not in MASK_KINDS:  # no mask, one without a factor, or a file, whose name may contain the sign
        return mask, 1.0
    try:
        number = float(factor)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise RequestError("masks", str(mask), "the factor must be a number above 0, as in least-salient@4")
    return kind, number


def is_guard(method: str) -> bool:
    """Tell whether this is a guard, which changes no weights."""
    from erase_concept.pipelines.guards import GUARDS

    return split_settings(method)[0] in GUARDS.all()


def recipe_of(model: str, trial: Trial) -> Recipe:
    """Return a trial's recipe, its tuned setting multiplied; raises RequestError where it cannot be followed.

    Of a guard's recipe, which erases nothing, only the concept and the seed count.
    """
    from erase_concept.masks.make import check_scope
    from erase_concept.methods import METHODS
    from erase_concept.recipe import recipe_for, with_settings

    name, given = split_settings(trial.method)
    if is_guard(trial.method):
        if given or trial.mask is not None or trial.multiplier != 1:
            raise RequestError("methods", trial.method, "a guard changes no weights: it has no settings and no mask")
        return recipe_for(model, trial.concept, seed=trial.seed)
    values: dict[str, Any] = {"seed": trial.seed, **given}
    if trial.mask is not None:
        values["mask"] = given.get("mask", {}) | {"kind": trial.mask}
    preset = name if name in PRESETS else "default"
    if name not in PRESETS:
        values["method"] = name
    recipe = recipe_for(model, trial.concept, preset_name=preset, **values)
    check_scope(recipe)
    tuned = METHODS.find(recipe.method).tuned_setting
    if trial.multiplier != 1:  # refuses, for example, a share of more than 1
        recipe = with_settings(recipe, **{tuned: getattr(recipe.settings, tuned) * trial.multiplier})
    return recipe


def prepare_trial(context: TrialContext, trial: Trial) -> None:
    """Make what the trial shares with others, where it is not there yet, so that its own process need not."""
    from erase_concept.pipelines.load import load

    recipe = recipe_of(context.model, trial)
    plan = plan_of(context.benchmark, recipe, trial, context.folder)
    loaded = load(context.model, ema=context.ema)
    _sampled(loaded, plan, _base_folder(context, recipe), guarded=False)
    if not is_guard(trial.method):
        _data_and_mask(recipe, loaded, context.shared)


def run_trial(context: TrialContext, trial: Trial, key: str) -> TrialResult:
    """Erase, sample and judge. Keeps a few of the images in ``samples/KEY`` of the comparison's folder."""
    from erase_concept.eval.images import EvalImages
    from erase_concept.eval.measure import judge_images, measure
    from erase_concept.eval.report.report import drawn
    from erase_concept.pipelines.image_set import read_images
    from erase_concept.pipelines.load import load

    began = time.perf_counter()
    recipe = recipe_of(context.model, trial)
    plan = plan_of(context.benchmark, recipe, trial, context.folder)
    loaded = load(context.model, ema=context.ema)
    result = TrialResult(trial, key, context.code, recipe.concept.kind, "", 1.0, 0.0, 0.0)
    if not is_guard(trial.method):
        result = _erase(loaded, recipe, context.shared, result)
        if result.failed:
            return result
    with tempfile.TemporaryDirectory() as folder:
        images = _sampled(loaded, plan, Path(folder) / "erased", guarded=True)
        both = EvalImages(images, read_images(_base_folder(context, recipe)), {}, 0.0)
        report = measure(plan, both, judge_images(plan, both))
        _keep_examples(
            [report.pairs[place] for place in drawn(report.pairs, EXAMPLES)], context.folder / "samples" / key
        )
    first = {score.metric: score for score in reversed(report.scores)}  # that of everything together
    scores = tuple(score for score in report.scores if score is first[score.metric])
    return replace(result, scores=scores, trial_seconds=round(time.perf_counter() - began, 2))


def _erase(model: Diffusion, recipe: Recipe, folder: Path, result: TrialResult) -> TrialResult:
    """Erase from a loaded model, and return what it took and how much changed, or why it failed."""
    from erase_concept.methods import METHODS
    from erase_concept.training.loop import Record

    method, config = METHODS.find(recipe.method), recipe.settings
    data, mask = _data_and_mask(recipe, model, folder)
    trained = getattr(model, model.part_of(() if mask is None else mask.shapes))
    before = {name: weights.detach().clone() for name, weights in trained.named_parameters()}
    result = replace(
        result, tuned_setting=method.tuned_setting, tuned_value=float(getattr(config, method.tuned_setting))
    )
    losses = []
    began = time.perf_counter()
    try:
        for record in method.start(model, data, mask, config, seed=recipe.seed):
            if isinstance(record, Record):
                losses.append(record.loss)
    except EraseError as problem:
        seconds = round(time.perf_counter() - began, 2)
        return replace(result, failed=str(problem), seconds=seconds, trial_seconds=seconds)
    seconds, peak = round(time.perf_counter() - began, 2), _peak()  # before the sampling, which all methods share
    differing = sum(int((before[name] != weights).sum()) for name, weights in trained.named_parameters())
    return replace(
        result,
        seconds=seconds,
        peak_gib=round(peak / 2**30, 2),
        changed=differing / sum(weights.numel() for weights in before.values()),
        losses=(*losses[:1], *losses[-1:]),
    )


def plan_of(benchmark: str, recipe: Recipe, trial: Trial, folder: Path) -> EvalPlan:
    """Return how a trial is evaluated; raises RequestError when the benchmark does not measure both sides."""
    from erase_concept.eval.benchmarks import find_benchmark
    from erase_concept.eval.plan import make_plan
    from erase_concept.eval.request import EvalRequest

    found = find_benchmark(benchmark)
    request = EvalRequest(
        model=recipe.model,
        out=folder / "trials",
        concept=recipe.concept,
        benchmark=benchmark,
        baseline=recipe.model,
        settings={"seeds": 1} if found.catalog else {},
        metrics=_compared_metrics(found),
        guard=trial.method if is_guard(trial.method) else None,
    )
    plan = make_plan(request)
    there = [METRICS.find(name) for name in request.metrics if name not in plan.prepared.missing]
    if not _on_both_sides(there):
        name, why = next(iter(plan.prepared.missing.items()))
        raise RequestError("benchmark", benchmark, f"{name} cannot be measured: {why}")
    # New noise for every seed, so that no two trials' samples are the same ones.
    asked = plan.prompts.asked
    rows = tuple(replace(row, seed=(row.seed + 1_000 * trial.seed) % 2**32) for row in asked.rows)
    return replace(plan, prompts=replace(plan.prompts, asked=replace(asked, rows=rows)))


def _compared_metrics(benchmark: Benchmark) -> tuple[str, ...]:
    """Return the metrics of a benchmark that comparisons cite: its shares, and the first distance of the rest.

    Raises RequestError where there is no share of what is forgotten, or none of what is retained.
    """
    records = [METRICS.find(name) for name in benchmark.metrics]
    if not _on_both_sides(records):
        allowed = "tells no share of what is forgotten, or none of what is retained"
        raise RequestError("benchmark", benchmark.title, allowed)
    shares = [record for record in records if record.in_verdict]
    distances = [one for one in records if one.about == "retain" and one.unit != "fraction"]
    return tuple(record.name for record in (*shares, *distances[:1]))


def _on_both_sides(records: Sequence[Metric]) -> bool:
    """Tell whether these metrics give a share of what is forgotten and one of what is retained."""
    return {"forget", "retain"} <= {record.about for record in records if record.in_verdict}


def _base_folder(context: TrialContext, recipe: Recipe) -> Path:
    key = digest([recipe.concept.to_dict(), recipe.seed, context.ema is not False, context.benchmark_text])
    return context.shared / "base" / key[:16]


def _sampled(model: Diffusion, plan: EvalPlan, folder: Path, *, guarded: bool) -> ImageSet:
    """Return the images that are asked for, and sample them where they are not there."""
    from erase_concept.eval.images import check_model, fitting, sampling_of
    from erase_concept.pipelines.image_set import MANIFEST, read_images
    from erase_concept.pipelines.sample import iter_sample

    check_model(plan, model)
    asked = fitting(plan.prompts.asked, model)
    if not (folder / MANIFEST).is_file():
        partial = folder.with_name(folder.name + ".partial")  # where a killed sampling goes on
        for _ in iter_sample(model, asked, partial, sampling_of(plan, guarded=guarded)):
            pass
        partial.rename(folder)
    found = read_images(folder)
    if found.rows != asked.rows:
        allowed = "its lines are not those that were written: remove the folder, and its images are sampled again"
        raise RequestError("images", folder / MANIFEST, allowed)
    return found


def _data_and_mask(recipe: Recipe, model: Diffusion, folder: Path) -> tuple[ForgetRetain, Mask | None]:
    """Return the recipe's data and mask, which all trials share that ask for the same."""
    from erase_concept.make_data import cached_data, data_key
    from erase_concept.masks.make import cached_mask, mask_key

    base_hash = model.describe()["unet"]
    data = cached_data(recipe, model, base_hash, folder / "data" / f"{data_key(recipe, base_hash)}.safetensors")
    file = folder / "masks" / f"{mask_key(recipe, base_hash)}.safetensors"
    return data, cached_mask(recipe, model, data, base_hash, file)


def digest(parts: Sequence[Any]) -> str:
    """Return a hash over values that JSON can hold."""
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


def _keep_examples(pairs: Sequence[Pair], folder: Path) -> None:
    """Keep the erased images of some pairs. The base model's stay where all trials have them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for place, pair in enumerate(pairs):
        shutil.copyfile(pair.erased, folder / f"{place:03d}.png")
        base = "" if pair.base is None else os.path.relpath(pair.base, folder)
        lines.append(json.dumps(asdict(pair) | {"erased": f"{place:03d}.png", "base": base}, ensure_ascii=False))
    with atomic_write(folder / "pairs.jsonl") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_examples(folder: Path, key: str) -> list[Pair]:
    """Return the pairs of images that were kept of a trial in a comparison's folder; none where they are gone.

    Raises RequestError when their list is damaged.
    """
    from erase_concept.eval.report.report import Pair

    samples = folder / "samples" / key
    file = samples / "pairs.jsonl"
    found = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            pair = TypeAdapter(Pair).validate_python(parse_json(line))
        except ValueError:
            allowed = "is no pair of images: remove the file, and the pages are written without its images"
            raise RequestError("out", f"{file}, line {number}", allowed) from None
        base = None if pair.base is None else samples / pair.base
        found.append(replace(pair, erased=samples / pair.erased, base=base))
    return found
