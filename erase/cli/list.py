"""``list``: what there is, one line each; and with a name, all that one of them can be set to."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from erase_concept.cli.options import JsonOption, examples
from erase_concept.cli.terminal import print_fields, print_json, print_rows
from erase_concept.errors import RequestError
from erase_concept.registry import KINDS, Registry

EXAMPLES = examples("erase-concept list methods", "erase-concept list methods salun", "erase-concept list concepts")
# Of each kind of plug-in: the record's fields that its list shows, with the column's title.
COLUMNS = {
    "methods": {"summary": "what it does", "trains": "trains", "needs": "needs", "paper": ""},
    "guards": {"summary": "what it does", "paper": ""},
    "judges": {"summary": "what it tells"},
    "metrics": {"summary": "what it measures", "about": "about", "direction": "better"},
    "attacks": {"summary": "what it does"},
    "families": {"summary": "its models"},
    "unlearners": {"summary": "what it does", "paper": ""},
}
# Further fields of one record, shown when it is asked for by name.
MORE = {
    "methods": {"title": "title", "mask": "mask", "scope": "scope", "tuned_setting": "tuned setting"},
    "unlearners": {"title": "title", "mask": "mask", "tuned_setting": "tuned setting"},
    "judges": {"title": "title"},
    "metrics": {"title": "title", "unit": "unit", "judge": "judge"},
}
# What stands before a setting's name in --set.
PREFIXES = {
    "methods": "",
    "unlearners": "",
    "guards": "guard.",
    "judges": "judge.",
    "metrics": "metric.",
    "attacks": "attack.",
}


def list_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="methods, guards, judges, metrics, attacks, families, unlearners (of classifiers), benchmarks, "
            "recipe, models, concepts, prompts.",
        ),
    ],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them: show all of its settings.")] = None,
    json_: JsonOption = False,
) -> None:
    """List what there is, one line each, or show the settings of one."""
    if what not in COLUMNS and what not in OTHERS:
        raise RequestError("what", what, f"allowed: {', '.join((*COLUMNS, *OTHERS))}")
    if name is not None:
        _show(what, name, json_)
        return
    rows = OTHERS[what]() if what in OTHERS else {key: _fields(what, one) for key, one in _registry(what).all().items()}
    if json_:
        print_json(rows)
    elif not rows:
        typer.echo(f"There are no {what} yet.")
    else:
        titles = COLUMNS.get(what, {})
        header = [titles.get(field, field) for field in next(iter(rows.values()))]
        print_rows(what, ["name", *header], [[key, *row.values()] for key, row in rows.items()])
        if what in (*COLUMNS, "benchmarks"):
            typer.echo(f"\nMore on one of them: erase-concept list {what} NAME")


def _show(what: str, name: str, json_: bool) -> None:
    """Show a record with all of its settings."""
    if what == "benchmarks":
        _show_benchmark(name, json_)
        return
    if what not in COLUMNS:
        raise RequestError(
            "name", name, f"{what} have no settings; allowed with a name: {', '.join(COLUMNS)}, benchmarks"
        )
    try:
        record = _registry(what).find(name)
    except RequestError as problem:
        raise RequestError("name", name, problem.allowed) from None
    about = _fields(what, record, *MORE.get(what, {})) | (_authors(name) if what == "methods" else {})
    settings = _settings(record.settings, PREFIXES[what]) if what in PREFIXES else []
    if json_:
        print_json({"name": name, **about, "settings": settings})
        return
    titles = COLUMNS[what] | MORE.get(what, {})
    print_fields(name, {titles.get(field) or field: value for field, value in about.items() if value})
    if not settings:
        return
    rows = [[one["name"], one["default"], one["allowed"], _told(one)] for one in settings]
    typer.echo()
    print_rows("Settings, for --set KEY=VALUE", ["key", "default", "allowed", "what it does"], rows)


def _authors(method: str) -> dict[str, str]:
    """Return what is known of the settings of a method's authors, and where ours differ from them."""
    from erase_concept.presets import authors_settings

    authors = authors_settings().get(method)
    if authors is None:
        return {}
    found = {"authors' code": authors.source, "differs from the authors": _bullets(authors.differs)}
    for preset, entries in (("paper", authors.paper), ("latest-code", authors.latest_code)):
        for kind, entry in entries.items():
            other = kind if kind != "any" else "every other kind"
            text = f"as {entry.like}" if entry.like else " ".join(entry.assignments())
            found[f"{preset}: {other}"] = text
    return found


