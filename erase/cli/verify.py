"""``verify``: check a run, an export or a certificate, and certify what holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import EmaOption, JsonOption, examples
from erase_concept.cli.terminal import print_json, print_table
from erase_concept.errors import RequestError, one_line

_SIGNING = "Signing"
EXAMPLES = examples(
    "erase-concept verify runs/safe --base sd15.safetensors",
    "erase-concept verify runs/safe --base sd15.safetensors --recheck 100% --sign key.pem",
    "erase-concept verify safe.safetensors --base sd15.safetensors",
    "erase-concept verify runs/safe/certificate.json --public-key public.pem",
)


def verify(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|EXPORT|CERTIFICATE", help="A run folder, an export, or a certificate.json.")
    ],
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The base model; a certificate needs none.")] = None,
    export: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="An export that is neither in, nor beside the run, nor here. Repeat it."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder with a report that is not in the run's. Repeat it."),
    ] = None,
    recheck: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of the images that are judged anew, such as 5% or 1.")
    ] = "5%",
    ema: EmaOption = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY.pem", help="Sign the certificate with an Ed25519 key.", rich_help_panel=_SIGNING),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="KEY.pem", help="Check the certificate's signature.", rich_help_panel=_SIGNING),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Check that only masked weights changed, that exports match and that scores follow, and write a certificate."""
    from dataclasses import asdict

    from erase_concept.eval.verify.verify import verify as run

    done = run(
        model,
        base=base,
        exports=tuple(export or ()),
        reports=tuple(report or ()),
        recheck=_share(recheck),
        ema=ema,
        sign=sign,
        public_key=public_key,
    )
    if json_:
        certificate = None if done.certificate is None else str(done.certificate)
        print_json({"holds": done.holds, "certificate": certificate, "checks": [asdict(one) for one in done.checks]})
    else:
        words = {True: "yes", False: "NO", None: "not checked"}
        rows = [[one.what, words[one.holds], one.found] for one in done.checks]
        print_table("verified", ["what", "holds", "found"], rows)
        for one in done.checks:
            if one.holds is False:
                typer.echo(one_line(f"Does not hold: {one.file}: {one.found}"))
        if done.certificate is not None:
            typer.echo(f"Certificate: {done.certificate}")
    if not done.holds:
        raise typer.Exit(1)


def _share(text: str) -> float:
    """Read 5% or 0.05; raises RequestError for anything else."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise RequestError("recheck", text, "a share such as 5% or 0.05") from None
