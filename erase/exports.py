"""Export a run's erased model: a folder, a file, a LoRA or a delta, and an upload to the hub if asked."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from huggingface_hub import HfApi, get_token

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import file_sha256, only_process, parse_yaml, to_disk
from erase_concept.pipelines.formats.delta import save_delta
from erase_concept.pipelines.formats.folder import save_pipeline, save_unet
from erase_concept.pipelines.formats.lora import Fit, Style, save_lora
from erase_concept.pipelines.formats.modelspec import model_name, modelspec
from erase_concept.pipelines.formats.prediction import prediction_of
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.formats.weights import is_safetensors, read_dtypes
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.recipe import read_recipe
from erase_concept.run_folder import RUN_FILE, base_source, read_run, write_json

# A text that is an absolute path as a whole, with spaces perhaps, and the folders of one within a text.
_PATH = re.compile(r"(?:/|~[\\/]|[A-Za-z]:[\\/]).*[\\/].", re.S)
_FOLDERS = re.compile(r"(?<![\w.:/\\~])(?:/|~[\\/]|[A-Za-z]:[\\/])(?:[^\s\\/'\"]+[\\/])+")
EXPORT_FORMATS = ("diffusers", "unet", "single-file", "lora", "delta")
EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written: the dtype in the file, its SHA-256 (a folder has none), and how well a LoRA fits.

    ``surviving`` is the share of the changed weights that still differ from the base model's in that dtype, where it is
    known.
    """

    path: Path
    format: str
    dtype: str
    sha256: str | None
    surviving: float | None
    fit: Fit | None

    @property
    def autov2(self) -> str | None:
        """The first ten digits of the SHA-256, by which model managers know a file."""
        return self.sha256 and self.sha256[:10]


def export(
    run: str | os.PathLike[str],
    file: str | Path,
    format: str = "unet",
    *,
    dtype: str | None = None,
    rank: int | None = None,
    lora_style: str | None = None,
    ema: bool | None = None,
) -> Exported:
    """Write a run's erased model to a folder or file, read it back, and note it in ``run.json``.

    Formats: "diffusers" is a folder with the whole pipeline; "unet" the UNet alone; "single-file" everything in the
    original layout (where the base model was such a file and its UNet was changed, a copy of it, by default with its
    own dtypes); "lora" the best fit to the change of a rank (64) with the keys of "kohya" or "diffusers"; "delta"
    what makes this UNet from the base model's in the same dtype. A run that changed the text encoder can only be a
    folder or a single file. Where no ``dtype`` is given, it is fp32. Files say in their metadata what was erased and
    how, the folder says it in its card. ``ema`` chooses the base model's weights where the run did not.

    Raises RequestError when the request is none of these, the run is not complete, ``file`` exists, the base model is
    needed and has changed since, or rounding to the dtype would leave no weight changed; EraseError, and leaves nothing
    behind, when it cannot be written as it is.
    """
    run, file = Path(run), Path(file)
    _check_options(format, dtype, rank, lora_style)
    run_info = _complete_info(run)
    source, embedded = Path(base_source(run_info)), "text_encoder" in run_info["erased"]
    if embedded and format not in ("diffusers", "single-file"):
        raise RequestError("format", format, "the run changed the text encoder; allowed: diffusers, single-file")
    if format != "diffusers" and file.suffix != ".safetensors":
        raise RequestError("out", file, "a file's name must end in .safetensors, by which others know what it is")
    with only_process(run, wait=True), _named_last(file, run / "pipeline", source) as unnamed:
        surviving, fit = _write(run, run_info, unnamed, format, dtype, rank, lora_style, ema)
        is_file = unnamed.is_file()
        kind = str(EXPORT_DTYPES[dtype or "fp32"]).removeprefix("torch.")
        written = read_dtypes(unnamed) if is_file and format != "delta" else kind
        exported = Exported(file, format, written, file_sha256(unnamed) if is_file else None, surviving, fit)
        _note(run, exported)
    return exported


