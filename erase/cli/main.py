"""The command ``erase-concept``. Results go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext, redirect_stdout
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.processes import main_process

if TYPE_CHECKING:
    from erase_concept.eval.report.report import Report
    from erase_concept.prompts.concept import Concept
    from erase_concept.recipe import Recipe

app = typer.Typer(
    name="erase-concept",
    help="Remove a concept from a Stable Diffusion model, and prove that it is gone and the rest is still there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A diffusers folder, a checkpoint file, a run folder, a hub id or a built-in name."
    ),
]
ConceptsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        "-c",
        help="A built-in concept, words ('blue rocket'), a YAML file that describes a concept, a file of prompts "
        "(.csv, .txt) or a folder of images. Given several times, all are erased together.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the whole run. (default: 0)")]
PresetOption = Annotated[str, typer.Option(help="Settings to start from: default, paper or emojinette.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="A setting of the method (see 'list methods'; a training has steps, batch_size, lr, "
        "optimizer, weight_decay, warmup, decay, accumulation, max_grad_norm, precision), mask.KEY or data.KEY.",
    ),
]
MaskOption = Annotated[
    str | None,
    typer.Option("--mask", help="salient, none, random, least-salient, or a mask file. (default: the method's)"),
]
ScopeOption = Annotated[
    str | None,
    typer.Option(
        help="full, cross-attention, self-attention or non-cross-attention; of Concept Ablation also text-encoder. "
        "(default: the method's)"
    ),
]
SparsityOption = Annotated[float | None, typer.Option(help="Share of the weights that stay frozen.")]
_EMA = typer.Option("--ema/--no-ema", help="Of a single file with both, take the UNet's averaged or its live weights.")
GuardOption = Annotated[
    str | None, typer.Option(help="Sample with a guard against the concept, see 'list guards': no weight is changed.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images sampled together; each keeps its own noise.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Sampling steps.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from erase_concept import __version__

        typer.echo(f"erase-concept {__version__}")
        raise typer.Exit


@app.command()
def demo(
    concept: Annotated[str, typer.Option("--concept", "-c", help="An object or style of the model.")] = "church",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder. (default: runs/demo-CONCEPT)")] = None,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Erase a concept from the built-in model, measure base and erased model, and write the report."""
    from erase_concept.cli.terminal import print_report
    from erase_concept.eval.emojinette_benchmark import emojinette_benchmark

    recipe = _recipe("emojinette", [concept], None, "default", None, None, None, None, None, seed, None, None)
    emojinette_benchmark(recipe.concept)  # refuses a concept that cannot be measured before it is erased
    out = out or Path("runs") / f"demo-{recipe.concept.name}"
    _erase(recipe, out)
    report = _evaluate(str(out), None, None, out)
    if report is not None:
        print_report(report, out, json_)


