"""``eval``: is the concept gone, and is everything else still there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erase_concept.cli.options import (
    SAMPLING,
    BatchOption,
    EmaOption,
    GuardOption,
    JsonOption,
    OutOption,
    SchedulerOption,
    assigned,
    examples,
    grouped,
)
from erase_concept.cli.terminal import print_dropped, print_note, print_report

if TYPE_CHECKING:
    from erase_concept.eval.request import EvalRequest

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
            help="See 'list benchmarks', or a YAML file. (default: the one for the model or the kind of concept)",
        ),
    ] = None
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="CONCEPT",
            help="What was erased, or a label of the prompts. Repeat it. (default: the run's)",
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
            help="judge.KEY ('list judges NAME'), metric.KEY or guard.KEY. Repeat it.",
        ),
    ] = None
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="EXPR",
            help='Exit with 1 if it is true, such as "ua<0.95" or "retained_ira<0.98". Repeat it.',
        ),
    ] = None
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Instead of the benchmark's ('list judges'), such as torchvision:resnet50. Repeat it.",
            rich_help_panel=_JUDGING,
        ),
    ] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Instead of the benchmark's ('list metrics'). Repeat it.", rich_help_panel=_JUDGING
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
    ema: EmaOption = None

    def request(self, model: str, out: Path) -> EvalRequest:
        """Return what is asked for, of a model and a folder to write to."""
        from erase_concept.eval.request import EvalRequest

        names = ("category", "limit", "seeds", "steps", "guidance", "scheduler")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parts = assigned(self.set, "judge", "metric", "guard")
        given |= {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        if self.reference is not None:
            given["metric.reference"] = str(self.reference)
        concept = self.concept[0] if self.concept and len(self.concept) == 1 else self.concept
        return EvalRequest(
            model=model,
            out=out,
            concept=concept,
            benchmark=self.benchmark,
            baseline=self.baseline,
            prompts=self.prompts,
            judges=tuple(self.judge or ()),
            metrics=tuple(self.metric or ()),
            settings=given,
            guard=self.guard,
            fail_if=tuple(self.fail_if or ()),
            batch_size=self.batch_size,
            ema=self.ema,
        )


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
    from erase_concept.eval.evaluate import run_evaluation
    from erase_concept.eval.report.verdict import main_scores
    from erase_concept.prompts.minors import DROPPED

    report = run_evaluation(options.request(model, out))
    if report is None:
        return
    shown = report if json_ else replace(report, scores=tuple(main_scores(report)))
    print_report(shown, out, json_)
    print_dropped(report.provenance["prompts"].get(DROPPED, 0))
    for who, notes in report.provenance.get("notes", {}).items():
        for note in notes:
            print_note(f"{who}: {note}")
    missing = report.provenance.get("not measured", {})
    for reason in dict.fromkeys(missing.values()):  # a judge that is not there is said once, with all that needs it
        metrics = ", ".join(metric for metric, why in missing.items() if why == reason)
        print_note(f"{metrics} not measured: {reason}")
    failed = [line for line in report.provenance.get("thresholds", {}).values() if line != "passed"]
    for line in failed:
        print_note(f"--fail-if {line}")
    if failed:
        raise typer.Exit(1)