@contextmanager
def _named_last(out: Path, *sources: Path) -> Iterator[Path]:
    """Give a path beside ``out`` that gets its name when the context ends, or is removed when that fails.

    So where the name exists, the export is complete. Raises RequestError as ``check_out`` does.
    """
    check_out(out, *sources)
    path = out.with_name(f"partial-{out.name}")
    try:
        yield path
        path.replace(out)
        to_disk(out.parent)
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _write(
    run: Path,
    run_info: dict[str, Any],
    file: Path,
    format: str,
    dtype: str | None,
    rank: int | None,
    lora_style: str | None,
    ema: bool | None,
) -> tuple[float | None, Fit | None]:
    """Write an export and read it back; return the share of changed weights that survives, and how a LoRA fits."""
    source, embedded = Path(base_source(run_info)), "text_encoder" in run_info["erased"]
    copied = format == "single-file" and not embedded and source.is_file() and is_safetensors(source)
    kind = None if copied and dtype is None else EXPORT_DTYPES[dtype or "fp32"]
    surviving, fit = None if format == "lora" else _surviving_share(run_info, kind), None
    # A LoRA is rounded once, at the end.
    erased = load(str(run / "pipeline"), dtype=torch.float32 if format == "lora" else kind or torch.float32)
    if format == "diffusers":
        save_pipeline(erased, file, (run / "pipeline" / "README.md").read_text(encoding="utf-8"))
    elif copied:
        base = _base(run, run_info, format, ema, erased)
        changed = _save_copy(base, erased, file, kind, _metadata(run, run_info, erased))
        surviving = changed / run_info["checks"]["changed"]
    elif format == "single-file":
        save_original(erased, file, kind, _metadata(run, run_info, erased))
    elif format == "unet":
        save_unet(erased.unet, file, _metadata(run, run_info, erased))
    elif format == "lora":
        options: dict[str, Any] = {"rank": rank or 64, "style": lora_style or "kohya", "dtype": kind}
        options["about"] = _metadata(run, run_info, erased, lora=True)
        fit = save_lora(_base(run, run_info, format, ema), erased.unet, file, **options)
    else:
        save_delta(_base(run, run_info, format, ema).unet, erased.unet, file, _about(run, run_info))
    return surviving, fit


def _complete_info(run: Path) -> dict[str, Any]:
    """Return a run's run.json; raises RequestError where it lacks what an export tells of."""
    run_info = read_run(run)
    for name in ("method", "concept", "mask", "erased", "checks"):
        if name not in run_info:
            raise RequestError("run", run, f"{RUN_FILE} is damaged: {name} is missing or wrong")
    return run_info


def _note(run: Path, done: Exported) -> None:
    """Note an export in ``run.json``, once."""
    told: dict[str, str | None] = {"file": done.path.name, "format": done.format, "dtype": done.dtype}
    told |= {"sha256": done.sha256, "autov2": done.autov2}
    run_info = read_run(run)
    if told not in (exports := run_info.get("exports", [])):
        write_json(run / "run.json", run_info | {"exports": [*exports, told]})


def _save_copy(
    base: Diffusion, erased: Diffusion, file: Path, kind: torch.dtype | None, metadata: dict[str, str]
) -> int:
    """Write a copy of the base model's file with the erased UNet; return how many of its weights differ in it.

    Without ``kind`` the copy keeps its dtypes. Where the UNet has several, no one hash is that of its weights. Raises
    RequestError, and leaves no file, when no weight differs.
    """
    written = kind or getattr(torch, base.stored, None)
    del metadata["erased_unet_sha256"]
    if written is not None:
        with silence_hub_logs():
            erased.unet.to(written)
        metadata["erased_unet_sha256"] = weights_hash(erased.unet)
    changed = save_original(base.with_components(unet=erased.unet), file, kind, metadata)
    if not changed:
        file.unlink()
        what = f"rounded to it, no weight differs from those of {model_name(base.source)}: nothing would be erased"
        raise RequestError("dtype", str(kind or base.stored).removeprefix("torch."), f"{what}; choose fp32")
    return changed


def _surviving_share(run_info: dict[str, Any], kind: torch.dtype | None) -> float | None:
    """Return the share of changed weights that still differ after rounding to a dtype; None where it is not known.

    Raises RequestError when none would.
    """
    checks = run_info["checks"]
    if kind in (None, torch.float32):
        return None if kind is None else 1.0
    left = checks.get("surviving", {}).get(str(kind).removeprefix("torch."))
    if left is None:  # an earlier version's run
        return None
    if not left:
        name = next(name for name, one in EXPORT_DTYPES.items() if one == kind)
        what = f"rounds all {checks['changed']:,} changed weights back to the base model's: nothing would be erased"
        raise RequestError("dtype", name, f"{what}; choose a finer one, such as fp32")
    return float(left / checks["changed"])


def _metadata(run: Path, run_info: dict[str, Any], model: Diffusion, *, lora: bool = False) -> dict[str, str]:
    """Return the metadata of a file with a model's UNet in it, or of a LoRA that makes it."""
    metadata = _about(run, run_info) | _modelspec(run_info, model, lora=lora)
    if not lora:
        metadata["erased_unet_sha256"] = weights_hash(model.unet)  # as it was rounded
    return metadata


def _about(run: Path, run_info: dict[str, Any]) -> dict[str, str]:
    """Return what an export says of its run: method, concept, hashes of mask, base and erased UNet, and the recipe."""
    return {
        "method": run_info["method"],
        "concept": run_info["concept"],
        "mask_sha256": run_info["mask"]["sha256"] if run_info["mask"] else "none",
        "base_unet_sha256": run_info["base"]["unet"],
        "erased_unet_sha256": run_info["erased"]["unet"],
        "recipe": public_recipe((run / "recipe.yaml").read_text(encoding="utf-8")),
    }


