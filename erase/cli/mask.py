"""``mask``: the mask that a run would use, without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, RecipeOptions, examples, grouped
from erase_concept.cli.terminal import print_json
from erase_concept.errors import RequestError

EXAMPLES = examples(
    "erase-concept mask model.safetensors -c church -o church-mask.safetensors",
    "erase-concept mask model.safetensors -c church --sparsity 0.9 -o narrow.safetensors",
    "erase-concept erase model.safetensors -c church --mask narrow.safetensors -o runs/narrow",
)
KINDS = ("salient", "random", "least-salient")


@grouped
def mask(
    options: RecipeOptions,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The mask file to write (.safetensors).")],
    json_: JsonOption = False,
) -> None:
    """Compute the mask that 'erase' with the same options would use."""
    recipe = options.read()
    if recipe.mask.kind not in KINDS:
        raise RequestError("mask.kind", recipe.mask.kind, f"nothing to compute; allowed: {', '.join(KINDS)}")
    from erase_concept.masks.mask import describe
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.run import check_scope, make_data_for, make_mask

    check_scope(recipe)
    loaded = load(recipe.model, ema=recipe.ema)
    made = make_mask(recipe, loaded, make_data_for(recipe, loaded), weights_hash(loaded.unet))
    made.save(out)
    if json_:
        print_json(describe(made))
    else:
        typer.echo(f"{made.count:,} of {made.total:,} weights ({made.density:.2%}) -> {out}")
