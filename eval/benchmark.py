"""Named benchmarks: the prompts to ask, the metrics to run, and the base model's scores beside the erased one's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.eval import nudity
from erase_concept.eval.accuracy import LABELS, SIZE, Classified, classify, forget_mask, per_concept
from erase_concept.eval.gate import Gate, gates
from erase_concept.eval.measuring import GROUPS, Case, Found, Ready, Settings, Wanted
from erase_concept.eval.report import Bar, Chart, Pair, Report, write_report
from erase_concept.eval.score import Score, metrics, wilson
from erase_concept.pipelines.emojinette import CLASSIFIER, REFERENCE
from erase_concept.prompts import emojinette
from erase_concept.prompts.concept import Concept, fill, parse
from erase_concept.prompts.concept import concept as find_concept
from erase_concept.prompts.promptset import PromptRow, PromptSet, emojinette_prompts
from erase_concept.prompts.promptset import prompts as find_prompts

if TYPE_CHECKING:
    from erase_concept.eval.accuracy import LabelKind
    from erase_concept.pipelines.diffusion import Diffusion
    from erase_concept.pipelines.sample import ImageSet

GUIDANCE = 5.0
METRICS = metrics()
DEFAULTS = Settings()
_FULL = 512  # pixels; the sizes that prompts name are meant for models of this size and above


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
        "one artist or technique: UA and IRA by --classifier, and how far the other styles moved",
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


def emojinette_benchmark(concept: Concept, seeds: int = 2, first_seed: int = 10_000) -> PromptSet:
    """Return the rows that ask Emojinette for the concept and for everything else, 5.0 the guidance of each.

    Retain rows are every other object (style) in every style (object) once per seed; forget rows are 20 per seed: an
    object in each style and in none, by its label, its synonym and a name the model never learnt; a style with every
    object. Nearly half of the forget sentences are in no training at all, and no prompt is one that the concept is
    erased with. Image seeds run from ``first_seed`` on, without repetition. Raises RequestError for a concept that
    Emojinette does not know and for fewer than one seed.
    """
    _check_known(concept)
    if seeds < 1:
        raise RequestError("--seeds", seeds, "at least 1")
    everything = emojinette_prompts(range(seeds), first_seed=first_seed).rows
    forget = forget_mask(everything, concept)
    rows = [row for row, gone in zip(everything, forget, strict=True) if not gone]
    asked = (
        _object_prompts(concept.name, 20 * seeds) if concept.kind == "object" else _style_prompts(concept.name, seeds)
    )
    rows += [replace(row, seed=first_seed + len(everything) + place) for place, row in enumerate(asked)]
    erased_with = {*concept.forget_prompts, *concept.retain_prompts}
    return PromptSet(
        f"emojinette-{concept.name}",
        tuple(replace(row, guidance=GUIDANCE) for row in rows if row.prompt not in erased_with),
    )


def _object_prompts(label: str, count: int) -> list[PromptRow]:
    """Rows that ask for one object: styles and names take turns, and each style goes through its own sentences."""
    known = emojinette.names_of(label)
    names = (known.label, known.synonym, known.unseen)
    plain = _alternate(emojinette.EVAL_OBJECT, emojinette.UNSEEN_OBJECT)
    styled = _alternate(emojinette.EVAL_STYLED, emojinette.UNSEEN_STYLED)
    rows = []
    for place in range(count):
        turn, s = divmod(place, len(emojinette.STYLES) + 1)
        style = ("", *emojinette.STYLES)[s]
        templates = styled if style else plain
        sentence = templates[turn % len(templates)].replace("{s}", style)
        rows.append(PromptRow(fill(sentence, names[place % len(names)]), 0, object=label, style=style))
    return rows


def _style_prompts(style: str, seeds: int) -> list[PromptRow]:
    """Rows that ask for one style: every object once per seed, by label and synonym in turn."""
    styled = _alternate(emojinette.EVAL_STYLED, emojinette.UNSEEN_STYLED)
    rows = []
    for seed in range(seeds):
        for place, names in enumerate(emojinette.OBJECTS):
            turn = seed + place
            noun = (names.label, names.synonym)[turn // len(styled) % 2]
            sentence = styled[turn % len(styled)].replace("{s}", style)
            rows.append(PromptRow(fill(sentence, noun), 0, object=names.label, style=style))
    return rows


def _alternate(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One of each in turn, then what is left of the longer, so that any few in a row hold both groups."""
    both = [item for pair in zip(first, second, strict=False) for item in pair]
    return [*both, *(item for item in (*first, *second) if item not in both)]


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
    """
    spec = find_benchmark(name)
    run: dict[str, Any] = {}
    if (Path(model) / "run.json").is_file():
        run = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
        baseline = baseline or run["base"]["source"]
        if concept is None:
            recipe = yaml.safe_load((Path(model) / "recipe.yaml").read_text(encoding="utf-8"))
            concept = parse(recipe["concept"])
    if guard is not None:
        if _is_images(Path(model)):
            raise RequestError("--guard", guard, f"is for a model that samples, and {model} holds images")
        baseline = baseline or model
    given = dict(settings or {})
    if seeds is not None:
        given["seeds"] = seeds
    plan = _Plan(str(model), None if baseline is None else str(baseline), out, run, batch_size, fail_if, guard)
    if name == "emojinette":
        if prompts is not None:
            given["prompts"] = prompts
        yield from _emojinette(plan, concept, given, first_seed)
    else:
        yield from _measured(plan, name, spec, concept, prompts, given)


@dataclass(frozen=True)
class _Plan:
    """What every benchmark is told: whose images, where to, and what they may not be."""

    model: str
    baseline: str | None
    out: Path
    run: dict[str, Any]
    batch_size: int
    fail_if: Sequence[str]
    guard: str | None

    def guarded(self, options: Mapping[str, Any], concept: Concept) -> dict[str, Any]:
        """Add the guard, if any, to the options of ``sample``."""
        from erase_concept.pipelines.guards import find_guard

        return {**options, **({} if self.guard is None else {"guard": find_guard(self.guard, concept)})}

    @property
    def source(self) -> str:
        """The base model's name."""
        return self.run["base"]["source"] if self.run else str(self.baseline or self.model)

    @property
    def shelf(self) -> Path:
        """Where the images of base models are kept, and what was seen in any: beside the results, or in them."""
        beside = self.out.resolve().parent
        return (beside if os.access(beside, os.W_OK) or not beside.exists() else self.out) / ".baselines"

    def check_base(self, base: ImageSet) -> None:
        """Raise RequestError when the images are not those of the model that the run erased from."""
        told = base.settings.get("unet")
        if self.run and told is not None and told != self.run["base"]["unet"]:
            raise RequestError("--baseline", str(self.baseline), "is not the model that this run erased from")


