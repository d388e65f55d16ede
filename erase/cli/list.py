"""``list``: what there is, one line each, and all settings of one."""

from __future__ import annotations

from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, examples
from erase_concept.cli.terminal import print_json, print_table
from erase_concept.errors import RequestError

EXAMPLES = examples("erase-concept list methods", "erase-concept list concepts --json")


def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="models, concepts, methods, guards, metrics, benchmarks or prompts."),
    ],
    json_: JsonOption = False,
) -> None:
    """List what there is, with a line on each."""
    listing = _LISTINGS.get(what)
    if listing is None:
        raise RequestError("WHAT", what, f"allowed: {', '.join(_LISTINGS)}")
    found = listing()
    if json_:
        print_json(found)
    else:
        print_table(what, ["name", ""], [[name, about] for name, about in found.items()])


def _list_models() -> dict[str, str]:
    from erase_concept.pipelines.builtin import builtin_models

    return {name: model.about for name, model in builtin_models().items()}


def _list_concepts() -> dict[str, str]:
    from erase_concept.prompts.catalog import catalogs

    found = {key: one for catalog in catalogs().values() for key, one in catalog.concepts.items()}
    return {key: f"{c.kind}, becomes {c.anchor}, {len(c.forget_prompts)} prompts" for key, c in found.items()}


def _list_methods() -> dict[str, str]:
    from erase_concept.methods import METHODS
    from erase_concept.training.loop import Training

    shared = Training.__dataclass_fields__
    found = {}
    for name, method in METHODS.all().items():
        own = [field for field in method.settings.__dataclass_fields__ if field not in shared]
        told = [*own, *(["those of every training"] if issubclass(method.settings, Training) else [])]
        where = f"Mask {method.mask}, scope {method.scope}. " if (method.mask, method.scope) != ("none", "full") else ""
        found[name] = f"{method.summary} {where}Settings: {', '.join(told)}"
    return found


def _list_guards() -> dict[str, str]:
    from erase_concept.pipelines.guards import GUARDS

    return {name: f"{guard.summary} {guard.paper}".strip() for name, guard in GUARDS.all().items()}


def _list_metrics() -> dict[str, str]:
    from erase_concept.eval.emojinette_benchmark import METRICS
    from erase_concept.eval.measuring import GROUPS

    own = {name: (m.__doc__ or "").strip().splitlines()[0] for name, m in METRICS.items()}
    groups = {f"{name}: {', '.join(group.gives)}": group.about for name, group in GROUPS.items()}
    return {f"emojinette: {name}": about for name, about in own.items()} | groups


def _list_benchmarks() -> dict[str, str]:
    from erase_concept.eval.benchmark import BENCHMARKS

    return {name: benchmark.about for name, benchmark in BENCHMARKS.items()}


def _list_prompts() -> dict[str, str]:
    from erase_concept.prompts.find_prompts import prompt_sets

    return {name: f"{len(s.rows)} prompts, such as {s.rows[0].prompt!r}" for name, s in prompt_sets().items()}


_LISTINGS = {
    "models": _list_models,
    "concepts": _list_concepts,
    "methods": _list_methods,
    "guards": _list_guards,
    "metrics": _list_metrics,
    "benchmarks": _list_benchmarks,
    "prompts": _list_prompts,
}
