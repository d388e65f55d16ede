"""What an evaluation is asked for: whose images, by which benchmark, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from erase_concept.run_folder import base_source, read_run
from erase_concept.settings import described, settings

if TYPE_CHECKING:
    from erase_concept.prompts.find import ConceptSource
    from erase_concept.prompts.promptset import PromptSet


@settings
class EvalSettings:
    """How a benchmark's prompts are chosen and sampled."""

    steps: Annotated[int, described("Sampling steps.", ge=1)] = 25
    guidance: Annotated[float, described("Guidance scale of prompts that name none.", ge=0)] = 7.5
    scheduler: Annotated[str | None, described("A scheduler of diffusers; without one, DPM-Solver++ 2M.")] = None
    seeds: Annotated[int, described("Times that each prompt is sampled, each with a seed of its own.", ge=1)] = 1
    category: Annotated[str | None, described("Only the prompts of this category.")] = None
    limit: Annotated[int | None, described("So many prompts, each label with its share.", ge=1)] = None


@dataclass(frozen=True)
class EvalRequest:
    """What an evaluation is asked for.

    ``model`` is a run folder, anything that ``load`` takes, or a folder of images, with a manifest or made elsewhere.
    So is ``baseline``, the base model. A run folder knows what was erased, and from what: then ``concept`` and
    ``baseline`` may be left out. Without a ``benchmark`` the model's own is taken, or the one for the concept's kind.

    ``prompts``, ``judges`` and ``metrics`` take the place of the benchmark's. ``settings`` are laid over the
    benchmark's: those of ``EvalSettings``, ``judge.KEY``, ``metric.KEY`` and ``guard.KEY``; where a name is needed,
    ``judge.NAME.KEY``. What they name is asked for and must be there, while a metric of the benchmark that needs what
    is not installed is left out, which the report says. ``guard`` names a guard against the concept, with which the
    model samples and its baseline, by default the model itself, does not. ``fail_if`` are conditions as
    ``read_thresholds`` reads them. ``ema`` chooses the weights of a file that has averaged and live ones; of a run's
    base model it counts where the run was not told itself.
    """

    model: str | Path
    out: Path
    concept: ConceptSource | None = None
    benchmark: str | None = None
    baseline: str | Path | None = None
    prompts: str | PromptSet | None = None
    judges: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    guard: str | None = None
    fail_if: tuple[str, ...] = ()
    first_seed: int = 10_000
    batch_size: int = 16
    ema: bool | None = None


def told(request: EvalRequest, benchmark: str) -> dict[str, Any]:
    """Return what of a request bears on the numbers, in plain values that JSON holds.

    ``benchmark`` is the name of the one that was chosen. Prompts and a concept that are described and not named are
    told as "described": they are in the manifests and in the report.
    """
    prompts, concept = request.prompts, request.concept
    return {
        "benchmark": benchmark,
        "concept": concept if concept is None or isinstance(concept, str) else "described",
        "prompts": prompts if prompts is None or isinstance(prompts, str) else "described",
        "judges": list(request.judges),
        "metrics": list(request.metrics),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in request.settings.items()},
        "guard": request.guard,
        "fail_if": list(request.fail_if),
        "first_seed": request.first_seed,
    }


@dataclass(frozen=True)
class ErasedRun:
    """What a run folder says of itself: ``run_info`` is its run.json, ``recipe`` its recipe.yaml.

    Both are empty for what is no run folder.
    """

    run_info: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The base model that the run erased from."""
        return base_source(self.run_info) if self.run_info else None

    @property
    def base_unet(self) -> str | None:
        """The hash of the base model's UNet."""
        return self.run_info["base"]["unet"] if self.run_info else None

    @property
    def ema(self) -> bool | None:
        """Which weights the run was told to take of a file that has averaged and live ones, as ``load`` takes it."""
        return self.recipe.get("ema")


def read_erased_run(model: str | Path) -> ErasedRun:
    """Read what a run folder says of itself; nothing for what is no run folder."""
    folder = Path(model)
    if not (folder / "run.json").is_file():
        return ErasedRun()
    from erase_concept.recipe import read_recipe

    return ErasedRun(read_run(folder), read_recipe(folder / "recipe.yaml"))


def is_images(folder: Path) -> bool:
    """Tell a folder of images from a model's and from a run's."""
    from erase_concept.pipelines.pictures import SUFFIXES

    if not folder.is_dir() or any((folder / name).is_file() for name in ("run.json", "model_index.json")):
        return False
    return any(file.name == "manifest.jsonl" or file.suffix.lower() in SUFFIXES for file in folder.iterdir())