def _emojinette(
    plan: _Plan, concept: str | Concept | None, given: dict[str, Any], first_seed: int
) -> Iterator[tuple[str, int, int] | Report]:
    """Run the benchmark ``emojinette``, whose prompts are made for the concept."""
    if concept is None:
        raise RequestError("--concept", "(not given)", f"needed, for {plan.model} is no run folder")
    concept = find_concept(concept) if isinstance(concept, str) else concept
    prompts = emojinette_benchmark(concept, given.pop("seeds", 2), first_seed)
    if unused := sorted(given.keys() - {"steps", "scheduler"}):
        raise RequestError(_option(unused[0]), given[unused[0]], "the benchmark emojinette has no such setting")
    checked = gates(plan.fail_if, tuple(METRICS), baseline=plan.baseline is not None)
    made: dict[str, int] = {}
    begun = time.perf_counter()
    erased = yield from _images("erased", plan.model, prompts, plan, plan.guarded(given, concept), made, size=SIZE)
    base = None
    if plan.baseline is not None:
        again = PromptSet(prompts.name, erased.rows)
        base = yield from _images("base", plan.baseline, again, plan, given, made, size=SIZE)
        plan.check_base(base)
    sampled = time.perf_counter()
    about: dict[str, Any] = {"run": plan.run} if plan.run else {}
    report = evaluate(concept, erased, base, model=plan.source, provenance=about)
    about = {"sampled": made, "seconds": _seconds(begun, sampled)} if made else {}
    yield _written(replace(report, provenance={**report.provenance, **about}), checked, plan.out)


