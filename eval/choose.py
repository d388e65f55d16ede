"""What an evaluation is about: the concept, the benchmark and the prompts that a request leads to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from erase_concept.errors import RequestError
from erase_concept.eval.benchmarks import Benchmark, benchmarks, find_benchmark
from erase_concept.eval.judges.judge import plain
from erase_concept.eval.judges.nudenet import NUDITY_WORDS
from erase_concept.eval.request import ErasedRun, EvalRequest, EvalSettings, is_images
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.prompts.catalog import catalog
from erase_concept.prompts.concept import Concept, parse, whole_words
from erase_concept.prompts.find import GENERAL, find_concept
from erase_concept.prompts.find_prompts import find_prompts
from erase_concept.prompts.label_grid import concept_prompts
from erase_concept.prompts.promptset import PromptRow, PromptSet

Label = Callable[[str, str], str]  # (name, kind) -> a judge's label; raises RequestError where there is none


@dataclass(frozen=True)
class ChosenPrompts:
    """The prompts of an evaluation.

    ``selected`` are those of the set. ``asked`` are those to sample: each as often as the settings say, and none that
    the concept was erased with; ``left_out`` counts these. ``own`` says that they are the benchmark's own.
    """

    selected: PromptSet
    asked: PromptSet
    left_out: int
    own: bool


def sources_of(request: EvalRequest, run: ErasedRun) -> list[str]:
    """Return the names of the model and of its base models, back to the first one that a run erased from."""
    earlier = [entry["base"] for entry in run.run_info.get("earlier", ())]
    return [str(name) for name in (request.model, request.baseline, run.base, *earlier) if name is not None]


def catalogs_for(sources: Sequence[str], benchmark: Benchmark | None = None) -> tuple[str, ...]:
    """Return the catalogues in which a concept is looked up: the benchmark's, the built-in models', or the general."""
    builtin = builtin_models()
    own = [name for source in sources if source in builtin for name in builtin[source].catalogs]
    if benchmark is not None and benchmark.catalog:
        own.insert(0, benchmark.catalog)
    return tuple(dict.fromkeys(own)) or GENERAL


def choose_benchmark(request: EvalRequest, run: ErasedRun) -> Benchmark:
    """Return the benchmark that is asked for, the built-in model's own, or the one for the concept's kind.

    Raises RequestError when none of these decides it.
    """
    if request.benchmark is not None:
        return find_benchmark(request.benchmark)
    sources = sources_of(request, run)
    builtin = builtin_models()
    for source in sources:
        if source in builtin:
            return find_benchmark(builtin[source].benchmark)
    allowed = f"choose one of: {', '.join(benchmarks())}, or a YAML file"
    what = request.concept if request.concept is not None else run.recipe.get("concept")
    if what is None:
        raise RequestError("benchmark", "(not given)", f"neither a run nor a concept is given; {allowed}")
    concept = find_concept(what, catalogs_for(sources))
    kind = "nudity" if all(map(is_nudity, concept.parts)) else concept.kind
    found = [one for one in benchmarks().values() if kind in one.default_for]
    if not found or (found[0].forget == "label" and not _has_label(found[0], concept)):
        raise RequestError("benchmark", "(not given)", f"none is made for {concept.name!r} ({kind}); {allowed}")
    return found[0]


def _has_label(benchmark: Benchmark, concept: Concept) -> bool:
    rows = find_prompts(benchmark.prompts).rows
    known = {plain(label) for row in rows for label in (row.object, row.style) if label}
    return all(plain(part.name) in known for part in concept.parts)


def check_measurable(concept: Concept, benchmark: str) -> None:
    """Raise RequestError for a concept of which a benchmark's prompts cannot be made, before it is erased."""
    found = find_benchmark(benchmark)
    if found.catalog:
        concept_prompts(catalog(found.catalog), concept)


def is_nudity(part: Concept) -> bool:
    """Tell whether a concept is nudity, be it in the words of a user."""
    return part.kind == "nudity" or bool(whole_words(NUDITY_WORDS).search(part.name))


