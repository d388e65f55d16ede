"""Checks a run: its records, its weights against the base model's, its exports and its reports."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.verdict import cited
from erase_concept.eval.verify.beside_weights import check_beside_weights
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.exports import Models, check_export
from erase_concept.eval.verify.findings import Findings, VerifyRequest, files_in
from erase_concept.eval.verify.folder import check_contents
from erase_concept.eval.verify.log import LOG, check_log
from erase_concept.eval.verify.mask import check_asked, check_mask
from erase_concept.eval.verify.scores import CheckedReport, Measured, Recheck, check_report
from erase_concept.eval.verify.weights import Compared, compare, empty
from erase_concept.exports import public_recipe
from erase_concept.files import file_sha256, relative
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.formats.folder import load_folder, read_family
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import ModelConfigs, configs, stored_weights
from erase_concept.pipelines.model import config_hash
from erase_concept.prompts.concept import parse, plain_name
from erase_concept.recipe import Recipe, make_recipe, read_recipe
from erase_concept.run_folder import read_run, weights_files
from erase_concept.training.loop import Training

_RECORDS = ("run.json", "recipe.yaml", "mask.safetensors", LOG)
NOT_RUN_AGAIN = (
    "The recipe: it was not run again. That it and a mask's saliency led to these weights is the run's own claim. "
    "So are its log and versions. The model card was not checked, and is not certified."
)
NO_ATTACKS = (
    "Attacks: prompts that are searched for, and further training, which may bring the concept back, were not tried."
)


def check_run(request: VerifyRequest, base: str) -> Findings:
    """Check a run's folder against its base model.

    Raises RequestError when it holds no complete run, ``base`` is not the model that it erased from, or a report cannot
    be checked here.
    """
    run = Path(request.model)
    info = read_run(run)
    recipe, checks = _recipe(run, info)
    ema = recipe.ema if request.ema is None and recipe is not None else request.ema
    model = _base_configs(info, base, ema)
    checks.append(check_log(run, _asked_steps(recipe, info)))
    mask, found = check_mask(run, info)
    if recipe is not None:
        found += check_asked(mask, recipe, info, model)
    parts, compared = _compare_parts(run, info, base, ema, mask)
    models, prompts = Models(base, ema, run / "pipeline"), recipe.concept.forget_prompts if recipe is not None else ()
    checks += [*check_files(run / "pipeline", run, info), *found, *compared, *_loads(run, model, models, prompts)]
    exported = list(_exports(request, run, info))
    checks += [
        check_export(path, relative(path, run), models, info, entry)
        if path is not None
        else Check(f"export {entry['file']}", None, "is not here; 'export' names its path")
        for entry, path in exported
    ]
    recheck = Recheck(request.recheck, secrets.randbits(32) if request.seed is None else request.seed)
    folders = [file.parent for file in sorted((run / "report.json", *run.glob("*/report.json"))) if file.is_file()]
    hashes = {"erased": {one.part: one.erased for one in parts}, "base": {one.part: one.base for one in parts}}
    measured = Measured(run, base, model_name(info["base"]["source"]), hashes)
    reports = [check_report(folder, run, measured, recheck) for folder in (*folders, *request.reports)]
    checks += [check for report in reports for check in report.checks]
    return Findings(
        about=_about(info, run),
        checks=tuple(checks),
        parts=tuple(parts),
        scores=tuple(_scores(reports)),
        subjects=tuple(file for path in (run / "pipeline", *_there(exported)) for file in files_in(path)),
        evidence=tuple(
            file
            for file in (*(run / name for name in _RECORDS), *(one for report in reports for one in report.files))
            if file.is_file()
        ),
        untested=tuple(_untested(recipe, reports, checks)),
    )


def _recipe(run: Path, info: Mapping[str, Any]) -> tuple[Recipe | None, list[Check]]:
    """Return a run's recipe, None where it cannot be read, and the checks of it and of what run.json says of it."""
    try:
        recipe = make_recipe(read_recipe(run / "recipe.yaml"))
    except (RequestError, ValueError) as problem:
        return None, [failed("recipe.yaml", "recipe.yaml", str(problem))]
    concept = recipe.concept
    parts = [{"concept": one.name, "kind": one.kind, "anchor": one.replacement} for one in concept.combined]
    said = {"method": recipe.method, "seed": recipe.seed, "concept": concept.name, "kind": concept.kind}
    said |= {"anchor": concept.replacement, "parts": parts or None}
    noted = {key: info.get(key) for key in said}
    said["base model"], noted["base model"] = model_name(recipe.model), model_name(info["base"]["source"])
    wrong = [
        failed("run.json", "run.json", f"says {key} {noted[key]}, the recipe says {value}")
        for key, value in said.items()
        if noted[key] != value
    ]
    return recipe, [check_recipe(info, recipe.fingerprint()), *wrong]


