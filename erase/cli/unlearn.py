"""``train``, ``unlearn`` and ``eval-classifier``: runs of image classifiers, and what was forgotten in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erase_concept.cli.options import (
    SETTINGS,
    JsonOption,
    MaskOption,
    OutOption,
    PlanOptions,
    RecipeOption,
    SeedOption,
    SparsityOption,
    examples,
    grouped,
)
from erase_concept.cli.terminal import print_json, print_note, print_plan, print_table, print_text
from erase_concept.errors import RequestError

if TYPE_CHECKING:
    from erase_concept.classification.recipe import UnlearnRecipe
    from erase_concept.classification.run import UnlearnRun

UNLEARN_EXAMPLES = examples(
    "erase-concept unlearn runs/original --data fashion-mnist --forget random:10% -o runs/salun",
    "erase-concept unlearn runs/original --data fashion-mnist --forget class:Sandal -m retrain -o runs/retrain",
    "erase-concept unlearn resnet18-cifar=net.pt --data cifar10:DIR --forget indices:FILE --preset paper -o runs/x",
)
TRAIN_EXAMPLES = examples(
    "erase-concept train 'resnet18-cifar[width=16,stride=2]' --data fashion-mnist -o runs/original"
)

EVAL_EXAMPLES = examples("erase-concept eval-classifier runs/salun --retrain runs/retrain -o runs/salun")

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="fashion-mnist, cifar10:DIR, cifar100:DIR, svhn:DIR, folder:DIR with train and test, or what a built-in "
        "model draws. (default: fashion-mnist)",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="A setting of the method ('list unlearners NAME'), mask.KEY or data.KEY. Repeat it.",
    ),
]
PresetOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Settings to start from: default; paper for the authors' on CIFAR-10; small for two cores.",
        rich_help_panel=SETTINGS,
    ),
]


@dataclass(frozen=True)
class UnlearnOptions:
    """What unlearning is asked for."""

    classifier: Annotated[
        str,
        typer.Argument(
            metavar="CLASSIFIER", help="Folder of a run or of a classifier, ARCHITECTURE=FILE, or torchscript:FILE."
        ),
    ]
    forget: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="random:10%, random:COUNT, class:NAME, or indices:FILE with one a line."),
    ] = None
    data: DataOption = None
    method: Annotated[
        str | None, typer.Option("--method", "-m", metavar="NAME", help="See 'list unlearners'. (default: salun)")
    ] = None
    set: SetOption = None
    seed: SeedOption = None
    mask: MaskOption = None
    sparsity: SparsityOption = None
    preset: PresetOption = "default"
    recipe: RecipeOption = None

    def read(self) -> UnlearnRecipe:
        """Return the checked recipe; raises RequestError for the first bad value."""
        from erase_concept.classification.recipe import read_unlearn_recipe, unlearn_recipe
        from erase_concept.settings import merge

        given = _values(self.data, self.set, self.seed)
        mask = {"kind": self.mask, "sparsity": self.sparsity}
        given["mask"] = {key: value for key, value in mask.items() if value is not None} | given["mask"]
        given |= {"forget": self.forget, "method": self.method}
        values = {} if self.recipe is None else read_unlearn_recipe(self.recipe)
        # What was not given must not touch the file's own value, be it as wrong as it may.
        values = merge(values, {key: value for key, value in given.items() if value not in (None, {})})
        values.pop("classifier", None)
        forget, data = values.pop("forget", None), values.pop("data", {})
        if not forget:
            raise RequestError("forget", "(not given)", "needed, here or in the recipe")
        values["method"] = str(values.get("method", "salun"))
        return unlearn_recipe(self.classifier, data, str(forget), preset=self.preset, **values)


def _values(data: str | None, texts: list[str] | None, seed: int | None) -> dict[str, Any]:
    """Return what the options that both commands have say, as values of a recipe."""
    from erase_concept.recipe import read_settings

    values: dict[str, Any] = dict(read_settings(texts or ()))
    values["data"] = ({} if data is None else {"source": data}) | values["data"]
    return values | ({} if seed is None else {"seed": seed})


@grouped
def unlearn(
    options: UnlearnOptions,
    out: OutOption,
    plan: PlanOptions,
    json_: JsonOption = False,
) -> None:
    """Forget training images of a classifier. The same command resumes a killed run."""
    planned = plan.asked()
    recipe = options.read()
    if planned:
        from erase_concept.classification.dry_run import plan_unlearn

        found = plan_unlearn(recipe, plan.card)
        print_plan(recipe, out, found.expected, json_, found.counts())
        return
    run = _run(recipe, out)
    if json_:
        print_json(run.run_info)
        return
    images = run.run_info["images"]
    _print(run, f"{images['forget']:,} of {images['forget'] + images['retain']:,} training images forgotten")


@grouped
def train(
    architecture: Annotated[
        str,
        typer.Argument(
            metavar="ARCHITECTURE",
            help="resnet18-cifar, with \\[width=W,stride=S] for a small one, torchvision:NAME, timm:NAME.",
        ),
    ],
    out: OutOption,
    data: DataOption = None,
    set: SetOption = None,
    seed: SeedOption = None,
    preset: PresetOption = "default",
    json_: JsonOption = False,
) -> None:
    """Train a classifier on a data set's training images. The same command resumes a killed run."""
    from erase_concept.classification.recipe import NOTHING, unlearn_recipe

    values = _values(data, set, seed)
    recipe = unlearn_recipe(architecture, values.pop("data"), NOTHING, method="retrain", preset=preset, **values)
    run = _run(recipe, out)
    if json_:
        print_json(run.run_info)
        return
    _print(run, f"trained on {run.run_info['images']['retain']:,} images")


