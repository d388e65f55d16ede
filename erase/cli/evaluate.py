"""``eval``: is the concept gone, and is everything else still there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erase_concept.cli.options import (
    SAMPLING,
    BatchOption,
    GuardOption,
    JsonOption,
    OutOption,
    SchedulerOption,
    assigned,
    examples,
    grouped,
)
from erase_concept.cli.terminal import print_report
from erase_concept.pipelines.progress import bar

if TYPE_CHECKING:
    from erase_concept.eval.report.report import Report
    from erase_concept.prompts.concept import Concept

_PROMPTS = "Prompts"
_JUDGING = "Judging"
EXAMPLES = examples(
    "erase-concept eval runs/church -o runs/church",
    "erase-concept eval runs/safe -b i2p --limit 200 -s judge.threshold=0.5 -o runs/safe/i2p",
    "erase-concept eval images -b i2p -p i2p.csv --baseline base-images -o out",
    "erase-concept eval runs/safe -b own.yaml --fail-if 'nudity_ratio>0.1' -o out",
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options that choose prompts, judges and settings of an evaluation."""

    benchmark: Annotated[
        str | None,
        typer.Option(
            "--benchmark",
            "-b",
            metavar="NAME|FILE",
            help="See 'list benchmarks', or a YAML file. (default: the built-in model's)",
        ),
    ] = None
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="CONCEPT",
            help="What was erased, or a label of the prompts. Repeat it for several. (default: the run's)",
        ),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|DIR", help="The base model or its images, for comparison. (default: the run's base)"
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="judge.KEY ('list judges NAME') or metric.KEY ('list metrics NAME'). Repeat it for several.",
        ),
    ] = None
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="EXPR",
            help='Exit with 1 if it is true, such as "ua<0.95" or "retained_ira<0.98". Repeat it for several.',
        ),
    ] = None
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Such as efficientnet-lite2, torchvision:resnet50, timm:NAME or hf:NAME.",
            rich_help_panel=_JUDGING,
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Real images to measure distances to.", rich_help_panel=_JUDGING),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            "-p",
            metavar="SET",
            help="A CSV file, a known set ('list prompts') or hub:OWNER/NAME. (default: the benchmark's)",
            rich_help_panel=_PROMPTS,
        ),
    ] = None
    category: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only prompts of this category.", rich_help_panel=_PROMPTS)
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="At most N prompts, shared evenly by the labels.", rich_help_panel=_PROMPTS
        ),
    ] = None
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Images per prompt, each with its own seed. (default: 1)", rich_help_panel=_PROMPTS
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sampling steps. (default: the benchmark's)", rich_help_panel=SAMPLING),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SCALE",
            help="Guidance scale of prompts that name none. (default: the benchmark's)",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    scheduler: SchedulerOption = None
    guard: GuardOption = None
    batch_size: BatchOption = 16

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given."""
        names = ("category", "limit", "classifier", "reference", "steps", "guidance", "scheduler")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parts = assigned(self.set, "judge", "metric")
        return given | parts["judge"] | parts["metric"]


@grouped
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|DIR", help="A run folder, any other model, or a folder of images.")
    ],
    out: OutOption,
    options: EvalOptions,
    json_: JsonOption = False,
) -> None:
    """Measure whether the concept is gone and what else was lost, beside the base model, and write the report."""
    from erase_concept.eval.report.verdict import main_scores
    from erase_concept.pipelines.builtin import builtin_models
    from erase_concept.recipe import find_concept

    concept = options.concept
    report = run(
        model,
        concept[0] if concept and len(concept) == 1 else find_concept(concept, model) if concept else None,
        options.baseline,
        out=out,
        name=options.benchmark or next(iter(builtin_models().values())).benchmark,
        prompts=options.prompts,
        settings=options.settings(),
        guard=options.guard,
        fail_if=options.fail_if or (),
        seeds=options.seeds,
        batch_size=options.batch_size,
    )
    if report is None:
        return
    shown = report if json_ else replace(report, scores=tuple(main_scores(report)))
    print_report(shown, out, json_)
    for who, notes in report.provenance.get("notes", {}).items():
        for note in notes:
            print(f"erase-concept: {who}: {note}", file=sys.stderr)
    for metric, reason in report.provenance.get("not measured", {}).items():
        print(f"erase-concept: {metric} not measured: {reason}", file=sys.stderr)
    failed = [line for line in report.provenance.get("gates", {}).values() if line != "passed"]
    for line in failed:
        print(f"erase-concept: {line}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def run(
    model: str, concept: str | Concept | None = None, baseline: str | None = None, *, out: Path, **options: Any
) -> Report | None:
    """Sample and measure a model and its base, and write the report to ``out``; a run's model card gets the result.

    Of several processes only the main one measures; the others return None.
    """
    from erase_concept.eval.benchmark import benchmark
    from erase_concept.eval.report.report import Report

    result = None
    with bar() as shown:
        task = shown.add_task("sample", total=None)
        for event in benchmark(model, concept, baseline, out=out, **options):
            if isinstance(event, Report):
                result = event
            else:
                shown.update(task, description=f"sample {event[0]}", completed=event[1], total=event[2])
    if result is not None and (Path(model) / "run.json").is_file():
        from erase_concept.card import write_card
        from erase_concept.eval.report.verdict import main_scores
        from erase_concept.eval.report.write import report_json
        from erase_concept.run import read_run

        account = read_run(Path(model))
        if result.concept == account["concept"] and result.base is not None:
            first = replace(result, scores=tuple(main_scores(result)))
            write_card(Path(model), account, report_json(first)["scores"])
    return result