def _asked_steps(recipe: Recipe | None, info: Mapping[str, Any]) -> int | None:
    """Return how many steps a recipe asks for; None where it does not say it, as that of a closed form."""
    if recipe is None or not isinstance(settings := recipe.settings, Training):
        return None
    if settings.epochs is not None:  # only the run knew the rows of an epoch
        settings = replace(settings, steps=info["settings"]["steps"], epochs=None)
    return settings.logged_steps(len(recipe.concept.parts))


def _base_configs(info: Mapping[str, Any], base: str, ema: bool | None) -> ModelConfigs:
    """Return the base model's; raises RequestError where it cannot be read, or is of another kind than the run's."""
    try:
        found = configs(base, ema=ema)
    except RequestError as problem:
        raise RequestError("ema" if problem.setting == "ema" else "base", base, problem.allowed) from None
    if found.family.title != info["base"]["family"]:
        kinds = f"is a {found.family.title}, and the run erased from a {info['base']['family']}"
        raise RequestError("base", base, kinds)
    return found


def check_recipe(info: Mapping[str, Any], fingerprint: str) -> Check:
    """Check that a run's recipe is the one that run.json, or unlearn.json, was written for."""
    what = "recipe.yaml"
    if info["recipe"] != fingerprint:
        return failed(what, what, "is not the recipe of which the run's record has the hash")
    return Check(what, True, "is the recipe of which the run's record has the hash")


def check_files(folder: Path, run: Path, info: Mapping[str, Any]) -> list[Check]:
    """Check the hashes of a run's files of weights."""
    found, noted = weights_files(folder), info["files"]
    what = f"files of weights in {folder.name}/"
    wrong = [
        failed(
            what, relative(folder / name, run), "is missing" if name not in found else "has another SHA-256 than noted"
        )
        for name in sorted(found.keys() | noted.keys())
        if found.get(name) != noted.get(name)
    ]
    return wrong or [Check(what, True, f"{len(found)} have the SHA-256 that was noted")]


def _compare_parts(
    run: Path, info: Mapping[str, Any], base: str, ema: bool | None, mask: Mask | None
) -> tuple[list[Compared], list[Check]]:
    """Compare every component with the base model's; raises RequestError where that is another model."""
    trained = "text_encoder" if "text_encoder" in info["erased"] else "unet"
    family = read_family(run / "pipeline", str(run))
    parts, checks = [], []
    for part in sorted((name for name, one in family.components.items() if one.make), key=lambda name: name != "unet"):
        ours = mask if part == trained else None
        lost = part == trained and mask is None and info["mask"] is not None  # its mask cannot be read
        try:
            sides = stored_weights(base, part, ema=ema), stored_weights(run / "pipeline", part)
            found = compare(part, *sides, ours, frozen=part != trained)
        except (ValueError, OSError, SafetensorError) as problem:
            checks.append(failed(part, f"pipeline/{part}", getattr(problem, "allowed", str(problem))))
            continue
        if part == "unet":
            checks += _check_base(info, found, base, mask)
        parts.append(found)
        checks.append(_check_part(run, info, found, ours, lost=lost, trained=part == trained))
    return parts, checks


def _check_base(info: Mapping[str, Any], found: Compared, base: str, mask: Mask | None) -> list[Check]:
    """Check the base model's hash; raises RequestError where all records of the run agree that it is another model."""
    if found.base == info["base"]["unet"]:
        return [Check("base model", True, f"its UNet has the hash that was noted ({found.base[:16]}...)")]
    if mask is not None and mask.provenance.get("base") == found.base:
        return [failed("base model", "run.json", "has another hash of the base model's UNet than mask.safetensors has")]
    raise RequestError("base", base, "is not the model that this run erased from")


def _check_part(
    run: Path, info: Mapping[str, Any], found: Compared, mask: Mask | None, *, lost: bool, trained: bool
) -> Check:
    """Check one component by what was found in it."""
    file = _file_of(run / "pipeline" / found.part, found.first or found.broken)
    at_fault = relative(file, run)
    if found.broken:
        return failed(found.part, at_fault, f"{found.broken} holds NaN or infinity")
    if found.outside:
        where = "outside the mask" if trained else "though this component was not to change"
        return failed(
            found.part, at_fault, f"{found.outside:,} weights differ from the base's {where}, first in {found.first}"
        )
    if not trained:
        return Check(found.part, True, f"{found.weights:,} weights, every one bit-identical to the base model's")
    noted = {"weights": found.weights, "changed": found.changed, "changed_outside_mask": 0}
    if wrong := next((key for key, value in noted.items() if info["checks"][key] != value), ""):
        return failed(found.part, "run.json", f"says {info['checks'][wrong]:,} for {wrong}, there are {noted[wrong]:,}")
    if info["erased"][found.part] != found.erased:
        return failed(found.part, "run.json", "has another hash than that of the erased weights")
    if lost:
        return Check(found.part, None, "the mask cannot be read")
    rest = "the mask lets every weight change" if mask is None else "none outside the mask, bit for bit"
    return Check(found.part, True, f"{found.weights:,} weights, {found.changed:,} differ from the base model's, {rest}")


