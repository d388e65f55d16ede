"""SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761), of which the projection of the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from erase_concept.pipelines.guards import GUARDS
from erase_concept.pipelines.guards.guard import Guard
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings


@settings
class Safree:
    """The settings of SAFREE."""

    alpha: Annotated[
        float,
        described(
            "A token is projected unless leaving it out takes the prompt this share further from the concept.",
            ge=0,
            source="arXiv 2410.12761",
        ),
    ] = 0.01


def safree(model: Diffusion, names: Sequence[str], settings: Safree, prompts: Sequence[str]) -> Tensor:
    """Project the tokens that make a prompt speak of the concept away from it.

    The prompt with its i-th token masked is embedded as m_i, at its end token. d_i = |(I - C) m_i| is its distance
    from the subspace of the concept's names, onto which C projects. Token p is a trigger when, without it, the prompt
    is further away than without the others: d_i >= (1 + alpha) times the mean of the others' d. A trigger becomes
    M (I - C) p, where M projects onto the span of all m_i. That is the order of the paper; its code has (I - C) M.

    A masked token has the id 0, as there. The only token of a prompt has no others to be compared with, and is always
    a trigger. End tokens, padding and an embedding of the whole prompt stay as they are. Two parts of the paper are
    left out: returning to the plain prompt after some steps, and the attention to frequencies in the UNet.
    """
    outside = _complement(_ends(model, model.token_ids(names)))
    return torch.cat([_projected(model, outside, prompt, 1 + settings.alpha) for prompt in prompts])


def _projected(model: Diffusion, outside: Tensor, prompt: str, limit: float) -> Tensor:
    """Return one prompt's embeddings [1, tokens, width] with its triggers projected."""
    ids = model.token_ids([prompt])
    embeddings = model.encode_ids(ids)
    count = int(_end_places(model, ids)[0]) - 1
    if count == 0:
        return embeddings
    places = torch.arange(count)
    masked = [one.repeat(count, 1).index_put((places, places + 1), torch.zeros_like(one[0, 0])) for one in ids]
    ends = _ends(model, masked)
    distances = (ends @ outside).norm(dim=1)
    others = (distances.sum() - distances) / (count - 1)  # NaN for an only token
    triggers = ~(distances < limit * others)
    words = embeddings[0, 1 : count + 1].double().cpu()
    onto_masked = torch.eye(len(outside), dtype=torch.float64) - _complement(ends)
    projected = torch.where(triggers[:, None], words @ outside @ onto_masked, words)
    return embeddings.index_copy(1, places.to(embeddings.device) + 1, projected[None].to(embeddings))


def _ends(model: Diffusion, ids: Sequence[Tensor]) -> Tensor:
    """Return the embeddings at the end tokens, float64 [n, width]: each stands for its prompt as a whole."""
    embeddings = model.encode_ids(ids)
    rows = torch.arange(len(embeddings), device=embeddings.device)
    return embeddings[rows, _end_places(model, ids)].double().cpu()


def _end_places(model: Diffusion, ids: Sequence[Tensor]) -> Tensor:
    """Return the place of the first end token of each prompt, int64 [n]."""
    return (ids[0] == model.tokenizer.eos_token_id).int().argmax(1)


def _complement(rows: Tensor) -> Tensor:
    """Return the projection [width, width] away from the span of rows [n, width]."""
    return torch.eye(rows.shape[1], dtype=rows.dtype) - torch.linalg.pinv(rows) @ rows


GUARDS.add(
    Guard(
        "safree",
        "Project the prompt's tokens that speak of the concept away from it.",
        Safree,
        encode=safree,
        paper="arXiv 2410.12761",
    )
)
