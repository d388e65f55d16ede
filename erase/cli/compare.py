"""``compare``: many erasures, evaluated alike."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, OutOption, examples
from erase_concept.errors import RequestError
from erase_concept.pipelines.progress import bar

_SEARCH = "Strength of the methods"
EXAMPLES = examples(
    "erase-concept compare --methods default,esd-x,uce --concepts church,flat -o cmp",
    "erase-concept compare --methods default,esd-x --tune house,sketch -o tuned",
    "erase-concept compare --methods salun --masks salient,none --strengths 0.5,1,2 -o masks",
)


def compare(
    out: OutOption,
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Methods, presets and guards, such as 'default,esd-x\\[eta=2],safree'; or all."
        ),
    ] = "all",
    concepts: Annotated[
        str, typer.Option(metavar="LIST", help="Concepts to erase.")
    ] = "church,dog,parachute,guitar,truck,flat,3d",
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds; each makes a run of its own.")] = "0,1",
    masks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Masks; a number after @ multiplies the method's strength: 'salient,none,random@2'. "
            "(default: each method's own)",
        ),
    ] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The base model.")] = "emojinette",
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", metavar="NAME|FILE", help="The benchmark that gives UA, IRA and CRA.")
    ] = "emojinette",
    strengths: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Factors of each method's strength. With several, whole curves are compared.",
            rich_help_panel=_SEARCH,
        ),
    ] = "1",
    tune: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Concepts on which each method's strength is tuned first.", rich_help_panel=_SEARCH
        ),
    ] = "",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tuning trials per method.", rich_help_panel=_SEARCH)
    ] = 6,
    json_: JsonOption = False,
) -> None:
    """Erase with many methods, masks and strengths, and compare forgetting, retention, time and memory."""
    from erase_concept.eval.compare.compare import compare as run
    from erase_concept.eval.compare.trials import PRESETS
    from erase_concept.methods import METHODS
    from erase_concept.pipelines.guards import GUARDS

    entries = [*PRESETS, *METHODS.all(), *GUARDS.all()] if methods == "all" else split_entries(methods)
    seed_numbers = [int(number) for number in _numbers("seeds", seeds, whole=True)]
    strength_numbers = _numbers("strengths", strengths)
    with bar() as shown:
        task = shown.add_task("compare", total=None)
        for what, done, total in run(
            model,
            entries,
            _words(concepts),
            seed_numbers,
            out,
            masks=_words(masks) if masks else (None,),
            strengths=strength_numbers,
            tune_on=_words(tune),
            trials=trials,
            benchmark=benchmark,
        ):
            shown.update(task, description=what, completed=done, total=total)
    typer.echo((out / ("comparison.json" if json_ else "comparison.md")).read_text(encoding="utf-8"), nl=False)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(setting: str, text: str, *, whole: bool = False) -> list[float]:
    """Read numbers with commas between them, of at least 0."""
    try:
        found = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < float("inf") for number in found):
        raise RequestError(setting, text, f"must be {'whole ' * whole}numbers of at least 0 with commas between them")
    return found


def split_entries(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