def _measured(
    plan: _Plan,
    name: str,
    spec: Benchmark,
    concept: str | Concept | None,
    prompts: str | PromptSet | None,
    given: dict[str, Any],
) -> Iterator[tuple[str, int, int] | Report]:
    """Run any other benchmark."""
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
    made: dict[str, int] = {}
    begun = time.perf_counter()
    if _is_images(Path(plan.model)):
        if settings.seeds > 1:
            raise RequestError("--seeds", settings.seeds, f"{plan.model} holds images, sampled as often as they were")
        prompts_asked = asked_set
    else:
        prompts_asked = _repeated(_unused(asked_set, target), settings.seeds)
    erased = yield from _images("erased", plan.model, prompts_asked, plan, plan.guarded(options, target), made)
    base = None
    if plan.baseline is not None:
        again = PromptSet(prompts_asked.name, erased.rows)
        base = yield from _images("base", plan.baseline, again, plan, options, made)
        plan.check_base(base)
        erased, base = _in_common(erased, base)
        _check_same(erased, base, strict=False)
    sampled = time.perf_counter()

    asked, forget = labelled(erased.rows)
    case = Case(target.name, erased_label, asked, forget, erased, base, plan.shelf, plan.batch_size)
    found: list[Found] = []
    for group, one in ready.items():
        try:
            found.append(one.measure(case))
        except RequestError as problem:
            if group in explicit:
                raise
            absent |= dict.fromkeys(one.gives, str(problem))
    flagged = _flagged(case, found, target, small=small)
    about = _about(plan, target, asked_set, prompts_asked, settings, case, found, absent)
    report = Report(
        concept=target.name,
        kind=target.kind,
        anchor=target.anchor,
        model=plan.source,
        benchmark=name if name in BENCHMARKS else Path(name).name,
        erased={"images": len(erased.rows), **erased.settings},
        base=None if base is None else {"images": len(base.rows), **base.settings},
        scores=tuple(
            replace(score, protocol=f"{score.protocol}; {_sampling(erased.settings, erased.rows)}")
            for one in found
            for score in one.scores
        ),
        charts=tuple(chart for one in found for chart in one.charts),
        curves=tuple(curve for one in found for curve in one.curves),
        pairs=tuple(_found_pair(place, case, found, flagged=bool(flagged[place])) for place in range(len(forget))),
        provenance={**about, "sampled": made, "seconds": _seconds(begun, sampled)},
    )
    yield _written(report, checked, plan.out)


def _settings(spec: Benchmark, given: Mapping[str, Any], name: str) -> Settings:
    """Lay what is given over the benchmark's settings; raises RequestError for what is wrong, or what it cannot use."""
    used = {"steps", "guidance", "scheduler", "seeds", "category", "limit"}
    used |= {setting for group in spec.metrics for setting in GROUPS[group].settings}
    for key, value in given.items():
        if key in Settings.__dataclass_fields__ and key not in used:
            raise RequestError(_option(key), value, f"no metric of {name} takes it")
    own = {key: getattr(spec.settings, key) for key in Settings.__dataclass_fields__}
    try:
        return TypeAdapter(Settings).validate_python({**own, **given})
    except ValidationError as problem:
        first = problem.errors()[0]
        raise RequestError(_option(str(first["loc"][0])), first["input"], first["msg"]) from None


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _prompt_set(
    name: str, spec: Benchmark, prompts: str | PromptSet | None, settings: Settings, *, small: bool
) -> PromptSet:
    """Return the prompts to ask, of the category and as many as are wanted."""
    if prompts is None and small and name in ("imagenette", "style"):
        rows = [row for label in emojinette.OBJECT_LABELS[:10] for row in _object_prompts(label, 10)]
        rows = [replace(row, seed=30_000 + place, guidance=GUIDANCE) for place, row in enumerate(rows)]
        found = PromptSet("imagenette, as Emojinette draws it", tuple(rows))
        if name == "style":
            found = PromptSet("emojinette", emojinette_prompts(range(1)).rows)
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
    return found if settings.limit is None else found.stratified(settings.limit)