def _modelspec(run_info: dict[str, Any], model: Diffusion, *, lora: bool) -> dict[str, str]:
    base, concept = model_name(run_info["base"]["source"]), run_info["concept"]
    title = f"Erases {concept} from {base}" if lora else f"{base} without {concept}"
    description = f"The concept '{concept}' was erased from {base} with the method {run_info['method']}."
    prediction = prediction_of(model.scheduler)
    named = {"title": title, "description": description, "base": base}
    return modelspec(model.family, prediction, model.size, lora=lora, **named)


def _check_options(format: str, dtype: str | None, rank: int | None, lora_style: str | None) -> None:
    """Raise RequestError for options that are unknown or do not go together."""
    if format not in EXPORT_FORMATS:
        raise RequestError("format", format, f"allowed: {', '.join(EXPORT_FORMATS)}")
    if dtype not in (None, *EXPORT_DTYPES):
        raise RequestError("dtype", dtype, f"allowed: {', '.join(EXPORT_DTYPES)}")
    for setting, value in (("rank", rank), ("lora_style", lora_style)):
        if value is not None and format != "lora":
            raise RequestError(setting, value, f"goes with the format lora, not {format}")
    if rank is not None and rank < 1:
        raise RequestError("rank", rank, "must be 1 or more")
    if lora_style not in (None, *get_args(Style)):
        raise RequestError("lora_style", lora_style, f"allowed: {', '.join(get_args(Style))}")


def check_out(out: Path, *sources: Path) -> None:
    """Raise RequestError when a path to write exists already or lies in the folder of a model it is made from."""
    if out.exists():
        raise RequestError("out", out, "exists already; choose another name")
    for source in sources:
        if (source / "model_index.json").is_file() and source.resolve() in out.resolve().parents:
            raise RequestError("out", out, f"lies in {source}, which is never written to; choose another place")


def _base(
    run: Path, run_info: dict[str, Any], format: str, ema: bool | None, erased: Diffusion | None = None
) -> Diffusion:
    """Load the base model of a run; raises RequestError where it has changed since.

    With ``erased`` its other parts are compared with that model's, too: a copy takes them from the base model's file.
    """
    ema = read_recipe(run / "recipe.yaml").get("ema") if ema is None else ema
    base = load(base_source(run_info), ema=ema, keep_unet=True)  # as stored: a copy in fp32 is another 10 GB for SD XL
    if weights_hash(base.unet, torch.float32) != run_info["base"]["unet"]:
        raise RequestError("run", run, f"its base model {base.source} has changed since; {format} needs it")
    if erased is not None:
        for part, module in erased.modules.items():
            if part != "unet" and weights_hash(base.modules[part], erased.unet.dtype) != weights_hash(module):
                problem = f"the {part} of its base model {base.source} has changed since; {format} needs it"
                raise RequestError("run", run, problem)
    return base


def public_recipe(recipe: str) -> str:
    """Return a recipe in YAML without the folders of this machine: of paths the last name is left."""
    values = parse_yaml(recipe) or {}
    if "model" in values:
        values["model"] = model_name(str(values["model"]))
    return str(yaml.safe_dump(_without_folders(values), sort_keys=False, allow_unicode=True))


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    return model_name(value) if _PATH.match(value) else _FOLDERS.sub("", value)


def check_hub(repo: str, *, public: bool = False) -> None:
    """Refuse what could not be uploaded while nothing has been done yet.

    Raises RequestError when ``repo`` is no OWNER/NAME, there is no token, or the repository is a public one and
    ``public`` is not said; EraseError when the hub cannot be reached or refuses the token.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise RequestError("push_to_hub", repo, "must be OWNER/NAME")
    if get_token() is None:
        raise RequestError("push_to_hub", repo, "needs a token: run 'hf auth login' or set HF_TOKEN")
    api = HfApi()
    try:
        api.whoami()
        seen_by_all = api.repo_exists(repo) and not api.model_info(repo).private
    except Exception as problem:
        raise _refused(repo, problem) from None
    if seen_by_all and not public:
        raise RequestError("push_to_hub", repo, "is a public repository: set public, or choose another one")


def push(out: Path, repo: str, *, public: bool = False) -> str:
    """Upload a folder or file to a repository of the hub and return its address.

    Where there is none yet, it is made, and private unless ``public``. Raises EraseError when the hub cannot be reached
    or refuses.
    """
    api = HfApi()
    message = f"Upload {out.name}"
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if out.is_dir():
            api.upload_folder(repo_id=repo, folder_path=out, commit_message=message)
        else:
            api.upload_file(repo_id=repo, path_or_fileobj=out, path_in_repo=out.name, commit_message=message)
    except Exception as problem:
        raise _refused(repo, problem, f" ({out} is written)") from None
    return str(url)


def _refused(repo: str, problem: Exception, done: str = "") -> EraseError:
    """Make one line of what the hub's library raises, whose classes depend on its version, without the token."""
    said = " ".join(str(problem).split()) or type(problem).__name__
    if token := get_token():
        said = said.replace(token, "(the token)")
    return EraseError(f"nothing was uploaded to {repo}{done}: {said}")