@app.command()
def erase(
    model: ModelArgument,
    out: OutOption,
    concept: ConceptsOption = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See 'list methods' (default: salun).")] = None,
    mask: MaskOption = None,
    scope: ScopeOption = None,
    sparsity: SparsityOption = None,
    set_: SetOption = None,
    preset: PresetOption = "default",
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="A recipe in YAML, laid over the preset.")
    ] = None,
    forget_images: Annotated[Path | None, typer.Option(help="Folder of images of the concept.")] = None,
    retain_images: Annotated[Path | None, typer.Option(help="Folder of images of what is to stay.")] = None,
    ema: Annotated[bool | None, _EMA] = None,
    memory: Annotated[
        str, typer.Option(help="fast, balanced or low: how much memory the run may take, for more time.")
    ] = "fast",
    seed: SeedOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and what it would take, and stop.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Erase concepts from a model: a run folder with the erased pipeline in it."""
    from erase_concept.cli.terminal import print_json, print_plan
    from erase_concept.run import check, read_run

    recipe = _recipe(
        model,
        concept,
        method,
        preset,
        mask,
        scope,
        sparsity,
        set_,
        recipe_file,
        seed,
        forget_images,
        retain_images,
        ema,
        memory,
    )
    if dry_run:
        check(recipe)
        print_plan(recipe, out, json_)
        return
    _erase(recipe, out)
    account = read_run(out)
    if json_:
        print_json(account)
        return
    checks = account["checks"]
    typer.echo(
        f"{recipe.concept.name} erased: {checks['changed']:,} of {checks['weights']:,} weights changed, "
        f"{checks['changed_outside_mask']} outside the mask.{_density(account)}\nPipeline: {out / 'pipeline'}"
    )


def _density(account: dict[str, Any]) -> str:
    return "" if account["mask"] is None else f" The mask holds {account['mask']['density']:.1%} of the weights."


@app.command()
def mask(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The mask file to write (.safetensors).")],
    concept: ConceptsOption = None,
    kind: Annotated[str, typer.Option("--kind", help="salient, random or least-salient.")] = "salient",
    scope: ScopeOption = None,
    sparsity: SparsityOption = None,
    set_: SetOption = None,
    preset: PresetOption = "default",
    ema: Annotated[bool, _EMA] = True,
    seed: SeedOption = None,
    json_: JsonOption = False,
) -> None:
    """Compute the saliency mask of a concept, or of several."""
    if kind not in ("salient", "random", "least-salient"):
        raise RequestError("--kind", kind, "allowed: salient, random, least-salient")
    recipe = _recipe(model, concept, None, preset, kind, scope, sparsity, set_, None, seed, None, None, ema)
    from erase_concept.cli.terminal import print_json
    from erase_concept.masks.mask import describe
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.run import check_scope, make_data_for, make_mask

    check_scope(recipe)
    loaded = load(model, ema=ema)
    made = make_mask(recipe, loaded, make_data_for(recipe, loaded), weights_hash(loaded.unet))
    made.save(out)
    if json_:
        print_json(describe(made))
    else:
        typer.echo(f"{made.count:,} of {made.total:,} weights ({made.density:.2%}) -> {out}")


@app.command("mask-info")
def mask_info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Mask files.")], json_: JsonOption = False
) -> None:
    """Describe masks: density by kind of layer, provenance, and overlap where several are given."""
    from erase_concept.cli.terminal import print_json, print_table
    from erase_concept.masks.mask import Mask, describe

    masks = {str(file): Mask.load(file, argument="FILE") for file in files}
    overlaps = {(a, b): masks[a].overlap(masks[b]) for a, b in combinations(masks, 2)}
    if json_:
        listed = [{"masks": pair, "jaccard": share} for pair, share in overlaps.items()]
        print_json({"masks": {file: describe(m) for file, m in masks.items()}, "overlaps": listed})
        return
    for file, m in masks.items():
        about = describe(m)
        rows = [[kind, f"{share:.1%}"] for kind, share in about["kinds"].items()]
        rows.append(["all", f"{m.density:.1%} ({m.count:,} of {m.total:,})"])
        rows += [[key, value] for key, value in m.provenance.items()]
        print_table(file, ["", ""], rows)
    if overlaps:
        pairs = [[f"{a} and {b}", f"{share:.3f}"] for (a, b), share in overlaps.items()]
        print_table("overlap", ["masks", "Jaccard"], pairs)


@app.command()
def sample(
    model: ModelArgument,
    prompts: Annotated[
        str, typer.Option("--prompts", "-p", help="A CSV file, a built-in prompt set or hub:OWNER/NAME.")
    ],
    out: OutOption,
    steps: StepsOption = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale of rows that name none.")] = 7.5,
    scheduler: Annotated[
        str | None,
        typer.Option(help="A scheduler of diffusers, such as DDIMScheduler. (default: DPM-Solver++ 2M)"),
    ] = None,
    guard: GuardOption = None,
    concept: Annotated[str | None, typer.Option("--concept", "-c", help="What the guard keeps out.")] = None,
    ema: Annotated[bool, _EMA] = True,
    batch_size: BatchOption = 16,
    json_: JsonOption = False,
) -> None:
    """Sample images for a prompt set; run again, it makes only what is missing."""
    from erase_concept.cli.terminal import print_json, progress
    from erase_concept.pipelines.guards import find_guard
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.processes import total
    from erase_concept.pipelines.sample import sample as sample_set
    from erase_concept.prompts.concept import concept as find_concept
    from erase_concept.prompts.promptset import prompts as find_prompts

    if (guard is None) != (concept is None):
        given = ("--guard", guard) if concept is None else ("--concept", concept)
        raise RequestError(*given, "--guard and --concept go together")
    guarded = None if guard is None or concept is None else find_guard(guard, find_concept(concept))
    found = find_prompts(prompts)
    loaded = load(model, ema=ema)
    made = sample_set(
        loaded,
        found,
        out,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        scheduler=scheduler,
        guard=guarded,
    )
    count = total(sum(1 for _ in progress(made, f"sampling {found.name}", len(found.rows))))
    if json_:
        print_json({"out": str(out), "images": len(found.rows), "made": count})
    else:
        typer.echo(f"{len(found.rows)} images in {out}, {count} of them new")


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|DIR", help="A model as everywhere, a run folder, or a folder of images."),
    ],
    out: OutOption,
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", help="See 'list benchmarks'; or a YAML file.")
    ] = "emojinette",
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            help="What was erased, each for itself; a label of the prompts will do. (default: the run's)",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The base model or its images, measured alike. (default: the run's)")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", "-p", help="A CSV file, a built-in prompt set or hub:OWNER/NAME.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Only the prompts of this category.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts, each label with its share.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Times each prompt is sampled, each with a seed of its own.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Such as efficientnet-lite2, torchvision:resnet50, timm:NAME or hf:NAME.")
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="Of distances: inception (FID), efficientnet-lite2 or emojinette.")
    ] = None,
    inception: Annotated[Path | None, typer.Option(help="The file of Inception's weights.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A folder of real images to measure distances to.")] = None,
    clip: Annotated[str | None, typer.Option(help="The CLIP model of the CLIP score: a folder or a hub id.")] = None,
    threshold: Annotated[float | None, typer.Option(help="The nudity detector's. (default: 0.6)")] = None,
    labels: Annotated[str | None, typer.Option(help="What counts as nudity: papers or strict.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. (default: 25)")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale of prompts that name none. (default: 7.5)")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="A scheduler of diffusers, such as DDIMScheduler. (default: DPM-Solver++ 2M)"),
    ] = None,
    guard: GuardOption = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="EXPR", help='Such as "ua<0.95" or "retained_ira<0.98": exit code 1 if so.'),
    ] = None,
    batch_size: BatchOption = 16,
    json_: JsonOption = False,
) -> None:
    """Measure whether a concept is gone and what else was lost, and write the report."""
    from dataclasses import replace

    from erase_concept.cli.terminal import print_report
    from erase_concept.eval.report.verdict import main_scores
    from erase_concept.recipe import find_concept

    given = {
        "category": category,
        "limit": limit,
        "classifier": classifier,
        "extractor": extractor,
        "inception": inception,
        "reference": reference,
        "clip": clip,
        "threshold": threshold,
        "labels": labels,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
    }
    wanted = concept[0] if concept and len(concept) == 1 else find_concept(concept, model) if concept else None
    report = _evaluate(
        model,
        wanted,
        baseline,
        out,
        name=benchmark,
        prompts=prompts,
        settings={key: value for key, value in given.items() if value is not None},
        guard=guard,
        fail_if=fail_if or (),
        seeds=seeds,
        batch_size=batch_size,
    )
    if report is None:
        return
    shown = report if json_ else replace(report, scores=tuple(main_scores(report)))
    print_report(shown, out, json_)
    for who, notes in report.provenance.get("notes", {}).items():
        for note in notes:
            print(f"erase-concept: {who}: {note}", file=sys.stderr)
    for metric, reason in report.provenance.get("not measured", {}).items():
        print(f"erase-concept: {metric} not measured: {reason}", file=sys.stderr)
    failed = [line for line in report.provenance.get("gates", {}).values() if line != "passed"]
    for line in failed:
        print(f"erase-concept: {line}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN|DIR...", help="Folders with a report.json.")],
    out: OutOption,
    json_: JsonOption = False,
) -> None:
    """Write the report of one run again, or lay several side by side."""
    from erase_concept.cli.terminal import print_report
    from erase_concept.eval.report.report import read_report
    from erase_concept.eval.report.write import write_report, write_side_by_side

    reports = [read_report(folder) for folder in folders]
    if len(reports) == 1:
        write_report(reports[0], out)
        print_report(reports[0], out, json_)
        return
    write_side_by_side({str(folder): r for folder, r in zip(folders, reports, strict=True)}, out)
    if json_:
        typer.echo((out / "report.json").read_text(encoding="utf-8"))
        return
    typer.echo(f"{len(reports)} reports side by side: {out / 'report.html'}")


@app.command()
def compare(
    out: OutOption,
    methods: Annotated[
        str,
        typer.Option(help="Methods, presets and guards, such as 'default,esd-x\\[eta=2],safree'; 'all' is every one."),
    ] = "all",
    concepts: Annotated[str, typer.Option(help="Concepts to erase.")] = "church,dog,parachute,guitar,truck,flat,3d",
    seeds: Annotated[str, typer.Option(help="Seeds, each of a run of its own.")] = "0,1",
    masks: Annotated[
        str | None,
        typer.Option(
            help="Masks, with a factor for their strengths after an @: 'salient,none,random@2'. "
            "(default: each method's own)"
        ),
    ] = None,
    strengths: Annotated[
        str, typer.Option(help="Factors of each method's strength; with several, whole curves are compared.")
    ] = "1",
    tune: Annotated[str, typer.Option(help="Concepts on which each method's strength is searched first.")] = "",
    trials: Annotated[int, typer.Option(min=1, help="Strengths tried in a search, of every method as many.")] = 6,
    model: Annotated[str, typer.Option(help="The base model.")] = "emojinette",
    benchmark: Annotated[
        str, typer.Option(help="What tells UA, IRA and CRA: emojinette, imagenette, style, or a YAML file.")
    ] = "emojinette",
    json_: JsonOption = False,
) -> None:
    """Erase with many methods, masks and strengths, and compare what is gone, what is kept and what it takes."""
    from erase_concept.cli.terminal import bar
    from erase_concept.eval.compare.compare import compare as run
    from erase_concept.eval.compare.trials import PRESETS
    from erase_concept.method import methods as known
    from erase_concept.pipelines.guards import GUARDS

    entries = [*PRESETS, *known(), *GUARDS.all()] if methods == "all" else _split_entries(methods)
    numbers = _numbers("--strengths", strengths)
    seed_numbers = [int(number) for number in _numbers("--seeds", seeds, whole=True)]
    with bar() as shown:
        task = shown.add_task("compare", total=None)
        for what, done, total in run(
            model,
            entries,
            [part.strip() for part in concepts.split(",")],
            seed_numbers,
            out,
            masks=[part.strip() for part in masks.split(",")] if masks else (None,),
            strengths=numbers,
            tune_on=[part.strip() for part in tune.split(",") if part.strip()],
            trials=trials,
            benchmark=benchmark,
        ):
            shown.update(task, description=what, completed=done, total=total)
    typer.echo((out / ("comparison.json" if json_ else "comparison.md")).read_text(encoding="utf-8"), nl=False)


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    """Read numbers with commas between them, of at least 0."""
    try:
        found = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < float("inf") for number in found):
        raise RequestError(option, text, f"must be {'whole ' * whole}numbers of at least 0 with commas between them")
    return found


def _split_entries(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    import re

    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder or file to write.")],
    format_: Annotated[
        str, typer.Option("--format", "-f", help="diffusers (a folder), unet, single-file, lora or delta (a file).")
    ] = "unet",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; a single file keeps its base's.")] = "fp32",
    rank: Annotated[int | None, typer.Option(help="Rank of a LoRA. (default: 64)")] = None,
    lora_style: Annotated[str | None, typer.Option(help="Keys of a LoRA: kohya or diffusers. (default: kohya)")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub, a private one.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see the repository.")] = False,
) -> None:
    """Copy a run's erased model out: a diffusers folder, one file, the UNet alone, a LoRA, or what was changed."""
    from erase_concept.export import check_hub, export_run, push

    if public and push_to_hub is None:
        raise RequestError("--public", "(given)", "goes with --push-to-hub")
    if push_to_hub is not None:
        check_hub(push_to_hub, public=public)
    fit = export_run(run, out, format_, dtype, rank=rank, lora_style=lora_style)
    typer.echo(f"{format_} ({dtype}) -> {out} (read back and compared)")
    if fit is not None:
        missed = ", ".join(f"{error:.1%} at rank {rank}" for rank, error in fit.errors.items())
        typer.echo(f"Of the change, by its Frobenius norm, a LoRA misses {missed}.")
        typer.echo(f"{fit.left_out:.1%} of it is in biases and norms, which no LoRA carries.")
    if push_to_hub is not None:
        typer.echo(f"Uploaded to {push(out, push_to_hub, public=public)}")


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A file that 'export --format delta' wrote.")],
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The diffusers folder to write.")],
    revert: Annotated[bool, typer.Option("--revert", help="MODEL is the erased one: give the base back.")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="MODEL is another one of the same shapes: move its weights likewise.")
    ] = False,
) -> None:
    """Erase by a delta: the base model becomes the erased one, bit for bit, or the other way round."""
    from erase_concept.card import delta_card
    from erase_concept.export import check_out
    from erase_concept.pipelines.formats.delta import apply_delta, open_delta
    from erase_concept.pipelines.formats.folder import save_pipeline
    from erase_concept.pipelines.load import load

    opened = open_delta(delta)
    check_out(out, Path(model), Path(model) / "pipeline")
    loaded = load(model, dtype=opened.dtype)
    apply_delta(opened, loaded.unet, revert=revert, transfer=transfer)
    save_pipeline(loaded, out, delta_card(opened, model, revert=revert, transfer=transfer))
    what = "base" if revert else "erased"
    told = (
        "by as many floats as in its own model; measure whether the concept is gone"
        if transfer
        else "checked bit for bit"
    )
    typer.echo(f"{what} model -> {out} ({told})")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, concepts, methods, guards, metrics, benchmarks or prompts.")],
    json_: JsonOption = False,
) -> None:
    """List what there is, with a line on each."""
    from erase_concept.cli.terminal import print_json, print_table

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
    from erase_concept.prompts.concept import concepts

    return {key: f"{c.kind}, becomes {c.anchor}, {len(c.forget_prompts)} prompts" for key, c in concepts().items()}


