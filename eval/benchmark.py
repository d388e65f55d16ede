"""Named benchmarks: the prompts to ask, the metrics to run, and the base model's scores beside the erased one's."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from erase_concept import recipe
from erase_concept.errors import RequestError
from erase_concept.eval import emojinette_benchmark
from erase_concept.eval.images import Asked, Gathered, Plan, gather, is_images, sampling
from erase_concept.eval.judges import nudity
from erase_concept.eval.measuring import GROUPS, Case, Found, Ready, Settings, Wanted, option
from erase_concept.eval.report.report import Pair, Report
from erase_concept.eval.report.write import write_report
from erase_concept.eval.thresholds import gates, judged
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.processes import processes
from erase_concept.prompts.concept import Concept, parse
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.find_prompts import find_prompts
from erase_concept.prompts.label_grid import catalog_prompts
from erase_concept.prompts.promptset import PromptRow, PromptSet

if TYPE_CHECKING:
    from erase_concept.eval.metrics.accuracy import LabelKind

DEFAULTS = Settings()


@dataclass(frozen=True)
class Benchmark:
    """What is asked by default, and what is measured.

    ``prompts`` names a prompt set, ``metrics`` are groups of ``GROUPS``; ``forget`` says which prompts ask for the
    erased concept: all, those that bear its label, or none.
    """

    about: str
    prompts: str | None
    metrics: tuple[str, ...]
    forget: Literal["all", "label", "none"]
    settings: Settings = DEFAULTS


BENCHMARKS = {
    "emojinette": Benchmark(
        "one object or style of Emojinette, by classifier: UA, IRA, CRA and the Fréchet distance of the rest",
        "emojinette",
        (),
        "label",
    ),
    "i2p": Benchmark(
        "nudity on I2P's prompts: exposed body parts by part, category and threshold, beside the base model's",
        "hub:AIML-TUDA/i2p",
        ("nudity", "nsfw"),
        "all",
    ),
    "imagenette": Benchmark(
        "one class of Imagenette: UA on it, IRA on the other nine, and how far these moved from the base model's",
        "imagenette",
        ("classes", "distance", "similarity"),
        "label",
    ),
    "style": Benchmark(
        "one artist or technique: UA, IRA and CRA by --classifier, and how far the other styles moved",
        "styles",
        ("classes", "distance", "similarity", "clip_score"),
        "label",
    ),
    "coco": Benchmark(
        "captions of everyday things (--prompts): FID, against real images with --reference, and CLIP score",
        None,
        ("distance", "clip_score"),
        "none",
    ),
}


class Own(BaseModel):
    """A benchmark of one's own, as a YAML file describes it: prompts, groups of metrics, and settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: str
    metrics: tuple[str, ...]
    settings: dict[str, Any] = {}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name, or read one from a YAML file; raises RequestError naming the first bad key.

    Of a path to prompts that is not there, the folder of the file is tried.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if not name.endswith((".yaml", ".yml")):
        allowed = f"unknown benchmark; allowed: {', '.join(BENCHMARKS)}, or a YAML file"
        raise RequestError("--benchmark", name, allowed)
    file = Path(name)
    try:
        own = Own.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        settings = TypeAdapter(Settings).validate_python(own.settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        keys = f"keys: prompts, metrics, settings ({', '.join(Settings.__dataclass_fields__)})"
        raise RequestError("--benchmark", name, f"{where}: {first['msg']}; {keys}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else f"not YAML: {problem}"
        raise RequestError("--benchmark", name, str(reason)) from None
    unknown = [group for group in own.metrics if group not in GROUPS]
    if unknown or not own.metrics:
        wrong = f"metrics: no {unknown[0]!r} here" if unknown else "metrics: at least one is needed"
        raise RequestError("--benchmark", name, f"{wrong}; allowed: {', '.join(GROUPS)}")
    beside = file.parent / own.prompts
    prompts = str(beside) if beside.is_file() and not Path(own.prompts).exists() else own.prompts
    return Benchmark(name, prompts, own.metrics, "label", settings)


def benchmark(
    model: str | Path,
    concept: str | Concept | None = None,
    baseline: str | Path | None = None,
    *,
    out: Path,
    name: str = "emojinette",
    prompts: str | PromptSet | None = None,
    settings: Mapping[str, Any] | None = None,
    guard: str | None = None,
    fail_if: Sequence[str] = (),
    seeds: int | None = None,
    first_seed: int = 10_000,
    batch_size: int = 16,
) -> Iterator[tuple[str, int, int] | Report]:
    """Sample a benchmark from an erased model and its base, judge both, and write the report to ``out``.

    ``model`` is a run folder, anything that ``load`` takes, or a folder of images, with a manifest or made elsewhere;
    so is ``baseline``, the base model. A run folder knows what was erased, and from what: there both may be None.
    ``settings`` are fields of ``Settings``, laid over the benchmark's own; what they name is asked for and must be
    there, while a metric of the benchmark that needs what is not installed is left out, which the report says.
    ``guard`` names a guard against the concept, with which the model samples and its baseline does not: by default the
    model itself.

    Yields ("erased" or "base", images there, images in all) and last the report. The images stay in ``out/samples``,
    and run again it makes only what is missing. A base model's images are also kept in the folder ``.baselines`` beside
    ``out``, under the hash of everything that makes them, and not sampled again. ``fail_if`` are conditions as
    ``gates`` reads them; the report's provenance says of each whether it "passed". Raises RequestError, before anything
    is sampled, when the request cannot be followed.

    Where ``accelerate launch`` or ``torchrun`` has started several processes, they share the sampling; then the main
    process measures and writes, and in the others this ends without a report.
    """
    run: dict[str, Any] = {}
    if (Path(model) / "run.json").is_file():
        run = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
        baseline = baseline or run["base"]["source"]
        if concept is None:
            recipe = yaml.safe_load((Path(model) / "recipe.yaml").read_text(encoding="utf-8"))
            concept = parse(recipe["concept"])
    if guard is not None:
        if is_images(Path(model)):
            raise RequestError("--guard", guard, f"is for a model that samples, and {model} holds images")
        baseline = baseline or model
    given = dict(settings or {}) | ({} if seeds is None else {"seeds": seeds})
    plan = Plan(str(model), None if baseline is None else str(baseline), out, run, batch_size, fail_if, guard)
    plan.find_base()
    asked = asked_by(name, plan, concept, given, prompts=prompts, first_seed=first_seed)
    images = yield from gather(plan, asked)
    if not processes().is_main_process:
        return
    gathered = time.perf_counter()
    report = asked.measure(images)
    seconds = {"sampling": round(images.seconds, 2), "measuring": round(time.perf_counter() - gathered, 2)}
    about = {**report.provenance, "sampled": images.made, "seconds": seconds}
    report = judged(replace(report, provenance=about), asked.gates)
    write_report(report, out)
    yield report


def asked_by(
    name: str,
    plan: Plan,
    concept: str | Concept | None,
    given: Mapping[str, Any],
    *,
    prompts: str | PromptSet | None = None,
    first_seed: int = 10_000,
    metrics: Sequence[str] | None = None,
) -> Asked:
    """Return what a benchmark asks for and how it measures; of Emojinette's own, ``metrics`` may name some.

    Raises RequestError when the request cannot be followed.
    """
    spec = find_benchmark(name)
    if name == "emojinette":
        more = {} if prompts is None else {"prompts": prompts}
        chosen = tuple(emojinette_benchmark.METRICS) if metrics is None else metrics
        return emojinette_benchmark.asked(plan, concept, {**given, **more}, first_seed, chosen)
    return _asked(plan, name, spec, concept, prompts, given)


def _asked(
    plan: Plan,
    name: str,
    spec: Benchmark,
    concept: str | Concept | None,
    prompts: str | PromptSet | None,
    given: Mapping[str, Any],
) -> Asked:
    """Return what any other benchmark asks for, and how it measures."""
    settings = _settings(spec, given, name)
    known = (plan.model, plan.baseline, settings.classifier, plan.run and plan.run["base"]["source"])
    small = "emojinette" in known
    asked_set = _prompt_set(name, spec, prompts, settings, small=small)
    target = _target(name, spec, concept, asked_set, plan, small=small)
    kind: LabelKind = "style" if "style" in (target.kind, name) else "object"
    wanted = Wanted(settings, kind, plan.baseline is not None, small)
    ready, absent, explicit = _prepared(name, spec, given, wanted)
    known_metrics = tuple(metric for group in ready.values() for metric in group.gives)
    checked = gates(plan.fail_if, known_metrics, absent, baseline=wanted.baseline)

    forget_by = "all" if spec.forget == "label" and target.kind == "nudity" else spec.forget
    label = next((group.label for group in ready.values() if group.label), _plain)
    erased_label = label(target.name) if forget_by == "label" else target.name

    def labelled(rows: Sequence[PromptRow]) -> tuple[tuple[str, ...], np.ndarray]:
        texts = [row.style if kind == "style" else row.object for row in rows]
        names = {text: label(text, argument="--prompts") if text else "" for text in dict.fromkeys(texts)}
        asked = tuple(names[text] for text in texts)
        forget = [forget_by == "all" or (forget_by == "label" and label == erased_label) for label in asked]
        return asked, np.array(forget, bool)

    if spec.forget == "label" and name in BENCHMARKS and not labelled(asked_set.rows)[1].any():
        there = dict.fromkeys(row.style if kind == "style" else row.object for row in asked_set.rows)
        allowed = f"no prompt of {asked_set.name} asks for it; allowed: {', '.join(filter(None, there))}"
        raise RequestError("--concept", target.name, allowed)

    options = {key: getattr(settings, key) for key in ("steps", "guidance", "scheduler")}
    if is_images(Path(plan.model)):
        if settings.seeds > 1:
            raise RequestError("--seeds", settings.seeds, f"{plan.model} holds images, sampled as often as they were")
        prompts_asked = asked_set
    else:
        prompts_asked = _repeated(_unused(asked_set, target), settings.seeds)

    def measure(images: Gathered) -> Report:
        erased, base = images.erased, images.base
        asked, forget = labelled(erased.rows)
        case = Case(target.name, erased_label, asked, forget, erased, base, plan.shelf, plan.batch_size)
        found: list[Found] = []
        missing = dict(absent)
        for group, one in ready.items():
            try:
                found.append(one.measure(case))
            except RequestError as problem:
                if group in explicit:
                    raise
                missing |= dict.fromkeys(one.gives, str(problem))
        flagged = _flagged(case, found, target, small=small)
        about = _about(plan, target, asked_set, prompts_asked, settings, images, found, missing)
        return Report(
            concept=target.name,
            kind=target.kind,
            anchor=target.replacement,
            model=plan.source,
            benchmark=name if name in BENCHMARKS else Path(name).name,
            erased={"images": len(erased.rows), **erased.settings},
            base=None if base is None else {"images": len(base.rows), **base.settings},
            scores=tuple(
                replace(score, protocol=f"{score.protocol}; {sampling(erased.settings, erased.rows)}")
                for one in found
                for score in one.scores
            ),
            charts=tuple(chart for one in found for chart in one.charts),
            curves=tuple(curve for one in found for curve in one.curves),
            pairs=tuple(_found_pair(place, case, found, flagged=bool(flagged[place])) for place in range(len(forget))),
            provenance=about,
        )

    return Asked(prompts_asked, options, plan.guarded(target), checked, measure)


def _settings(spec: Benchmark, given: Mapping[str, Any], name: str) -> Settings:
    """Lay what is given over the benchmark's settings; raises RequestError for what is wrong, or what it cannot use."""
    used = {"steps", "guidance", "scheduler", "seeds", "category", "limit"}
    used |= {setting for group in spec.metrics for setting in GROUPS[group].settings}
    for key, value in given.items():
        if key in Settings.__dataclass_fields__ and key not in used:
            raise RequestError(option(key), value, f"no metric of {name} takes it")
    own = {key: getattr(spec.settings, key) for key in Settings.__dataclass_fields__}
    try:
        return TypeAdapter(Settings).validate_python({**own, **given})
    except ValidationError as problem:
        first = problem.errors()[0]
        raise RequestError(option(str(first["loc"][0])), first["input"], first["msg"]) from None


def _prompt_set(
    name: str, spec: Benchmark, prompts: str | PromptSet | None, settings: Settings, *, small: bool
) -> PromptSet:
    """Return the prompts to ask, of the category and as many as are wanted."""
    if prompts is None and small and name in ("imagenette", "style"):
        found = emojinette_benchmark.imagenette_stand_ins()
        if name == "style":
            rows = [
                replace(row, guidance=emojinette_benchmark.GUIDANCE) for row in catalog_prompts(CATALOG, range(1)).rows
            ]
            found = PromptSet("emojinette", tuple(rows))
    elif isinstance(prompts, PromptSet):
        found = prompts
    elif (wanted := prompts or spec.prompts) is None:
        raise RequestError("--prompts", "(not given)", f"{name} needs its captions: a CSV file with a column 'prompt'")
    else:
        found = find_prompts(wanted)
    numbered = zip(found.rows, found.case_numbers, strict=True)
    found = replace(found, rows=tuple(replace(row, case_number=number) for row, number in numbered))
    if settings.category is not None:
        found = found.in_category(settings.category)
    by: LabelKind | None = "style" if name == "style" else None
    return found if settings.limit is None else found.stratified(settings.limit, by)


def _target(
    name: str, spec: Benchmark, concept: str | Concept | None, prompts: PromptSet, plan: Plan, *, small: bool
) -> Concept:
    """Return what was erased: what is given, or what the run says, or nudity where nothing else is measured.

    A label of the prompts is a concept too; what became of it nobody knows then.
    """
    if name == "i2p" and (
        concept is None or (isinstance(concept, Concept) and concept.kind in ("object", "style", "several"))
    ):
        return find_concept("nudity")
    if concept is None:
        raise RequestError("--concept", "(not given)", f"needed, for {plan.model} is no run folder")
    if isinstance(concept, Concept):
        return concept
    kinds: tuple[LabelKind, ...] = ("style",) if name == "style" else ("object", "style")
    for kind in kinds if spec.forget == "label" and not small else ():
        for row in prompts.rows:
            label = row.style if kind == "style" else row.object
            if label and _plain(label) == _plain(concept):
                return Concept(label, kind, "", ("{O}",), others=("",))
    return recipe.find_concept(concept, plan.source)


def _plain(name: str, *, argument: str = "") -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _prepared(
    name: str, spec: Benchmark, given: Mapping[str, Any], wanted: Wanted
) -> tuple[dict[str, Ready], dict[str, str], set[str]]:
    """Return the groups that can be measured, why other metrics cannot, and the groups that were asked for by name.

    Raises RequestError when one of the last cannot be measured, or none can at all.
    """
    ready: dict[str, Ready] = {}
    absent: dict[str, str] = {}
    explicit = set(() if name in BENCHMARKS else spec.metrics)
    explicit |= {group for group in spec.metrics if given.keys() & set(GROUPS[group].settings)}
    last: RequestError | None = None
    for group in spec.metrics:
        try:
            ready[group] = GROUPS[group].prepare(wanted)
        except RequestError as problem:
            if group in explicit:
                raise
            absent |= dict.fromkeys(GROUPS[group].gives, str(problem))
            last = last or problem
    if not ready and last is not None:
        raise last
    return ready, absent, explicit


def _unused(prompts: PromptSet, concept: Concept) -> PromptSet:
    """Leave out the prompts that the concept is erased with."""
    erased_with = {*concept.forget_prompts, *concept.retain_prompts}
    kept = tuple(row for row in prompts.rows if row.prompt not in erased_with)
    if not kept:
        raise RequestError("--prompts", prompts.name, "the erasing used every one of them; ask in other words")
    return replace(prompts, rows=kept)


def _repeated(prompts: PromptSet, seeds: int) -> PromptSet:
    """Return the rows as often as is wanted, each time with seeds a large prime further on."""
    rows = [
        replace(row, seed=(row.seed + 1_000_000_007 * turn) % 2**63) for turn in range(seeds) for row in prompts.rows
    ]
    return replace(prompts, rows=tuple(rows))


def _flagged(case: Case, found: Sequence[Found], concept: Concept, *, small: bool) -> np.ndarray:
    """Return which pairs [n] a page veils: what a detector flags, which is asked here where no metric did.

    Without a detector all are, where nudity was erased. Emojinette draws nothing that anybody has to be spared.
    """
    flags = [one.flagged for one in found if one.flagged is not None]
    if not flags and not small:
        try:
            for side in case.sides:
                seen = nudity.detect(side.files, cache=case.cache / "detections.jsonl")
                flags.append(nudity.counts(seen).sum(1) > 0)
        except RequestError:  # not installed
            pass
    return np.any(flags, axis=0) if flags else np.full(len(case.forget), concept.kind == "nudity")


def _about(
    plan: Plan,
    concept: Concept,
    prompts: PromptSet,
    asked: PromptSet,
    settings: Settings,
    images: Gathered,
    found: Sequence[Found],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    """Return the provenance: all that one needs to measure the same again, and what was not measured."""
    chosen = {key: value for key, value in asdict(settings).items() if value is not None}
    notes = images.notes
    if any(row.width for row in asked.rows) and not any(row.width for row in images.erased.rows):
        notes.setdefault("erased", []).append("the sizes of the prompts were not used: the model is smaller")
    missing = dict(absent)
    told: dict[str, Any] = {}
    for one in found:
        missing |= one.provenance.get("not measured", {})
        told |= {key: value for key, value in one.provenance.items() if key != "not measured"}
    left = len(prompts.rows) - len(asked.rows) // settings.seeds
    return {
        **({"run": plan.run} if plan.run else {}),
        "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "concept": concept.to_dict(),
        "prompts": {
            "name": prompts.name,
            "selection": prompts.selection or "all",
            "prompts": len(prompts.rows),
            **({"left out, for the erasing used them": left} if left else {}),
        },
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in chosen.items()},
        **told,
        **({"notes": notes} if notes else {}),
        **({"not measured": missing} if missing else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "numpy")},
    }


def _found_pair(place: int, case: Case, found: Sequence[Found], *, flagged: bool) -> Pair:
    words = ["; ".join(one.seen[side][place] for one in found if one.seen) for side in range(len(case.sides))]
    row, base = case.erased.rows[place], case.base
    return Pair(
        prompt=row.prompt,
        seed=row.seed,
        forget=bool(case.forget[place]),
        erased=case.erased.files[place],
        erased_as=words[0],
        base=None if base is None else base.files[place],
        base_as=None if base is None else words[1],
        flagged=flagged,
    )
