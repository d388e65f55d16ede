"""Which tokens of a prompt name what it is about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept


def prompt_tokens(model: Diffusion, prompt: str) -> list[int]:
    """Return a prompt's tokens, from the start token to the end token."""
    ids: list[int] = model.tokenizer(prompt, truncation=True, max_length=model.tokenizer.model_max_length).input_ids
    return ids


def name_spans(model: Diffusion, prompts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return for each prompt where its name's tokens begin, for the last time, and where they end: int64 [prompts, 2].

    Where the name is not found, as when it is empty or a word joins on to it, the span is all of the prompt's words.
    The empty prompt has none: its span is empty, behind the start token.
    """
    spans = []
    for prompt, name in zip(prompts, names, strict=True):
        ids, wanted = prompt_tokens(model, prompt), prompt_tokens(model, name)[1:-1]
        found = [i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
        spans.append((found[-1], found[-1] + len(wanted)) if found else (1, len(ids) - 1))
    return torch.tensor(spans)


def own_tokens(model: Diffusion, concept: Concept) -> Tensor:
    """Return the tokens that only the concept's prompts have, not its anchor's or retained ones: int64 [n].

    Raises RequestError where there is none, and for a model with two text encoders.
    """
    if len(model.text_encoders) > 1:
        raise RequestError("mask.scope", "text-encoder", f"{model.source} has two text encoders; choose another scope")
    others = [*concept.retain_prompts, *concept.anchor_prompts]
    own, shared = (
        {token for prompt in some for token in prompt_tokens(model, prompt)}
        for some in (concept.forget_prompts, others)
    )
    own -= shared | {*prompt_tokens(model, "")}
    if not own:
        names = ", ".join(concept.names)
        raise RequestError("concept", names, "has no word that is not in prompts of its anchor or to be retained")
    return torch.tensor(sorted(own))
