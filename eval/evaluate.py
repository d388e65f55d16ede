"""Evaluate an erased model: sample a benchmark from it and from its base, judge both, and write the report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.images import EvalImages, gather
from erase_concept.eval.judgements import save_judgements
from erase_concept.eval.measure import judge_images, measure
from erase_concept.eval.plan import EvalPlan, make_plan
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.verdict import main_scores
from erase_concept.eval.report.write import report_json, write_report
from erase_concept.eval.request import EvalRequest, told
from erase_concept.files import file_sha256, only_process, relative
from erase_concept.pipelines.image_set import MANIFEST, SETTINGS
from erase_concept.pipelines.processes import processes
from erase_concept.pipelines.progress import bar

if TYPE_CHECKING:
    from erase_concept.prompts.find import ConceptSource
    from erase_concept.run import Run

Progress = tuple[str, int, int]  # ("erased" or "base", images there, images in all)


def evaluate(
    model: Run | str | Path,
    concept: ConceptSource | None = None,
    *,
    out: str | Path | None = None,
    **request: Any,
) -> Report:
    """Evaluate a run, a model or a folder of images, with a progress bar.

    ``out`` is by default the run's own folder, and ``request`` the other fields of ``EvalRequest``: benchmark,
    baseline, prompts, judges, metrics, settings, guard, fail_if, first_seed, batch_size and ema. Raises RequestError
    when the request cannot be followed, and EraseError in a process that is not the main one of several: that one alone
    measures.
    """
    source = os.fspath(model)
    if out is None:
        if not (Path(source) / "run.json").is_file():
            raise RequestError("out", "(not given)", f"needed, for {source} is no run folder")
        out = source
    report = run_evaluation(EvalRequest(model=source, out=Path(out), concept=concept, **request))
    if report is None:
        raise EraseError("of several processes the main one alone has the report")
    return report


def run_evaluation(request: EvalRequest) -> Report | None:
    """Follow a request to its end with a progress bar; None in a process that is not the main one."""
    report = None
    with bar() as shown:
        task = shown.add_task("sample", total=None)
        for event in iter_evaluate(request):
            if isinstance(event, Report):
                report = event
            else:
                shown.update(task, description=f"sample {event[0]}", completed=event[1], total=event[2])
    return report


def iter_evaluate(request: EvalRequest) -> Iterator[Progress | Report]:
    """Yield the progress of the sampling and last the report, which is written to the request's ``out``.

    The images stay in ``out/samples``, and run again it makes only what is missing. A base model's images are also kept
    in the folder ``.baselines`` beside ``out``, under the hash of everything that makes them, and not sampled again.
    The model card of a run gets the result. Raises RequestError, before anything is sampled, when the request cannot be
    followed.

    Where ``accelerate launch`` or ``torchrun`` has started several processes, they share the sampling; then the main
    process measures and writes, and in the others this ends without a report.
    """
    plan = make_plan(request)
    images = yield from gather(plan)
    if not processes().is_main_process:
        return
    gathered = time.perf_counter()
    judged = judge_images(plan, images)
    report = measure(plan, images, judged)
    seconds = {"sampling": round(images.seconds, 2), "measuring": round(time.perf_counter() - gathered, 2)}
    about = {**report.provenance, "sampled": dict(images.made), "seconds": seconds}
    about |= {
        "request": told(request, plan.benchmark.name),
        "evidence": _evidence(images, save_judgements(judged, request.out)),
    }
    report = replace(report, provenance=about)
    request.out.mkdir(parents=True, exist_ok=True)
    with only_process(request.out, wait=True):  # so that its files are those of one report
        write_report(report, request.out)
        _write_card(plan, report)
    yield report


def _evidence(images: EvalImages, judgements: Path) -> dict[str, str]:
    """Return the SHA-256 of what the report's numbers are counted from, by paths from the report's folder."""
    folder = judgements.parent
    sides = [some.files[0].parent for some in (images.erased, images.base) if some is not None]
    files = [judgements, *(side / name for side in sides for name in (MANIFEST, SETTINGS))]
    return {relative(file, folder): file_sha256(file) for file in files if file.is_file()}


def _write_card(plan: EvalPlan, report: Report) -> None:
    """Write the result into the model card of the run that was evaluated."""
    from erase_concept.model_card import write_card

    info = plan.run.run_info
    if info and report.concept == info.get("concept") and report.base is not None and plan.on_target:
        first = replace(report, scores=tuple(main_scores(report)))
        write_card(Path(plan.request.model), dict(info), report_json(first)["scores"])
