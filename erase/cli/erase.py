"""``erase``: a run folder with the erased pipeline in it."""

from __future__ import annotations

from erase_concept.cli.options import (
    JsonOption,
    OutOption,
    PlanOptions,
    RecipeOptions,
    examples,
    grouped,
)
from erase_concept.cli.terminal import print_json, print_note, print_plan, print_text

EXAMPLES = examples(
    "erase-concept erase model.safetensors -c church -o runs/church",
    "erase-concept erase model.safetensors -c nudity -o runs/safe --dry-run --card 'RTX 4090'",
    "erase-concept erase model.safetensors -c 'style:Vincent van Gogh' -m esd-x -o runs/style",
    "erase-concept erase model.safetensors -c dog -s lr=1e-5 -s mask.sparsity=0.3 -o runs/dog",
)


@grouped
def erase(
    options: RecipeOptions,
    out: OutOption,
    plan: PlanOptions,
    json_: JsonOption = False,
) -> None:
    """Erase concepts from a model. The run folder holds the erased pipeline; the same command resumes a killed run."""
    from erase_concept.dry_run import expect
    from erase_concept.run import check, run_recipe
    from erase_concept.run_folder import complete

    planned = plan.asked()
    recipe = options.read()
    if planned:
        check(recipe)
        print_plan(recipe, out, expect(recipe, plan.card), json_)
        return
    before = complete(out)
    run_info = run_recipe(recipe, out).run_info
    print_note(f"{out} was complete already: nothing was done" * before)
    if json_:
        print_json(run_info)
        return
    checks, mask = run_info["checks"], run_info["mask"]
    density = "" if mask is None else f" The mask holds {mask['density']:.1%} of the weights."
    print_text(
        f"{recipe.concept.name} erased: {checks['changed']:,} of {checks['weights']:,} weights changed, "
        f"{checks['changed_outside_mask']} outside the mask.{density}\nPipeline: {out / 'pipeline'}\n"
    )