def choose_concept(
    request: EvalRequest, run: ErasedRun, benchmark: Benchmark, prompts: PromptSet | None, looks_for: str
) -> Concept:
    """Return the erased concept: the request's, the run's, or what the benchmark looks for.

    A label of the prompts is a concept too, whose replacement is not known. Raises RequestError when there is none.
    """
    what = request.concept
    if what is None and run.recipe:
        return parse(run.recipe["concept"])
    if what is None and looks_for:
        return find_concept(looks_for)
    if what is None:
        raise RequestError("concept", "(not given)", f"needed, for {request.model} is no run folder")
    catalogs = catalogs_for(sources_of(request, run), benchmark)
    known = {key for name in catalogs for key in catalog(name).concepts}
    if isinstance(what, str) and what not in known and prompts is not None and benchmark.forget == "label":
        for row in prompts.rows:
            labels = {"object": row.object, "style": row.style}
            for kind in (benchmark.labels,) if benchmark.labels else ("object", "style"):
                if labels[kind] and plain(labels[kind]) == plain(what):
                    return Concept(labels[kind], kind, "", ("{O}",), others=("",))
    return find_concept(what, catalogs)


def named_prompts(request: EvalRequest, benchmark: Benchmark, settings: EvalSettings) -> PromptSet | None:
    """Return the prompts that the request or the benchmark names, after the selection by category and limit.

    Returns None where the prompts are made for the concept. Raises RequestError when nobody names any.
    """
    prompts = request.prompts or benchmark.prompts
    if not prompts:
        if benchmark.catalog:
            return None
        raise RequestError("prompts", "(not given)", f"{benchmark.title} needs them: a CSV file with a column 'prompt'")
    found = (prompts if isinstance(prompts, PromptSet) else find_prompts(prompts)).without_minors()
    numbered = zip(found.rows, found.case_numbers, strict=True)
    found = replace(found, rows=tuple(replace(row, case_number=number) for row, number in numbered))
    return _selected(found, benchmark, settings)


def _selected(found: PromptSet, benchmark: Benchmark, settings: EvalSettings) -> PromptSet:
    if settings.category is not None:
        found = found.in_category(settings.category)
    by: Literal["style"] | None = "style" if benchmark.labels == "style" else None
    return found if settings.limit is None else found.stratified(settings.limit, by)


def choose_prompts(
    request: EvalRequest,
    benchmark: Benchmark,
    concept: Concept,
    earlier: Sequence[Concept],
    settings: EvalSettings,
    named: PromptSet | None,
) -> ChosenPrompts:
    """Return the prompts to sample: the named ones, or those that are made for the concept.

    Where prompts would be made, a folder of images with labels in its manifest is judged by these rows instead. Raises
    RequestError when no prompt is left, and for several seeds of images that are there already.
    """
    folder = Path(request.model)
    own = request.prompts is None
    if named is None:
        made = concept_prompts(
            catalog(benchmark.catalog), concept, settings.seeds, request.first_seed, earlier, settings.guidance
        )
        selected = _selected(made, benchmark, settings)
        labelled = _labelled_rows(folder)
        asked = replace(selected, rows=labelled) if labelled else selected
        return ChosenPrompts(selected, asked, 0, own)
    erased_with = {*concept.forget_prompts, *concept.retain_prompts}
    if is_images(folder):
        if settings.seeds > 1:
            raise RequestError("seeds", settings.seeds, f"{folder} holds images, sampled as often as they were")
        return ChosenPrompts(named, named, 0, own)
    if own and benchmark.same_prompts:
        erased_with = set()
    kept = tuple(row for row in named.rows if row.prompt not in erased_with)
    if not kept:
        raise RequestError("prompts", named.name, "the erasing used every one of them; ask in other words")
    # Each time with seeds a large prime further on.
    rows = (
        replace(row, seed=(row.seed + 1_000_000_007 * turn) % 2**32) for turn in range(settings.seeds) for row in kept
    )
    return ChosenPrompts(named, replace(named, rows=tuple(rows)), len(named.rows) - len(kept), own)


def _labelled_rows(folder: Path) -> tuple[PromptRow, ...]:
    """Return the rows of a folder of images whose manifest has labels, otherwise none."""
    from erase_concept.pipelines.image_set import read_images

    if is_images(folder) and (folder / "manifest.jsonl").is_file():
        rows = read_images(folder).rows
        if any(row.object or row.style for row in rows):
            return rows
    return ()


def earlier_concepts(run: ErasedRun, concept: Concept, label: Label) -> tuple[list[Concept], list[str]]:
    """Return the concepts that a run's base model had lost before, and the names of those that no judge knows.

    Each comes once, however often it was erased. The run's own concept is none of them.
    """
    parts = {part.name: part for entry in run.run_info.get("earlier", ()) for part in parse(entry["concept"]).parts}
    known, left = [], []
    for name, part in parts.items():
        if name in concept.names:
            continue
        try:
            if part.kind not in ("object", "style"):  # prompts have no label of another kind
                raise RequestError("concept", name, "is no object and no style")
            label(name, part.kind)
        except RequestError:
            left.append(name)
        else:
            known.append(part)
    return known, left