def _list_methods() -> dict[str, str]:
    from erase_concept.method import methods
    from erase_concept.training.loop import Training

    shared = Training.__dataclass_fields__
    found = {}
    for name, method in methods().items():
        own = [field for field in method.config.__dataclass_fields__ if field not in shared]
        told = [*own, *(["those of every training"] if issubclass(method.config, Training) else [])]
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
    from erase_concept.prompts.promptset import prompt_sets

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


def _recipe(
    model: str,
    concept: list[str] | None,
    method: str | None,
    preset: str,
    mask: str | None,
    scope: str | None,
    sparsity: float | None,
    settings: list[str] | None,
    file: Path | None,
    seed: int | None,
    forget_images: Path | None,
    retain_images: Path | None,
    ema: bool | None = None,
    memory: str = "fast",
) -> Recipe:
    """Lay the options over the recipe file, and both over the preset."""
    from erase_concept.recipe import merge, read_recipe, read_settings, recipe_for

    values: dict[str, Any] = {} if file is None else read_recipe(file)
    given: dict[str, Any] = {"method": method, "seed": seed, "ema": ema, **read_settings(settings or (), "--set")}
    given["mask"] = {"kind": mask, "scope": scope, "sparsity": sparsity} | given["mask"]
    given["data"] = {"forget_images": forget_images, "retain_images": retain_images} | given["data"]
    for part in ("mask", "data"):
        given[part] = {key: value for key, value in given[part].items() if value is not None}
    # What was not given must not touch the file's own value, be it as wrong as it may.
    values = merge(values, {key: value for key, value in given.items() if value not in (None, {})})
    wanted = concept or values.pop("concept", None)
    values.pop("concept", None)
    values.pop("model", None)
    if wanted is None:
        raise RequestError("--concept", "(not given)", "needed, here or in the recipe")
    recipe = recipe_for(model, wanted, preset_name=preset, memory=memory, **values)
    recipe.config()
    return recipe


