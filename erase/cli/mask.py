"""``mask``: the mask that a run would use, without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, RecipeOptions, examples, grouped
from erase_concept.cli.terminal import print_json

EXAMPLES = examples(
    "erase-concept mask model.safetensors -c church -o church-mask.safetensors",
    "erase-concept mask model.safetensors -c church --sparsity 0.9 -o narrow.safetensors",
    "erase-concept erase model.safetensors -c church --mask narrow.safetensors -o runs/narrow",
)


@grouped
def mask(
    options: RecipeOptions,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The mask file to write (.safetensors).")],
    json_: JsonOption = False,
) -> None:
    """Compute the mask that 'erase' with the same options would use."""
    recipe = options.read()
    from erase_concept.masks import describe
    from erase_concept.masks.make import compute_mask
    from erase_concept.pipelines.processes import from_main

    made = compute_mask(recipe)
    from_main(lambda: made.save(out))
    if json_:
        print_json(describe(made))
    else:
        typer.echo(f"{made.count:,} of {made.total:,} weights ({made.density:.2%}) -> {out}")
