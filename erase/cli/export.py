"""``export``: a run's erased model in the form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import EmaOption, examples
from erase_concept.errors import RequestError

_HUB = "Upload"
_LORA = "LoRA"
EXAMPLES = examples(
    "erase-concept export runs/safe -f single-file -o safe.safetensors",
    "erase-concept export runs/safe -f lora --rank 64 -o safe-lora.safetensors",
    "erase-concept export runs/safe -f diffusers --dtype fp16 -o safe-fp16",
)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="The file (or folder) to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format", "-f", metavar="FORMAT", help="unet, single-file, lora, delta, or diffusers for a folder."
        ),
    ] = "unet",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="fp32, fp16 or bf16. (default: fp32, or those of the base model's single file)"
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Its rank. (default: 64)", rich_help_panel=_LORA)
    ] = None,
    lora_style: Annotated[
        str | None,
        typer.Option(
            metavar="STYLE",
            help="Its keys: kohya, or diffusers (for diffusers alone). (default: kohya)",
            rich_help_panel=_LORA,
        ),
    ] = None,
    ema: EmaOption = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload it to this repository, private by default.", rich_help_panel=_HUB
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.", rich_help_panel=_HUB)] = False,
) -> None:
    """Write a run's erased model as one file, a UNet, a LoRA, a delta or a diffusers folder, and check it."""
    from erase_concept.exports import check_hub, push
    from erase_concept.exports import export as export_run

    if public and push_to_hub is None:
        raise RequestError("public", "(given)", "goes with --push-to-hub")
    if push_to_hub is not None:
        check_hub(push_to_hub, public=public)
    done = export_run(run, out, format_, dtype=dtype, rank=rank, lora_style=lora_style, ema=ema)
    typer.echo(f"{format_} ({done.dtype}) -> {out} (read back and compared)")
    if done.surviving is not None:
        typer.echo(f"{done.surviving:.1%} of the changed weights still differ from the base model's in this dtype.")
    if done.sha256 is not None:
        typer.echo(f"SHA-256 {done.sha256} (AutoV2 {done.autov2})")
    if (fit := done.fit) is not None:
        missed = ", ".join(f"{error:.1%} at rank {rank}" for rank, error in fit.errors.items())
        typer.echo(f"Of the change, by its Frobenius norm, a LoRA misses {missed}.")
        typer.echo(f"{fit.left_out:.1%} of it is in biases and norms, which no LoRA carries.")
        found = ", ".join(f"{program} {count} of {fit.layers}" for program, count in fit.found.items())
        typer.echo(f"Layers in the file that each program finds: {found}.")
        if lora_style == "diffusers":
            typer.echo("These keys are for diffusers alone: ComfyUI, A1111 and InvokeAI drop or refuse them.")
    if push_to_hub is not None:
        typer.echo(f"Uploaded to {push(out, push_to_hub, public=public)}")
