"""``erase``: a run folder with the erased pipeline in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erase_concept.cli.options import JsonOption, OutOption, RecipeOptions, examples, grouped
from erase_concept.cli.terminal import print_json, print_plan
from erase_concept.pipelines.progress import bar

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

EXAMPLES = examples(
    "erase-concept erase model.safetensors -c church -o runs/church",
    "erase-concept erase model.safetensors -c nudity -o runs/safe --dry-run",
    "erase-concept erase model.safetensors -c 'blue rocket' -m esd-x -o runs/rocket",
    "erase-concept erase model.safetensors -c dog -s lr=1e-5 -s mask.sparsity=0.3 -o runs/dog",
)


@grouped
def erase(
    options: RecipeOptions,
    out: OutOption,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print the plan, its memory and its time."),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Erase concepts from a model. The run folder holds the erased pipeline; the same command resumes a killed run."""
    from erase_concept.run import check, read_run

    recipe = options.read()
    if dry_run:
        check(recipe)
        print_plan(recipe, out, json_)
        return
    run(recipe, out)
    account = read_run(out)
    if json_:
        print_json(account)
        return
    checks, mask = account["checks"], account["mask"]
    density = "" if mask is None else f" The mask holds {mask['density']:.1%} of the weights."
    typer.echo(
        f"{recipe.concept.name} erased: {checks['changed']:,} of {checks['weights']:,} weights changed, "
        f"{checks['changed_outside_mask']} outside the mask.{density}\nPipeline: {out / 'pipeline'}"
    )


def run(recipe: Recipe, out: Path) -> None:
    """Run the recipe with a progress bar on stderr."""
    from erase_concept.run import erase as iter_erase
    from erase_concept.training.loop import Record, TargetProgress

    with bar() as shown:
        task = shown.add_task("start", total=None)
        for event in iter_erase(recipe, out):
            if isinstance(event, Record | TargetProgress):
                text = f"erase  loss {event.loss:.4f}" if isinstance(event, Record) else "targets of the base model"
                shown.update(task, description=text, completed=event.step, total=event.steps)
            else:
                shown.update(task, description=event, completed=0, total=None)
