"""Export a run's erased model: a folder, a file, a LoRA or a delta, and an upload to the hub if asked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import HfApi, get_token

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.formats.delta import save_delta
from erase_concept.pipelines.formats.folder import save_pipeline, save_unet
from erase_concept.pipelines.formats.lora import Fit, Style, save_lora
from erase_concept.pipelines.formats.single_file import save_original
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.recipe import read_recipe
from erase_concept.run_folder import base_source, read_run

EXPORT_FORMATS = ("diffusers", "unet", "single-file", "lora", "delta")
EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    run: str | os.PathLike[str],
    file: str | Path,
    format: str = "unet",
    *,
    dtype: str = "fp32",
    rank: int | None = None,
    lora_style: str | None = None,
    ema: bool | None = None,
) -> Fit | None:
    """Write a run's erased model to a folder or file, and read it back; return how well a LoRA fits.

    Formats: "diffusers" is a folder with the whole pipeline; "unet" the UNet alone; "single-file" everything in the
    original layout (where the base model was such a file and its UNet was changed, a copy of it with its own dtypes);
    "lora" the best fit to the change of a rank (64) with the keys of "kohya" or "diffusers"; "delta" what makes this
    UNet from the base model's in the same dtype. A run that changed the text encoder can only be a folder or a single
    file. Files say in their metadata what was erased and how, the folder says it in its card.

    ``ema`` chooses the base model's weights where the run did not.

    Raises RequestError when the request is none of these, the run is not complete, ``file`` exists, or the base model
    is needed and has changed since; EraseError, and leaves nothing behind, when it cannot be written as it is.
    """
    run, file = Path(run), Path(file)
    _check_options(format, dtype, rank, lora_style)
    run_info = read_run(run)
    source = Path(base_source(run_info))
    embedded = "text_encoder" in run_info["erased"]
    if embedded and format not in ("diffusers", "single-file"):
        raise RequestError("format", format, "the run changed the text encoder; allowed: diffusers, single-file")
    if format != "diffusers" and file.suffix != ".safetensors":
        raise RequestError("out", file, "a file's name must end in .safetensors, by which others know what it is")
    check_out(file, run / "pipeline", source)
    kind, pipeline = EXPORT_DTYPES[dtype], str(run / "pipeline")
    metadata = unet_metadata(run_info, (run / "recipe.yaml").read_text(encoding="utf-8"))
    if format == "diffusers":
        save_pipeline(load(pipeline, dtype=kind), file, (run / "pipeline" / "README.md").read_text(encoding="utf-8"))
    elif format == "unet":
        save_unet(load(pipeline, dtype=kind).unet, file, kind, metadata)
    elif format == "single-file" and (embedded or not source.is_file()):
        save_original(load(pipeline, dtype=kind), file, kind, metadata)
    else:
        erased, base = load(pipeline), _base(run, run_info, format, ema)
        if format == "lora":
            options: dict[str, Any] = {"rank": rank or 64, "style": lora_style or "kohya", "dtype": kind}
            return save_lora(base.unet, erased.unet, base.family, file, about=metadata, **options)
        if format == "single-file":
            base.unet.load_state_dict(erased.unet.state_dict())
            save_original(base, file, kind, metadata)
        else:
            with silence_hub_logs():
                save_delta(base.unet.to(kind), erased.unet.to(kind), file, metadata)
    return None


def _check_options(format: str, dtype: str, rank: int | None, lora_style: str | None) -> None:
    """Raise RequestError for options that are unknown or do not go together."""
    if format not in EXPORT_FORMATS:
        raise RequestError("format", format, f"allowed: {', '.join(EXPORT_FORMATS)}")
    if dtype not in EXPORT_DTYPES:
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


def _base(run: Path, run_info: dict[str, Any], format: str, ema: bool | None) -> Diffusion:
    ema = read_recipe(run / "recipe.yaml").get("ema") if ema is None else ema
    base = load(base_source(run_info), ema=ema)
    if weights_hash(base.unet) != run_info["base"]["unet"]:
        raise RequestError("run", run, f"its base model {base.source} has changed since; {format} needs it")
    return base


def unet_metadata(run_info: dict[str, Any], recipe: str) -> dict[str, str]:
    """Return what an exported UNet says of itself: method, concept, hashes of mask and base, and the recipe."""
    return {
        "method": run_info["method"],
        "concept": run_info["concept"],
        "mask_sha256": run_info["mask"]["sha256"] if run_info["mask"] else "none",
        "base_unet_sha256": run_info["base"]["unet"],
        "erased_unet_sha256": run_info["erased"]["unet"],
        "recipe": recipe,
    }


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
