"""``apply``: a delta brought onto a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import EmaOption, ModelArgument, examples

EXAMPLES = examples(
    "erase-concept export runs/church -f delta -o church.safetensors",
    "erase-concept apply church.safetensors model.safetensors -o erased",
    "erase-concept apply church.safetensors erased --revert -o base",
)


def apply(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A file that 'export --format delta' wrote.")],
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The diffusers folder to write.")],
    revert: Annotated[bool, typer.Option("--revert", help="MODEL is the erased one: give the base back.")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="MODEL is another one of the same shapes: add the same change to it.")
    ] = False,
    ema: EmaOption = None,
) -> None:
    """Turn a base model into the erased one by a delta, bit for bit, or back again."""
    from erase_concept.exports import check_out
    from erase_concept.model_card import delta_card
    from erase_concept.pipelines.formats.delta import apply_delta, open_delta
    from erase_concept.pipelines.formats.folder import save_pipeline
    from erase_concept.pipelines.load import load

    opened = open_delta(delta)
    check_out(out, Path(model), Path(model) / "pipeline")
    loaded = load(model, dtype=opened.dtype, ema=ema)
    apply_delta(opened, loaded.unet, revert=revert, transfer=transfer)
    save_pipeline(loaded, out, delta_card(opened, model, revert=revert, transfer=transfer))
    what = "base" if revert else "erased"
    checked = (
        "not the delta's own base model; measure whether the concept is gone" if transfer else "checked bit for bit"
    )
    typer.echo(f"{what} model -> {out} ({checked})")