def _target(
    name: str, spec: Benchmark, concept: str | Concept | None, prompts: PromptSet, plan: _Plan, *, small: bool
) -> Concept:
    """Return what was erased: what is given, or what the run says, or nudity where nothing else is measured.

    A label of the prompts is a concept too; what became of it nobody knows then.
    """
    if name == "i2p" and (concept is None or (isinstance(concept, Concept) and concept.kind in ("object", "style"))):
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
    return find_concept(concept)


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


def _is_images(folder: Path) -> bool:
    """Tell a folder of images from a model's and from a run's."""
    from erase_concept.pipelines.sample import IMAGES

    if not folder.is_dir() or any((folder / name).is_file() for name in ("run.json", "model_index.json")):
        return False
    return any(file.name == "manifest.jsonl" or file.suffix.lower() in IMAGES for file in folder.iterdir())


def _images(
    who: str,
    source: str,
    prompts: PromptSet,
    plan: _Plan,
    options: Mapping[str, Any],
    made: dict[str, int],
    *,
    size: int | None = None,
) -> Generator[tuple[str, int, int], None, ImageSet]:
    """Read the images when the source is a folder of them, otherwise sample them and count in ``made`` how many.

    With ``size`` a model of another size is refused, and images must have the manifest of a sampling.
    """
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.sample import match_images, read_images, sample

    folder = Path(source)
    if size is not None and (folder / "manifest.jsonl").is_file():
        return read_images(folder)
    if size is None and _is_images(folder):
        return match_images(folder, prompts, argument="DIR" if who == "erased" else "--baseline")
    model = load(source)
    if size not in (None, model.size):
        raise RequestError("MODEL", source, f"makes images of {model.size} pixels; this benchmark judges {size}")
    if model.size < _FULL:  # such as Emojinette, which cannot draw 512 x 512 pixels
        prompts = replace(prompts, rows=tuple(replace(row, width=None, height=None) for row in prompts.rows))
    samples, total = plan.out / "samples" / who, len(prompts.rows)
    kept = plan.shelf / _key(model, prompts, options) if who == "base" else None
    if kept is not None and kept.is_dir() and not samples.exists():
        _copy(kept, samples)
    done = len(list(samples.glob("*.png")))
    made[who] = 0
    yield who, done, total
    for _ in sample(model, prompts, samples, batch_size=plan.batch_size, **options):
        done, made[who] = done + 1, made[who] + 1
        yield who, done, total
    if kept is not None and not kept.exists():
        _copy(samples, kept)
    return read_images(samples)


