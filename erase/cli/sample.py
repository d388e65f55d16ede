"""``sample``: images of a prompt set."""

from __future__ import annotations

from typing import Annotated

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
from erase_concept.cli.terminal import print_dropped, print_json
from erase_concept.errors import RequestError
from erase_concept.pipelines.progress import progress

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
    from erase_concept.pipelines.guards import find_guard
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.processes import total
    from erase_concept.pipelines.sample import Sampling, cut_note, iter_sample
    from erase_concept.prompts.find_prompts import find_prompts
    from erase_concept.recipe import find_concept

    given = assigned(set_, "guard")["guard"]
    if (guard is None) != (concept is None):
        alone = ("guard", guard) if concept is None else ("concept", concept)
        raise RequestError(*alone, "--guard and --concept go together")
    if given and guard is None:
        raise RequestError(f"guard.{min(given)}", given[min(given)], "goes with --guard")
    guarded = None if guard is None or concept is None else find_guard(guard, find_concept(concept, model), given)
    found = find_prompts(prompts)
    print_dropped(len(found.dropped))
    sampling = Sampling(steps=steps, guidance=guidance, batch_size=batch_size, scheduler=scheduler, guard=guarded)
    loaded = load(model, ema=ema is not False)
    if cut := loaded.cut_prompts([row.prompt for row in found.rows]):
        typer.echo(cut_note(cut, loaded), err=True)
    made = iter_sample(loaded, found, out, sampling)
    count = total(sum(1 for _ in progress(made, f"sampling {found.name}", len(found.rows))))
    if json_:
        print_json({"out": str(out), "images": len(found.rows), "made": count, "dropped": len(found.dropped)})
    else:
        typer.echo(f"{len(found.rows)} images in {out}, {count} of them new")