def eval_classifier(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of 'unlearn'.")],
    out: OutOption,
    retrain: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run folder of 'unlearn --method retrain', to measure the gap to it."),
    ] = None,
    shadow_models: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --retrain: also attack by LiRA with so many shadow models, each trained as Retrain was on half "
            "of the images. 4 to 7 run its offline variant. They are kept in the folder of Retrain.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure what a classifier forgot, and how far it is from one that never saw the forgotten images."""
    from erase_concept.eval.classification.evaluate import evaluate_classifier
    from erase_concept.eval.classification.report import write_classifier_report

    report = evaluate_classifier(run, retrain=retrain, shadow_models=shadow_models)
    write_classifier_report(report, out)
    if json_:
        print_text((out / "report.json").read_text(encoding="utf-8"))
        return
    rows = [
        [
            score.metric,
            "" if score.baseline is None else f"{score.baseline:.3f}",
            f"{score.value:.3f}",
            f"{score.ci95[0]:.3f} to {score.ci95[1]:.3f}",
            str(score.n),
        ]
        for score in report.scores
    ]
    print_table("scores", ["metric", "Retrain", "unlearned", "95 % interval", "n"], rows)
    if report.gap is not None:
        typer.echo(f"Average gap to Retrain: {report.gap:.2%}")
    typer.echo(f"Report: {out / 'report.html'}")


def _run(recipe: UnlearnRecipe, out: Path) -> UnlearnRun:
    """Follow a recipe, and say where there was nothing left to do."""
    from erase_concept.classification.run import RUN_FILE, run_unlearn
    from erase_concept.run_folder import complete

    before = complete(out, RUN_FILE)
    run = run_unlearn(recipe, out)
    print_note(f"{out} was complete already: nothing was done" * before)
    return run


def _print(run: UnlearnRun, what: str) -> None:
    checks, mask = run.run_info["checks"], run.run_info["mask"]
    density = "" if mask is None else f" The mask holds {mask['density']:.1%} of the weights."
    typer.echo(
        f"{what}: {checks['changed']:,} of {checks['weights']:,} weights changed, "
        f"{checks['changed_outside_mask']} outside the mask.{density}\nClassifier: {run.path / 'classifier'}"
    )
