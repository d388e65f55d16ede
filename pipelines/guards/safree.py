"""SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761), but for its attention to frequencies in the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from erase_concept.pipelines.guards import GUARDS
from erase_concept.pipelines.guards.guard import Guard, Predict, encode_names
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings

_PAPER, _CODE = "arXiv 2410.12761", "the authors' code"
# The authors' phrases for nudity.
PHRASES = (
    *("Sexual Acts", "Content Meant to Arouse Sexual Excitement", "Nudity", "Pornography", "Erotic Art", "Lustful"),
    *("Seductive", "Orgasmic", "Libido", "Kinky", "Sexual Orientation", "Sexual Attraction", "Sexual Intercourse"),
    *("Sexual Pleasure", "Sexual Fantasy", "Carnal Desires", "Sexual Gratification"),
)


@settings
class Safree:
    """The settings of SAFREE."""

    alpha: Annotated[
        float,
        described(
            "A token is projected unless leaving it out takes the prompt this share further from the concept.",
            ge=0,
            source=_PAPER,
        ),
    ] = 0.01
    negative: Annotated[bool, described("Guide away from the terms too, as with a negative prompt.", source=_CODE)] = (
        True
    )
    filter: Annotated[
        bool,
        described("Take the projected prompt for the first steps alone, for fewer the less it changed.", source=_CODE),
    ] = True
    filter_steps: Annotated[int, described("The most such steps, of 50 sampling steps.", ge=0, source=_CODE)] = 10
    filter_middle: Annotated[
        float,
        described(
            "Ten times the change at which it is half of these steps.",
            ge=0,
            source=f"{_CODE} for nudity; 5.5 for artists",
        ),
    ] = 5.333
    filter_slope: Annotated[
        float,
        described("How fast the steps grow with the change.", ge=0, source=f"{_CODE} for nudity; 3.5 for artists"),
    ] = 2.5
    terms: Annotated[
        str,
        described(
            "What to keep out, with commas between; not given, the authors' 17 phrases for nudity, and the names of "
            "any other concept.",
            source=_CODE,
        ),
    ] = ""


def safree(model: Diffusion, names: Sequence[str], settings: Safree, prompts: Sequence[str]) -> Tensor:
    """Project the tokens that make a prompt speak of the concept away from it.

    The prompt with its i-th token masked is embedded as m_i, at its end token. d_i = |(I - C) m_i| is its distance
    from the subspace of the concept's names, onto which C projects. Token p is a trigger when, without it, the prompt
    is further away than without the others: d_i >= (1 + alpha) times the mean of the others' d. A trigger becomes
    (I - C) M p, where M projects onto the span of all m_i. That is the order of the authors' code; the paper has
    M (I - C).

    A masked token has the id 0, as there. The only token of a prompt has no others to be compared with, and is always
    a trigger. End tokens, padding and an embedding of the whole prompt stay as they are.

    With ``filter`` it returns the plain embeddings, behind them the projected ones, and as a last token the number of
    the last sampling step, of 50, that takes the projected ones: filter_steps times  s(2 slope (10 b - middle)),
    rounded, where s is the sigmoid and b = 1 - the mean cosine of p and (I - C) M p over all tokens p from the start to
    the end. ``guide`` takes them so.
    """
    outside = _complement(_ends(model, model.token_ids(names)))
    found = [_projected(model, outside, prompt, settings) for prompt in prompts]
    if not settings.filter:
        return torch.cat([projected for _, projected, _ in found])
    rows = [torch.cat([plain, changed, torch.full_like(plain[:, :1], last)], 1) for plain, changed, last in found]
    return torch.cat(rows)


def guide(
    model: Diffusion,
    names: Sequence[str],
    settings: Safree,
    embeddings: Tensor,
    uncond: Tensor,
    scale: Tensor,
    steps: int,
) -> Predict:
    """Classifier-free guidance by what ``safree`` returned, away from the terms or from the empty prompt."""
    away = encode_names(model, names, uncond) if settings.negative else uncond
    if not settings.filter:
        return lambda noisy, timestep, step: model.cfg(noisy, timestep, embeddings, away, scale)
    plain, projected = embeddings[:, :-1].chunk(2, 1)
    last = embeddings[:, -1:, :1]

    def predict(noisy: Tensor, timestep: Tensor, step: int) -> Tensor:
        used = torch.where(50 * step <= last * steps, projected, plain)
        return model.cfg(noisy, timestep, used, away, scale)

    return predict


def _projected(model: Diffusion, outside: Tensor, prompt: str, settings: Safree) -> tuple[Tensor, Tensor, int]:
    """Return one prompt's embeddings [1, tokens, width], the same with its triggers projected, and the last step."""
    ids = model.token_ids([prompt])
    embeddings = model.encode_ids(ids)
    count = int(_end_places(model, ids)[0]) - 1
    if count == 0:
        return embeddings, embeddings, 0
    places = torch.arange(count)
    masked = [one.repeat(count, 1).index_put((places, places + 1), torch.zeros_like(one[0, 0])) for one in ids]
    ends = _ends(model, masked)
    distances = (ends @ outside).norm(dim=1)
    others = (distances.sum() - distances) / (count - 1)  # NaN for an only token
    triggers = ~(distances < (1 + settings.alpha) * others)
    plain = embeddings[0, : count + 2].double().cpu()  # from the start token to the end token
    onto_masked = torch.eye(len(outside), dtype=torch.float64) - _complement(ends)
    projected = plain @ onto_masked @ outside
    words = torch.where(triggers[:, None], projected[1:-1], plain[1:-1])
    changed = embeddings.index_copy(1, places.to(embeddings.device) + 1, words[None].to(embeddings))
    beta = 1 - cosine_similarity(plain, projected).mean()
    share = (2 * settings.filter_slope * (10 * beta - settings.filter_middle)).sigmoid()
    return embeddings, changed, round(settings.filter_steps * float(share))


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
        guide=guide,
        paper=_PAPER,
        terms={"nudity": PHRASES},
    )
)
