"""``sample``: images of a prompt set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from erase_concept.cli.options import (
    SAMPLING,
    BatchOption,
    EmaOption,
    GuardOption,
    JsonOption,
    ModelArgument,
    OutOption,
    SchedulerOption,
    assigned,
    examples,
)
from erase_concept.cli.terminal import print_dropped, print_json, print_note
from erase_concept.errors import RequestError
from erase_concept.pipelines.progress import progress

if TYPE_CHECKING:
    from erase_concept.pipelines.guards.guard import AppliedGuard

EXAMPLES = examples(
    "erase-concept sample runs/church -p prompts.csv -o images",
    "erase-concept sample model.safetensors -p nudity --guard sld-max -c nudity -o images",
)


def sample(
    model: ModelArgument,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", "-p", metavar="SET", help="A CSV file, a known set ('list prompts') or hub:OWNER/NAME."
        ),
    ],
    out: OutOption,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Sampling steps.", rich_help_panel=SAMPLING)] = 25,
    guidance: Annotated[
        float,
        typer.Option(
            min=0, metavar="SCALE", help="Guidance scale of prompts that name none.", rich_help_panel=SAMPLING
        ),
    ] = 7.5,
    scheduler: SchedulerOption = None,
    guard: GuardOption = None,
    concept: Annotated[
        str | None,
        typer.Option("--concept", "-c", metavar="CONCEPT", help="What the guard keeps out.", rich_help_panel=SAMPLING),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="guard.KEY ('list guards NAME'). Repeat it.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch_size: BatchOption = 16,
    ema: EmaOption = None,
    json_: JsonOption = False,
) -> None:
    """Sample images for a prompt set. Run again, it makes only the missing ones."""
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.processes import total
    from erase_concept.pipelines.sample import Sampling, cut_note, iter_sample
    from erase_concept.prompts.find_prompts import find_prompts

    guarded = _guard(guard, concept, model, set_)
    found = find_prompts(prompts)
    loaded = load(model, ema=ema)
    print_dropped(len(found.dropped))
    print_note(cut_note(loaded, [row.prompt for row in found.rows]))
    sampling = Sampling(steps=steps, guidance=guidance, batch_size=batch_size, scheduler=scheduler, guard=guarded)
    made = iter_sample(loaded, found, out, sampling)
    count = total(sum(1 for _ in progress(made, f"sampling {found.name}", len(found.rows))))
    if json_:
        told = {"out": str(out), "images": len(found.rows), "made": count, "dropped": len(found.dropped)}
        print_json(told | ({"weights": loaded.taken} if loaded.taken else {}))
    else:
        typer.echo(f"{len(found.rows)} images in {out}, {count} of them new")


def _guard(guard: str | None, concept: str | None, model: str, set_: list[str] | None) -> AppliedGuard | None:
    """Return the guard that is asked for, with its settings, or None; raises RequestError for half of a request."""
    from erase_concept.pipelines.guards import find_guard
    from erase_concept.recipe import find_concept

    given = assigned(set_, "guard")["guard"]
    if given and guard is None:
        raise RequestError(f"guard.{min(given)}", given[min(given)], "goes with --guard")
    if guard is None and concept is None:
        return None
    if guard is None or concept is None:
        alone = ("guard", guard) if concept is None else ("concept", concept)
        raise RequestError(*alone, "--guard and --concept go together")
    return find_guard(guard, find_concept(concept, model), given)
