"""``compare``: many erasures, evaluated alike."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from erase_concept.cli.options import EmaOption, JsonOption, OutOption, examples
from erase_concept.cli.terminal import print_text
from erase_concept.errors import RequestError

_TUNING = "Tuned setting of the methods"
EXAMPLES = examples(
    "erase-concept compare --methods default,esd-x,uce --concepts church,flat -o cmp",
    "erase-concept compare --methods default,esd-x --tune house,sketch -o tuned",
    "erase-concept compare --methods salun --masks salient,none --multipliers 0.5,1,2 -o masks",
)


def _list(sentence: str, **more: Any) -> Any:
    return typer.Option(metavar="LIST", help=sentence, **more)


def compare(
    out: OutOption,
    methods: Annotated[
        str, _list("Methods, presets and guards, such as 'default,esd-x\\[eta=2],safree'; or all.")
    ] = "all",
    concepts: Annotated[str, _list("Concepts to erase. (default: a built-in model's own)")] = "",
    seeds: Annotated[str, _list("Seeds; each makes a run of its own.")] = "0,1",
    masks: Annotated[
        str | None,
        _list(
            "Masks; a number after @ is a factor of the multipliers: 'salient,none,random@2'. "
            "(default: each method's own)"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model. (default: the built-in one)")
    ] = None,
    benchmark: Annotated[
        str,
        typer.Option("--benchmark", "-b", metavar="NAME|FILE", help="The benchmark. (default: a built-in model's own)"),
    ] = "",
    multipliers: Annotated[
        str,
        _list(
            "Multipliers of each method's tuned setting. With several, whole curves are compared.",
            rich_help_panel=_TUNING,
        ),
    ] = "1",
    tune: Annotated[
        str, _list("Concepts on which each method's multiplier is tuned first.", rich_help_panel=_TUNING)
    ] = "",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Multipliers tried for each method.", rich_help_panel=_TUNING)
    ] = 6,
    ema: EmaOption = None,
    json_: JsonOption = False,
) -> None:
    """Erase with many methods, masks and multipliers, and compare forgetting, retention, time and memory."""
    from erase_concept.eval.compare.compare import compare as run
    from erase_concept.eval.compare.comparison import CompareRequest
    from erase_concept.pipelines.builtin import builtin_models

    run(
        CompareRequest(
            model or next(iter(builtin_models())),
            methods=_every_method() if methods == "all" else split_methods(methods),
            out=out,
            concepts=_words(concepts),
            benchmark=benchmark,
            seeds=tuple(int(number) for number in _numbers("seeds", seeds, whole=True)),
            masks=_words(masks) if masks else (None,),
            multipliers=tuple(_numbers("multipliers", multipliers)),
            tune_on=_words(tune),
            tuning_steps=trials,
            ema=ema,
        )
    )
    print_text((out / ("comparison.json" if json_ else "comparison.md")).read_text(encoding="utf-8"))


def _every_method() -> tuple[str, ...]:
    from erase_concept.eval.compare.trials import PRESETS
    from erase_concept.methods import METHODS
    from erase_concept.pipelines.guards import GUARDS

    return (*PRESETS, *METHODS.all(), *GUARDS.all())


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(setting: str, text: str, *, whole: bool = False) -> list[float]:
    """Read numbers with commas between them, of at least 0."""
    try:
        found = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < float("inf") for number in found):
        raise RequestError(setting, text, f"must be {'whole ' * whole}numbers of at least 0 with commas between them")
    return found


def split_methods(text: str) -> tuple[str, ...]:
    """Split at the commas outside of brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())
