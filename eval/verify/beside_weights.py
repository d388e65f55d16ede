"""Checks that what a model has beside its weights, its scheduler and tokenizers, is the base model's.

A tokenizer that no longer knows a word hides a concept that the weights still hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError
from erase_concept.eval.verify.check import Check, failed
from erase_concept.pipelines.load import beside_weights

_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "padding_side", "truncation_side")


def check_beside_weights(
    folder: Path, name: str, base: str, ema: bool | None, prompts: Sequence[str]
) -> Iterator[Check]:
    """Yield a check of each tokenizer of a model's folder, and of its scheduler with the pipeline's settings.

    ``name`` is the folder's from the certificate's, and ``prompts`` are cut into tokens by the tokenizers of both. One
    that does not hold or fail says why the base model's cannot be read. Raises RequestError where the folder's cannot.
    """
    after, own = beside_weights(folder)
    try:
        before, settings = beside_weights(base, ema=ema)
    except RequestError as problem:
        yield Check("scheduler and tokenizers", None, f"the base model's cannot be read: {problem.allowed}")
        return
    for part in sorted(after):
        if part != "scheduler":
            yield _check_tokenizer(part, f"{name}/{part}", before[part], after[part], prompts)
    one, other = (_behaviour(parts["scheduler"], found) for parts, found in ((before, settings), (after, own)))
    if key := next((key for key in sorted(one | other) if one.get(key) != other.get(key)), ""):
        file = f"{name}/model_index.json" if key in settings else f"{name}/scheduler/scheduler_config.json"
        yield failed("scheduler", file, f"has {key} {other.get(key)}, the base model's has {one.get(key)}")
    else:
        yield Check("scheduler", True, "has the base model's settings")


def _behaviour(scheduler: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return all that a scheduler does with its settings, defaults among them, and the pipeline's settings."""
    config = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    return {"class": type(scheduler).__name__, **config, **settings}


def _check_tokenizer(part: str, file: str, before: Any, after: Any, prompts: Sequence[str]) -> Check:
    words, own = before.get_vocab(), after.get_vocab()
    if word := next((word for word in sorted(words | own) if words.get(word) != own.get(word)), ""):
        numbers = f"as {own.get(word)}, the base model's as {words.get(word)}"
        return failed(part, file, f"knows {word!r} {numbers}")
    for key in (*_SPECIAL, "model_max_length"):
        if getattr(before, key, None) != getattr(after, key, None):
            has = f"has {key} {getattr(after, key, None)}, the base model's has {getattr(before, key, None)}"
            return failed(part, file, has)
    # What merges letters is not in the words alone.
    texts = list(dict.fromkeys([*before.batch_decode([[number] for number in sorted(words.values())]), *prompts]))
    for text, one, other in zip(texts, before(texts).input_ids, after(texts).input_ids, strict=True):
        if one != other:
            return failed(part, file, f"cuts {text!r} into other tokens than the base model's")
    return Check(part, True, f"cuts each of {len(texts):,} words and prompts into the base model's tokens")