def _bullets(sentences: tuple[str, ...]) -> str:
    return "\n".join(f"- {' '.join(sentence.split())}" for sentence in sentences)


def _show_benchmark(name: str, json_: bool) -> None:
    """Show what a benchmark asks and measures; a user's YAML file will do as well."""
    from erase_concept.eval.benchmarks import find_benchmark

    try:
        benchmark = find_benchmark(name)
    except RequestError as problem:
        raise RequestError("name", name, problem.allowed) from None
    if json_:
        print_json(asdict(benchmark))
        return
    settings = ", ".join(f"{key}={value}" for key, value in benchmark.settings.items())
    prompts = benchmark.prompts or (f"made from the catalogue {benchmark.catalog}" if benchmark.catalog else "yours")
    asks = {"all": "all prompts", "label": "prompts that bear its label", "none": "no prompt"}[benchmark.forget]
    fields = {"about": benchmark.about, "prompts": prompts, "ask for the concept": asks}
    fields |= {"judges": ", ".join(benchmark.judges), "metrics": ", ".join(benchmark.metrics), "settings": settings}
    print_fields(name, {title: text for title, text in fields.items() if text})


def _settings(cls: Any, prefix: str) -> list[dict[str, str]]:
    """Return what settings say of themselves, those that the class itself declares first."""
    from erase_concept.settings import settings_of

    own = inspect.get_annotations(cls)
    found = sorted(settings_of(cls).values(), key=lambda setting: setting.name not in own)
    return [
        {
            "name": prefix + setting.name,
            "default": json.dumps(setting.default, default=str).strip('"'),  # as it is typed: true, null, 0.5
            "allowed": setting.allowed,
            "sentence": setting.sentence,
            "source": setting.source,
        }
        for setting in found
    ]


def _told(setting: dict[str, str]) -> str:
    """Return the sentence of a setting with the source of its default."""
    return setting["sentence"] + (f" ({setting['source']})" if setting["source"] else "")


def _registry(what: str) -> Registry[Any]:
    found: Registry[Any] = getattr(importlib.import_module(KINDS[what]), what.upper())
    return found


def _fields(what: str, record: Any, *more: str) -> dict[str, str]:
    return {field: str(getattr(record, field)) for field in (*COLUMNS[what], *more)}


def _benchmarks() -> dict[str, dict[str, str]]:
    from erase_concept.eval.benchmarks import benchmarks

    return {name: {"about": benchmark.about} for name, benchmark in benchmarks().items()}


def _models() -> dict[str, dict[str, str]]:
    from erase_concept.pipelines.builtin import builtin_models

    return {name: {"about": model.about} for name, model in builtin_models().items()}


def _concepts() -> dict[str, dict[str, str]]:
    from erase_concept.prompts.catalog import catalogs

    found: dict[str, dict[str, str]] = {}
    for name, catalog in catalogs().items():
        for key, one in catalog.concepts.items():
            fields = {"kind": one.kind, "becomes": one.replacement, "prompts": str(len(one.forget_prompts))}
            found[f"{key} ({name})" if key in found else key] = fields | {"catalogue": name}
    return found


def _prompts() -> dict[str, dict[str, str]]:
    from erase_concept.prompts.find_prompts import prompt_sets

    return {name: {"prompts": str(len(s.rows)), "such as": s.rows[0].prompt} for name, s in prompt_sets().items()}


def _recipe() -> dict[str, dict[str, str]]:
    from erase_concept.recipe import DataRecipe, MaskRecipe

    found = [*_settings(MaskRecipe, "mask."), *_settings(DataRecipe, "data.")]
    return {
        one["name"]: {"default": one["default"], "allowed": one["allowed"], "what it does": _told(one)} for one in found
    }


# What is data and no plug-in.
OTHERS = {"recipe": _recipe, "benchmarks": _benchmarks, "models": _models, "concepts": _concepts, "prompts": _prompts}
