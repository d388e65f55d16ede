"""Options that several commands share: each is declared once, and groups of them travel as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from erase_concept.errors import RequestError

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

# Panels of the help: what does not stand in one of these stands in "Options", which comes first.
CONCEPT = "The concept"
WEIGHTS = "Which weights may change"
IMAGES = "Training images"
SETTINGS = "Settings"
SAMPLING = "Sampling"

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Built-in name, diffusers folder, checkpoint file, run folder or hub id."),
]
ConceptsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        "-c",
        metavar="CONCEPT",
        help="A known concept ('list concepts'), KIND:NAME (object, style, artist, technique, person, character, "
        "brand, unsafe), KIND:FOLDER of images, a YAML file, or prompts (.csv, .txt). Repeat it to erase several "
        "together.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
MaskOption = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="KIND|FILE",
        help="salient, none, random, least-salient, or a mask file. (default: the method's)",
        rich_help_panel=WEIGHTS,
    ),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of the weights that stay frozen. (default: 0.5)", rich_help_panel=WEIGHTS
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A recipe in YAML, such as a run's recipe.yaml; other options overrule it.",
        rich_help_panel=SETTINGS,
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only print the plan, its memory and its time.")]
CardOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help='With --dry-run: plan for this graphics card, such as "RTX 4090".'),
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Seed of the whole run. (default: 0)")]
EmaOption = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="From a single file that holds both: the averaged or the live weights of the UNet. "
        "(default: the averaged, where both are nearly alike)",
        rich_help_panel=SETTINGS,
        show_default=False,
    ),
]
GuardOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Sample with a guard ('list guards'), which changes no weights.", rich_help_panel=SAMPLING
    ),
]
BatchOption = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Images sampled together; never changes them.", rich_help_panel=SAMPLING),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="A scheduler of diffusers, such as DDIMScheduler. (default: DPM-Solver++ 2M)",
        rich_help_panel=SAMPLING,
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options that ask for the plan of a run in its place."""

    dry_run: DryRunOption = False
    card: CardOption = None

    def asked(self) -> bool:
        """Tell whether the plan is asked for; raises RequestError for a card without it."""
        if self.card is not None and not self.dry_run:
            raise RequestError("card", self.card, "goes with --dry-run")
        return self.dry_run


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options that make a recipe: a preset, the recipe file laid over it, and the command line over both."""

    model: ModelArgument
    concept: ConceptsOption = None
    method: Annotated[
        str | None, typer.Option("--method", "-m", metavar="NAME", help="See 'list methods'. (default: the preset's)")
    ] = None
    anchor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the concept becomes; '' is the empty prompt.", rich_help_panel=CONCEPT),
    ] = None
    retain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What is retained in the concept's sentences. Repeat it.", rich_help_panel=CONCEPT
        ),
    ] = None
    templates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SENTENCE",
            help="A sentence to erase in: {o} is the concept with its article, {O} without. Repeat it.",
            rich_help_panel=CONCEPT,
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="A setting of the method ('list methods NAME'), mask.KEY or data.KEY ('list recipe'). Repeat it.",
        ),
    ] = None
    seed: SeedOption = None
    mask: MaskOption = None
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="full, cross-attention, keys-and-values (of cross-attention), self-attention, attention, "
            "non-cross-attention or noxattn; for Concept Ablation also text-encoder. (default: the method's)",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    sparsity: SparsityOption = None
    forget_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images of the concept.", rich_help_panel=IMAGES)
    ] = None
    retain_images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Images of what must stay, in a folder for each name.", rich_help_panel=IMAGES
        ),
    ] = None
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Settings to start from: default; paper for the authors' settings and prompts; latest-code for those "
            "of their code since then.",
            rich_help_panel=SETTINGS,
        ),
    ] = "default"
    recipe: RecipeOption = None
    memory: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help="fast, balanced or low: less memory takes more time.", rich_help_panel=SETTINGS
        ),
    ] = "fast"
    ema: EmaOption = None

    def read(self) -> Recipe:
        """Return the checked recipe; raises RequestError for the first bad value."""
        from erase_concept.recipe import read_recipe, read_settings, recipe_for
        from erase_concept.settings import merge

        values: dict[str, Any] = {} if self.recipe is None else read_recipe(self.recipe)
        values.pop("model", None)
        concept = values.pop("concept", None)
        given: dict[str, Any] = read_settings(self.set or ())
        given["mask"] = {"kind": self.mask, "scope": self.scope, "sparsity": self.sparsity} | given["mask"]
        given["data"] = {"forget_images": self.forget_images, "retain_images": self.retain_images} | given["data"]
        for part in ("mask", "data"):
            given[part] = {key: value for key, value in given[part].items() if value is not None}
        given |= {"method": self.method, "seed": self.seed, "ema": self.ema}
        # What was not given must not touch the file's own value, be it as wrong as it may.
        values = merge(values, {key: value for key, value in given.items() if value not in (None, {})})
        if not (wanted := self.concept or concept):
            raise RequestError("concept", "(not given)", "needed, here or in the recipe")
        changes = {"anchor": self.anchor, "retain": self.retain, "templates": self.templates}
        changes = {key: value for key, value in changes.items() if value is not None}
        return recipe_for(self.model, wanted, changes=changes, preset_name=self.preset, memory=self.memory, **values)


def assigned(texts: Iterable[str] | None, *parts: str) -> dict[str, dict[str, Any]]:
    """Read the KEY=VALUE texts of ``--set`` and sort them by part: "guard.scale" is "scale" of the part "guard".

    Raises RequestError for another form and for a part that is not there.
    """
    from erase_concept.settings import read_assignments

    found: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for key, value in read_assignments(texts or ()).items():
        part, _, name = key.partition(".")
        if part not in found or not name:
            raise RequestError("set", f"{key}={value}", f"KEY must be {' or '.join(f'{one}.NAME' for one in parts)}")
        found[part][name] = value
    return found


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: the fields of a frozen dataclass become options of the command."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            own = get_type_hints(kind, include_extras=True)
            parameters += [_option(field.name, field.default, own[field.name]) for field in fields(kind)]
        else:
            parameters.append(_option(parameter.name, parameter.default, kind))

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    # Typer reads the options from here.
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions have none of their own
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    """Return one parameter as typer reads it; a dataclass says MISSING where a signature says empty."""
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def examples(*lines: str) -> str:
    """Return the epilog of a command's help: example lines as they are typed."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]{escape(line)}[/cyan]" for line in lines)])