def _file_of(folder: Path, name: str) -> Path:
    """Return the file of a component in which a weight is, or the first one."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as stored:
            if name in stored.keys():
                return file
    return files[0] if files else folder


def _loads(run: Path, base: ModelConfigs, models: Models, prompts: Sequence[str]) -> list[Check]:
    """Check that the run's pipeline loads and is the base model's but for the weights, and nothing else is there."""
    folder = run / "pipeline"
    try:
        with silence_hub_logs():
            family = load_folder(folder, "pipeline").family
        mine, contents = configs(folder), check_contents(folder, family, run)
    except (RequestError, OSError, ValueError, LookupError, RuntimeError, SafetensorError) as problem:
        return [failed("pipeline/", "pipeline", f"does not load: {getattr(problem, 'allowed', str(problem))}")]
    what, built = "configurations", (name for name, one in family.components.items() if one.make)
    if other := next((part for part in built if config_hash(empty(base, part)) != config_hash(empty(mine, part))), ""):
        contents.append(failed(what, f"pipeline/{other}/config.json", f"does not describe the base model's {other}"))
    else:
        contents.append(Check(what, True, "of the components with weights are the base model's"))
    beside = check_beside_weights(folder, "pipeline", models.base, models.ema, prompts)
    return [Check("pipeline/", True, f"loads as a {family.title}"), *contents, *beside]


def _exports(
    request: VerifyRequest, run: Path, info: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Path | None]]:
    """Yield what run.json says of each export, and where it is; raises RequestError for one that it does not know."""
    entries = {entry["file"]: entry for entry in info.get("exports", ())}  # the last of each name
    named: dict[str, Path] = {}
    for path in request.exports:
        if not path.exists():
            raise RequestError("exports", path, "there is no such file or folder")
        digest = file_sha256(path) if path.is_file() else None
        known = (
            [path.name] if path.name in entries else [n for n, e in entries.items() if digest and e["sha256"] == digest]
        )
        if not known:
            raise RequestError("exports", path, f"is no export of this run; it has: {', '.join(entries) or 'none'}")
        named[known[0]] = path
    for name, entry in entries.items():
        places = [named[name]] if name in named else [run / name, run.parent / name, Path(name)]
        yield entry, next((place for place in places if place.is_file() or place.is_dir()), None)


def _there(exported: Sequence[tuple[Mapping[str, Any], Path | None]]) -> list[Path]:
    return [path for _, path in exported if path is not None]


def _about(info: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return what was removed, from which model, by which recipe; without folders of this machine."""
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    return {
        "removed": {key: info[key] for key in ("concept", "kind", "anchor", "parts") if key in info},
        "base": {
            "name": model_name(info["base"]["source"]),
            "family": info["base"]["family"],
            "unet_sha256": info["base"]["unet"],
        },
        "erased": {f"{part}_sha256": value for part, value in info["erased"].items()},
        "method": info["method"],
        "mask": info["mask"],
        "recipe": yaml.safe_load(public_recipe(text)),
        "erased_with": info["versions"],
    }


def _scores(reports: Sequence[CheckedReport]) -> Iterator[dict[str, Any]]:
    """Yield the scores that follow from their evidence; those that could not be counted again are left out."""
    for one in reports:
        if one.report is not None and one.counted:
            for score in one.report.scores:
                yield {"report": one.name, "benchmark": one.report.benchmark, **asdict(score)}


def _looked_for(report: Report) -> set[str]:
    """Return the names of the concepts of which a report tells whether they are gone."""
    try:
        parts = parse(report.provenance["concept"]).parts if cited(report, "forget") else ()
    except (KeyError, ValueError):  # it is not as an evaluation writes it
        return set()
    return {plain_name(part.name) for part in parts}


def _untested(recipe: Recipe | None, reports: Sequence[CheckedReport], checks: Sequence[Check]) -> Iterator[str]:
    """Yield in sentences what was not looked at."""
    yield NO_ATTACKS
    yield NOT_RUN_AGAIN
    if not reports:
        yield "Whether the concept is gone: there is no report of an evaluation."
    elif recipe is not None:
        measured = {name for one in reports if one.report is not None for name in _looked_for(one.report)}
        for part in recipe.concept.parts:
            if measured.isdisjoint(map(plain_name, (part.name, *part.names))):
                yield f"Whether {part.name} is gone: no report measures it."
    for one in reports:
        yield (
            f"{one.name}: {one.rejudged:,} images were judged anew, the others not; no image was sampled again. The "
            f"pictures inside the page were not looked at."
        )
    for check in checks:
        if check.holds is None:
            yield f"{check.what}: {check.found}."