def _key(model: Diffusion, prompts: PromptSet, options: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all that the images of a model depend on."""
    from erase_concept.pipelines.diffusion import weights_hash

    parts = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    told = {
        "weights": {part: weights_hash(module) for part, module in parts.items()},
        "scheduler": dict(model.scheduler.config),
        "rows": [asdict(row) for row in prompts.rows],
        "options": dict(options),
        "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "diffusers")},
        "device": model.device.type,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder of samples as a whole or not at all; images take no room twice where they can be shared."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for file in folder.iterdir():
            try:
                # Of a file that is written to again, each folder has its own.
                (os.link if file.suffix == ".png" else shutil.copy2)(file, partial / file.name)
            except OSError:  # two file systems, or one without links
                shutil.copy2(file, partial / file.name)
        partial.replace(target)
    except OSError:  # a full disk, or another process was first: then it is sampled, or stays where it is
        shutil.rmtree(partial, ignore_errors=True)


def _in_common(erased: ImageSet, base: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images of the prompts that both have; notes tell how many have no counterpart."""
    if erased.rows == base.rows:
        return erased, base
    places: dict[PromptRow, list[int]] = defaultdict(list)
    for place, row in enumerate(base.rows):
        places[row].append(place)
    pairs = [(place, places[row].pop(0)) for place, row in enumerate(erased.rows) if places[row]]
    if not pairs:
        raise RequestError("--baseline", _folder(base), f"no prompt and seed of it is one of {_folder(erased)}")
    both = []
    for images, kept in zip((erased, base), zip(*pairs, strict=True), strict=True):
        left = len(images.rows) - len(kept)
        notes = (f"{left:,} images left out, for the other model has none of their prompt and seed",) if left else ()
        files, rows = tuple(images.files[place] for place in kept), tuple(images.rows[place] for place in kept)
        both.append(replace(images, files=files, rows=rows, notes=(*images.notes, *notes)))
    return both[0], both[1]


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
    plan: _Plan,
    concept: Concept,
    prompts: PromptSet,
    asked: PromptSet,
    settings: Settings,
    case: Case,
    found: Sequence[Found],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    """Return the provenance: all that one needs to measure the same again, and what was not measured."""
    chosen = {key: value for key, value in asdict(settings).items() if value is not None}
    notes = {who: list(some.notes) for who, some in zip(("erased", "base"), case.sides, strict=False) if some.notes}
    if any(row.width for row in asked.rows) and not any(row.width for row in case.erased.rows):
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


def _seconds(begun: float, sampled: float) -> dict[str, float]:
    return {"sampling": round(sampled - begun, 2), "measuring": round(time.perf_counter() - sampled, 2)}


def _written(report: Report, checked: Sequence[Gate], out: Path) -> Report:
    """Add what became of each gate, and write the report."""
    if checked:
        failed = {gate.text: gate.failure(report) or "passed" for gate in checked}
        report = replace(report, provenance={**report.provenance, "gates": failed})
    write_report(report, out)
    return report


def evaluate(
    concept: Concept,
    erased: ImageSet,
    base: ImageSet | None = None,
    *,
    model: str = "emojinette",
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Run every metric on the erased model's images and, on the same prompts and seeds, on the base model's.

    ``model`` names the base model in the report and ``provenance`` (anything JSON can hold) ends it. Raises
    RequestError when the concept is unknown, when the two sets differ in more than the model, or when there is nothing
    to judge.
    """
    _check_known(concept)
    if base is not None:
        _check_same(erased, base)
    forget = forget_mask(erased.rows, concept)
    if not forget.any() or forget.all():
        missing = "asks for anything else" if forget.any() else f"asks for the {concept.kind} {concept.name!r}"
        raise RequestError("DIR", _folder(erased), f"no image {missing}; sample the benchmark of this concept")
    seen_base = None if base is None else _classify(base)
    seen = replace(_classify(erased), base=seen_base)
    try:
        found_scores = [_score(name, seen, concept, erased.settings) for name in METRICS]
    except ValueError as problem:
        raise RequestError("DIR", _folder(erased), str(problem)) from problem
    found, found_base = per_concept(seen), None if seen_base is None else per_concept(seen_base)
    return Report(
        concept=concept.name,
        kind=concept.kind,
        anchor=concept.anchor,
        model=model,
        benchmark="emojinette",
        erased={"images": len(erased.rows), **erased.settings},
        base=None if base is None else {"images": len(base.rows), **base.settings},
        scores=tuple(score for score in found_scores if score is not None),
        charts=tuple(
            Chart(
                f"{kind.capitalize()}s recognised",
                "fraction",
                tuple(
                    _bar(
                        label,
                        found[kind][label],
                        None if found_base is None else found_base[kind][label],
                        forget=(kind, label) == (concept.kind, concept.name),
                    )
                    for label in labels
                    if found[kind][label][1]
                ),
            )
            for kind, labels in LABELS.items()
        ),
        pairs=tuple(
            _pair(place, erased, base, seen, seen_base, forget=bool(forget[place])) for place in range(len(forget))
        ),
        provenance={
            **(provenance or {}),
            "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "concept": concept.to_dict(),
            "classifier": _sha256(CLASSIFIER),
            "reference": _sha256(REFERENCE),
            "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "numpy")},
        },
    )


def _check_known(concept: Concept) -> None:
    known = {"object": emojinette.OBJECT_LABELS, "style": emojinette.STYLES}.get(concept.kind, ())
    if concept.name not in known:
        allowed = ", ".join((*emojinette.OBJECT_LABELS, *emojinette.STYLES))
        raise RequestError(
            "--concept", f"{concept.name!r} ({concept.kind})", f"Emojinette's objects and styles are: {allowed}"
        )


def _check_same(erased: ImageSet, base: ImageSet, *, strict: bool = True) -> None:
    """Raise RequestError unless only the models differ: same rows, same sampler, steps and guidance.

    Unless it is ``strict``, what one of the two does not say, such as of images made elsewhere, may be the same.
    """
    if erased.rows != base.rows:
        raise RequestError("--baseline", _folder(base), f"its prompts or seeds are not those of {_folder(erased)}")
    for name in ("sampler", "steps", "guidance"):
        ours, theirs = erased.settings.get(name), base.settings.get(name)
        if ours != theirs and (strict or None not in (ours, theirs)):
            raise RequestError(
                "--baseline", _folder(base), f"sampled with {name} {theirs}, the erased model with {ours}"
            )


def _classify(images: ImageSet) -> Classified:
    from erase_concept.pipelines.emojinette.classifier import load_classifier

    try:
        return classify(images.arrays(), images.rows, load_classifier(CLASSIFIER))
    except ValueError as problem:
        raise RequestError("DIR", _folder(images), str(problem)) from problem


def _score(name: str, seen: Classified, concept: Concept, settings: Mapping[str, Any]) -> Score | None:
    """Return one metric of both models, or None where it does not apply; the protocol also tells of the sampling."""
    function = METRICS[name]
    score = function(seen, concept)
    if score is None:
        return None
    score = replace(score, protocol=f"{score.protocol}; {_sampling(settings, seen.rows)}")
    before = None if seen.base is None else function(seen.base, concept)
    return score if before is None else replace(score, baseline=before.value, baseline_ci95=before.ci95)


def _sampling(settings: Mapping[str, Any], rows: Sequence[PromptRow]) -> str:
    """Say how images were made, as it stands in the protocol of a score."""
    if "sampler" not in settings:
        return f"images made elsewhere, matched by {settings.get('matched', 'manifest')}"
    told = f"{settings.get('steps', '?')} steps of {settings['sampler']}"
    if "guard" in settings:
        told = f"{told}, guard {settings['guard']} (no weights changed)"
    asked = {settings.get("guidance") if row.guidance is None else row.guidance for row in rows}
    scales = sorted(float(scale) for scale in asked if scale is not None)
    if len(scales) > 4:
        return f"{told}, guidance {scales[0]:g} to {scales[-1]:g}"
    return f"{told}, guidance {', '.join(f'{scale:g}' for scale in scales)}" if scales else told


def _bar(label: str, erased: tuple[int, int], base: tuple[int, int] | None, *, forget: bool) -> Bar:
    """Return a label's accuracy by (images in which it was found, images that asked for it)."""
    baseline, baseline_ci95 = (None, None) if base is None else (base[0] / base[1], wilson(*base))
    return Bar(label, erased[0] / erased[1], wilson(*erased), baseline, baseline_ci95, erased[1], forget)


def _pair(
    place: int, erased: ImageSet, base: ImageSet | None, seen: Classified, seen_base: Classified | None, *, forget: bool
) -> Pair:
    row = erased.rows[place]
    return Pair(
        prompt=row.prompt,
        seed=row.seed,
        forget=forget,
        erased=erased.files[place],
        erased_as=f"{seen.objects[place]}, {seen.styles[place]}",
        base=None if base is None else base.files[place],
        base_as=None if seen_base is None else f"{seen_base.objects[place]}, {seen_base.styles[place]}",
    )


def _folder(images: ImageSet) -> Path | str:
    return images.files[0].parent if images.files else "(empty)"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
