"""``concept``: what would be forgotten, what it becomes and what is retained, as YAML."""

from __future__ import annotations

from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, examples
from erase_concept.cli.terminal import print_json, print_text, print_yaml

EXAMPLES = examples(
    "erase-concept concept 'style:Vincent van Gogh'",
    "erase-concept concept nudity --method salun --preset paper",
    "erase-concept concept 'person:Ada Lovelace' > ada.yaml",
    "erase-concept erase model.safetensors -c ada.yaml -o runs/ada",
)
# The order in which a description is read.
_ORDER = ("key", "name", "kind", "synonyms", "images", "prompts", "templates", "anchor", "anchor_templates", "retain")
_PAIRS = 8


def concept(
    names: Annotated[list[str], typer.Argument(metavar="CONCEPT...", help="As --concept of 'erase' takes it.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The model to erase from. (default: any that is not built in)")
    ] = "",
    method: Annotated[str | None, typer.Option("--method", "-m", metavar="NAME", help="See 'list methods'.")] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="default, paper or latest-code; the last two have authors' prompts.")
    ] = "default",
    json_: JsonOption = False,
) -> None:
    """Print a concept: what is forgotten, what it becomes and what is retained. Edit it, and hand it to --concept."""
    from erase_concept.methods import METHODS
    from erase_concept.prompts.kinds import evaluation_prompts
    from erase_concept.recipe import concept_for

    if method is not None:
        METHODS.find(method)
    found, _ = concept_for(model, names[0] if len(names) == 1 else names, preset, method)
    told = found.to_dict()
    told = {key: told[key] for key in (*_ORDER, *told) if key in told}
    if json_:
        print_json(told)
        return
    pairs = list(zip(found.forget_prompts, found.anchor_prompts, strict=True))
    lines = [
        "What is forgotten, and what it becomes:",
        *(f"  {old} -> {new or '(empty)'}" for old, new in pairs[:_PAIRS]),
    ]
    lines += [f"  and {len(pairs) - _PAIRS} more"] * (len(pairs) > _PAIRS)
    lines.append(f"Prompts that are retained: {len(found.retain_prompts)}")
    if asked := evaluation_prompts(found):
        lines += ["To evaluate with, in other words:", *(f"  {prompt}" for prompt in asked[:_PAIRS])]
    print_text("".join(f"# {line}\n" for text in lines for line in text.splitlines()))
    print_yaml(told, width=10_000)
