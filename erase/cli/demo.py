"""``demo``: the built-in model, erased, measured and reported, in a minute or two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, RecipeOptions, SeedOption, examples
from erase_concept.cli.terminal import print_report

EXAMPLES = examples("erase-concept demo", "erase-concept demo --concept dog --out runs/dog")


def demo(
    concept: Annotated[
        str | None,
        typer.Option("--concept", "-c", metavar="CONCEPT", help="An object or style of the model. (default: church)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Run folder. (default: runs/demo-CONCEPT)")
    ] = None,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Erase a concept from the built-in model, measure base and erased model, and write the report."""
    from erase_concept.eval.choose import check_measurable
    from erase_concept.eval.evaluate import run_evaluation
    from erase_concept.eval.request import EvalRequest
    from erase_concept.pipelines.builtin import builtin_models
    from erase_concept.run import run_recipe

    model = next(iter(builtin_models().values()))
    recipe = RecipeOptions(model=model.name, concept=[concept or model.demo], seed=seed).read()
    check_measurable(recipe.concept, model.benchmark)
    out = out or Path("runs") / f"demo-{recipe.concept.name}"
    run_recipe(recipe, out)
    report = run_evaluation(EvalRequest(model=str(out), out=out))
    if report is not None:
        print_report(report, out, json_)