def _erase(recipe: Recipe, out: Path) -> None:
    """Run the recipe with a progress bar on stderr."""
    from erase_concept.cli.terminal import bar
    from erase_concept.run import erase as run
    from erase_concept.training.loop import Record, TargetProgress

    with bar() as shown:
        task = shown.add_task("start", total=None)
        for event in run(recipe, out):
            if isinstance(event, Record | TargetProgress):
                text = f"erase  loss {event.loss:.4f}" if isinstance(event, Record) else "targets of the base model"
                shown.update(task, description=text, completed=event.step, total=event.steps)
            else:
                shown.update(task, description=event, completed=0, total=None)


def _evaluate(
    model: str, concept: str | Concept | None, baseline: str | None, out: Path, **options: Any
) -> Report | None:
    """Sample and measure a model and its base, and write the report to ``out``; a run's model card gets the result.

    Of several processes only the main one measures; the others return None.
    """
    from erase_concept.cli.terminal import bar
    from erase_concept.eval.benchmark import benchmark
    from erase_concept.eval.report.report import Report

    result = None
    with bar() as shown:
        task = shown.add_task("sample", total=None)
        for event in benchmark(model, concept, baseline, out=out, **options):
            if isinstance(event, Report):
                result = event
            else:
                shown.update(task, description=f"sample {event[0]}", completed=event[1], total=event[2])
    if result is not None and (Path(model) / "run.json").is_file():
        from dataclasses import replace

        from erase_concept.card import write_card
        from erase_concept.eval.report.verdict import main_scores
        from erase_concept.run import read_run

        account = read_run(Path(model))
        if result.concept == account["concept"] and result.base is not None:
            first = replace(result, scores=tuple(main_scores(result)))
            write_card(Path(model), account, first.to_dict()["scores"])
    return result


def main() -> None:
    """Run the command; a wrong request ends with 2, failed work with 1, each with one line on stderr."""
    try:
        with nullcontext() if main_process() else redirect_stdout(io.StringIO()):
            code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except RequestError as problem:
        _fail(problem, 2)
    except (EraseError, OSError) as problem:
        _fail(problem, 1)
    except Exception as problem:
        # The command line parser's own errors, whose class depends on the version of typer.
        if hasattr(problem, "format_message"):
            _fail(problem, 2)
        from erase_concept.pipelines.formats.read_single_file import out_of_memory

        if not out_of_memory(problem):
            raise
        advice = "a lower --memory or smaller batches may help, and 'erase --dry-run' tells what to expect"
        _fail(EraseError(f"there is too little memory: {advice}"), 1)
    if code == 130:
        print("erase-concept: interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(problem: Any, code: int) -> None:
    if "--debug" in sys.argv:
        raise problem
    line = problem.format_message() if hasattr(problem, "format_message") else str(problem) or type(problem).__name__
    # Called without arguments, the parser has shown its help and has nothing to add; a wrong request is wrong in every
    # process, and the first one says so.
    if line and (code != 2 or main_process()):
        print(f"erase-concept: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
