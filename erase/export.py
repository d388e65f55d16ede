"""Handing a run's result over: the erased model as a folder, a file, a LoRA or a delta, and to the hub if asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import HfApi, get_token

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.formats.delta import save_delta
from erase_concept.pipelines.formats.folder import save_original, save_pipeline, save_unet
from erase_concept.pipelines.formats.lora import Fit, Style, save_lora
from erase_concept.pipelines.load import load, silence_hub_logs
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.recipe import read_recipe
from erase_concept.run import read_run

EXPORT_FORMATS = ("diffusers", "unet", "single-file", "lora", "delta")
EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_run(
    run: Path,
    out: Path,
    format_: str = "unet",
    dtype: str = "fp32",
    *,
    rank: int | None = None,
    lora_style: str | None = None,
) -> Fit | None:
    """Write a run's erased model in a dtype, as a whole or in part, and read it back; return how well a LoRA fits.

    ``diffusers`` is a folder with the whole pipeline, ``unet`` its UNet alone, ``single-file`` all in the original
    layout (where the base model was such a file and its UNet was changed, a copy of it with its own dtypes), ``lora``
    what comes nearest to the change in a rank (64) with the keys of "kohya" or "diffusers", ``delta`` what makes this
    UNet of the base model's in the same dtype. Of a run that changed the text encoder the first and the third alone can
    tell. Files tell of the run in their metadata, the folder in its card.

    Raises RequestError when the request is none of these, the run is not complete, ``out`` exists, or the base model is
    needed and no longer what it was; EraseError, and leaves nothing behind, when it cannot be written as it is.
    """
    if format_ not in EXPORT_FORMATS:
        raise RequestError("--format", format_, f"allowed: {', '.join(EXPORT_FORMATS)}")
    if dtype not in EXPORT_DTYPES:
        raise RequestError("--dtype", dtype, f"allowed: {', '.join(EXPORT_DTYPES)}")
    for argument, value in (("--rank", rank), ("--lora-style", lora_style)):
        if value is not None and format_ != "lora":
            raise RequestError(argument, value, f"goes with --format lora, not {format_}")
    if rank is not None and rank < 1:
        raise RequestError("--rank", rank, "must be 1 or more")
    if lora_style not in (None, *get_args(Style)):
        raise RequestError("--lora-style", lora_style, f"allowed: {', '.join(get_args(Style))}")
    account = read_run(run)
    embedded = "text_encoder" in account["erased"]
    if embedded and format_ not in ("diffusers", "single-file"):
        raise RequestError("--format", format_, "the run changed the text encoder; allowed: diffusers, single-file")
    if format_ != "diffusers" and out.suffix != ".safetensors":
        raise RequestError("--out", out, "a file's name must end in .safetensors, by which others know what it is")
    check_out(out, run / "pipeline", Path(account["base"]["source"]))
    kind = EXPORT_DTYPES[dtype]
    if format_ == "diffusers":
        card = (run / "pipeline" / "README.md").read_text(encoding="utf-8")
        save_pipeline(load(run / "pipeline", dtype=kind), out, card)
        return None
    metadata = unet_metadata(account, (run / "recipe.yaml").read_text(encoding="utf-8"))
    if format_ == "unet":
        save_unet(load(run / "pipeline", dtype=kind).unet, out, kind, metadata)
        return None
    if format_ == "single-file" and (embedded or not Path(account["base"]["source"]).is_file()):
        save_original(load(run / "pipeline", dtype=kind), out, kind, metadata)
        return None
    erased, base = load(run / "pipeline"), _base(run, account, format_)
    if format_ == "single-file":
        base.unet.load_state_dict(erased.unet.state_dict())
        save_original(base, out, kind, metadata)
        return None
    if format_ == "lora":
        options: dict[str, Any] = {"rank": rank or 64, "style": lora_style or "kohya", "dtype": kind, "about": metadata}
        return save_lora(base.unet, erased.unet, base.family, out, **options)
    with silence_hub_logs():
        save_delta(base.unet.to(kind), erased.unet.to(kind), out, metadata)
    return None


def check_out(out: Path, *sources: Path) -> None:
    """Raise RequestError when a path to write exists already or lies in the folder of a model it is made from."""
    if out.exists():
        raise RequestError("--out", out, "exists already; choose another name")
    for source in sources:
        if (source / "model_index.json").is_file() and source.resolve() in out.resolve().parents:
            raise RequestError("--out", out, f"lies in {source}, which is never written to; choose another place")


def _base(run: Path, account: dict[str, Any], format_: str) -> Diffusion:
    base = load(account["base"]["source"], ema=read_recipe(run / "recipe.yaml").get("ema", True))
    if weights_hash(base.unet) != account["base"]["unet"]:
        raise RequestError("RUN", run, f"its base model {base.source} has changed since; {format_} needs it")
    return base


def unet_metadata(account: dict[str, Any], recipe: str) -> dict[str, str]:
    """Return what an exported UNet says of itself: method, concept, hashes of mask and base, and the recipe."""
    return {
        "method": account["method"],
        "concept": account["concept"],
        "mask_sha256": account["mask"]["sha256"] if account["mask"] else "none",
        "base_unet_sha256": account["base"]["unet"],
        "erased_unet_sha256": account["erased"]["unet"],
        "recipe": recipe,
    }


def check_hub(repo: str, *, public: bool = False) -> None:
    """Refuse what could not be uploaded while nothing has been done yet.

    Raises RequestError when ``repo`` is no OWNER/NAME, there is no token, or the repository is a public one and
    ``public`` is not said; EraseError when the hub cannot be reached or refuses the token.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise RequestError("--push-to-hub", repo, "must be OWNER/NAME")
    if get_token() is None:
        raise RequestError("--push-to-hub", repo, "needs a token: run 'hf auth login' or set HF_TOKEN")
    api = HfApi()
    try:
        api.whoami()
        seen_by_all = api.repo_exists(repo) and not api.model_info(repo).private
    except Exception as problem:
        raise _refused(repo, problem) from None
    if seen_by_all and not public:
        raise RequestError("--push-to-hub", repo, "is a public repository: say --public, or choose another one")


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
