"""Prompt sets from the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.prompts.promptset import PromptSet, column_positions, first_values, make_row, read_prompts

HUB = "hub:"


def hub_prompts(name: str, limit: int | None) -> PromptSet:
    """Read the prompt set that ``hub:OWNER/NAME:SPLIT`` names: its CSV file, or its other files by ``datasets``.

    Raises RequestError when the set is not in the hub's cache and cannot be downloaded, and when the split does not
    name exactly one of its CSV files.
    """
    repository, _, split = name.removeprefix(HUB).partition(":")
    folder = _download(name, repository, ["*.csv"])
    files = sorted(folder.rglob("*.csv"))
    if not files:
        return _dataset_prompts(name, repository, split or "train", limit)
    if split and (len(files) > 1 or split != "train"):
        paths = {file: str(file.relative_to(folder)).lower() for file in files}
        files = [file for file, path in paths.items() if split.lower() in re.split(r"[\W_]+", path)]
    if len(files) != 1:
        there = ", ".join(str(file.relative_to(folder)) for file in sorted(folder.rglob("*.csv"))[:10])
        raise RequestError("prompts", name, f"{HUB}OWNER/NAME:SPLIT must name one of its CSV files: {there}")
    return replace(read_prompts(files[0], limit=limit), name=repository)


def _dataset_prompts(name: str, repository: str, split: str, limit: int | None) -> PromptSet:
    """Read a set that has no CSV file; raises RequestError when ``datasets`` is missing or cannot read the set."""
    try:
        from datasets import load_dataset
    except ImportError:
        needs = "has no CSV file, and other formats need datasets: pip install datasets"
        raise RequestError("prompts", name, needs) from None
    folder = _download(name, repository, ["*.parquet", "*.json", "*.jsonl", "README.md"])
    try:
        table = load_dataset(str(folder), split=split)
    except Exception as problem:  # of any format and library
        raise RequestError("prompts", name, f"could not be loaded: {_first_line(problem)}") from None
    columns = column_positions(table.column_names, name, "prompts")
    used = sorted({place for places in columns.values() for place in places})
    rows = []
    for place, record in enumerate(islice(table.select_columns([table.column_names[place] for place in used]), limit)):
        texts = ["" if (value := record.get(column)) is None else str(value) for column in table.column_names]
        try:
            rows.append(make_row(first_values(texts, columns), place))
        except ValueError as problem:
            raise RequestError("prompts", f"{name}, row {place + 1}", str(problem)) from None
    if not rows:
        raise RequestError("prompts", name, "the prompt set is empty")
    found = PromptSet(repository, tuple(rows), "" if limit is None else f"the first {len(rows):,} prompts")
    return found.without_minors()


def _download(name: str, repository: str, patterns: list[str]) -> Path:
    """Return the folder of a set in the hub's cache, downloaded if need be; raises RequestError when it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if repository.count("/") != 1:
            raise HFValidationError
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except HFValidationError:
        raise RequestError("prompts", name, f"must be {HUB}OWNER/NAME or {HUB}OWNER/NAME:SPLIT") from None
    except (GatedRepoError, RepositoryNotFoundError):
        login = "log in with 'hf auth login' or set HF_TOKEN"
        raise RequestError("prompts", name, f"is not on the hub, or needs a login there: {login}") from None
    except Exception as problem:  # the HTTP library and its errors depend on the version of huggingface_hub
        why = f"is not in the hub's cache and could not be downloaded ({_first_line(problem.__cause__ or problem)})"
        raise RequestError("prompts", name, f"{why}; save its CSV file and give its path instead") from None


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
