"""Guards: ways to sample that keep a concept out of the images while no weight of the model changes.

They are what erasing is to be compared with, and no erasing: who has the weights can sample without them. A guard is
two functions: how prompts are embedded, and how the predictions of a sampling are guided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept

# Given noisy latents [n, 4, h, w], their time step, and how many predictions were made before: the guided prediction.
Predict = Callable[[Tensor, Tensor, int], Tensor]
# Given the model, the names of what is kept out, and prompts: their embeddings [n, tokens, width].
Encode = Callable[[Diffusion, Sequence[str], Sequence[str]], Tensor]
# Given the model, the names, embeddings [n, tokens, width], the empty prompt's [1, tokens, width], guidance scales
# [n, 1, 1, 1] and how many predictions will be made: the predictions of one sampling.
Guide = Callable[[Diffusion, Sequence[str], Tensor, Tensor, Tensor, int], Predict]


def plain_prompts(model: Diffusion, concepts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Embed prompts as they are."""
    return model.encode_prompts(prompts)


def classifier_free(
    model: Diffusion, concepts: Sequence[str], embeddings: Tensor, empty: Tensor, scale: Tensor, steps: int
) -> Predict:
    """Guide away from the empty prompt: plain classifier-free guidance (arXiv 2207.12598)."""
    return lambda noisy, timestep, step: model.cfg(noisy, timestep, embeddings, empty, scale)


def negative_prompt(
    model: Diffusion, concepts: Sequence[str], embeddings: Tensor, empty: Tensor, scale: Tensor, steps: int
) -> Predict:
    """Guide away from the concept's names instead of the empty prompt."""
    return classifier_free(model, concepts, embeddings, _named(model, concepts, empty), scale, steps)


@dataclass(frozen=True)
class Safety:
    """A configuration of safe latent diffusion; ``warmup`` counts in the 50 steps of the paper's samplings."""

    scale: float
    warmup: int
    threshold: float
    momentum_scale: float
    momentum_beta: float


def safe_latent_diffusion(
    safety: Safety,
    model: Diffusion,
    concepts: Sequence[str],
    embeddings: Tensor,
    empty: Tensor,
    scale: Tensor,
    steps: int,
) -> Predict:
    """Guide away from the concept where the prompt comes near it (SLD, Schramowski et al. 2023, arXiv 2211.05105).

    With predictions e for the empty prompt, e_p for the prompt and e_s for the concept's names, and guidance scale g:

        e + g (e_p - e - y)    y = m (e_s - e) + momentum_scale v    v becomes momentum_beta v + (1 - momentum_beta) y

    where m, for each element, is min(1, scale |e_p - e_s|) where e_p - e_s < threshold, and 0 elsewhere. The paper has
    max(1, ...) there, which would know no bound; the minimum is what its code computes. y is left out in the first
    steps, while v already grows: the same share of the sampling as in the paper, whatever the number of steps. All of
    it is in the model's own prediction type. Scale 0 is plain guidance, as in the authors' code.
    """
    if safety.scale == 0:
        return classifier_free(model, concepts, embeddings, empty, scale, steps)
    prompts = torch.cat([empty.expand_as(embeddings), embeddings, _named(model, concepts, empty).expand_as(embeddings)])
    momentum = torch.zeros((), device=embeddings.device)

    def predict(noisy: Tensor, timestep: Tensor, step: int) -> Tensor:
        nonlocal momentum
        thrice = timestep.to(noisy.device).expand(len(prompts))
        without, given, unsafe = model.predict(noisy.repeat(3, 1, 1, 1), thrice, prompts).chunk(3)
        gap = given - unsafe
        near = (safety.scale * gap.abs()).clamp(max=1) * (gap < safety.threshold)
        away = near * (unsafe - without) + safety.momentum_scale * momentum
        momentum = safety.momentum_beta * momentum + (1 - safety.momentum_beta) * away
        guided = given - without
        if 50 * step >= safety.warmup * steps:
            guided = guided - away
        return without + scale * guided

    return predict


def safree(model: Diffusion, concepts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Turn the tokens that make a prompt speak of the concept away from it (SAFREE, Yoon et al., arXiv 2410.12761).

    The prompt with its i-th token masked is embedded as m_i, at its end token; d_i = |(I - C) m_i| is how far it is
    from the subspace of the concept's names, onto which C projects. A token p without which the prompt is further away
    than without the others, d_i >= 1.01 times the mean of the others' d, becomes M (I - C) p, where M projects onto the
    span of all m_i. That is the order of the paper; its code has (I - C) M. A masked token has the id 0, as there. The
    only token of a prompt has no others to be compared with, and is always turned. End tokens, padding and XL's whole
    prompt stay as they are. Left out are the paper's other parts: going back to the plain prompt after some steps, and
    the attention to frequencies in the UNet.
    """
    outside = _complement(_ends(model, model.token_ids(concepts)))
    return torch.cat([_turned(model, outside, prompt) for prompt in prompts])


def _turned(model: Diffusion, outside: Tensor, prompt: str) -> Tensor:
    ids = model.token_ids([prompt])
    embeddings = model.encode_ids(ids)
    count = int(_end_places(model, ids)[0]) - 1
    if count == 0:
        return embeddings
    places = torch.arange(count)
    masked = [one.repeat(count, 1).index_put((places, places + 1), torch.zeros_like(one[0, 0])) for one in ids]
    ends = _ends(model, masked)
    distances = (ends @ outside).norm(dim=1)
    others = (distances.sum() - distances) / (count - 1)  # not a number for an only token
    triggers = ~(distances < 1.01 * others)
    words = embeddings[0, 1 : count + 1].double().cpu()
    within = torch.eye(len(outside), dtype=torch.float64) - _complement(ends)
    turned = torch.where(triggers[:, None], words @ outside @ within, words)
    return embeddings.index_copy(1, places.to(embeddings.device) + 1, turned[None].to(embeddings))


def _ends(model: Diffusion, ids: Sequence[Tensor]) -> Tensor:
    """Return the embeddings at the end tokens, float64 [n, width]: what stands for a prompt as a whole."""
    embeddings = model.encode_ids(ids)
    rows = torch.arange(len(embeddings), device=embeddings.device)
    return embeddings[rows, _end_places(model, ids)].double().cpu()


def _end_places(model: Diffusion, ids: Sequence[Tensor]) -> Tensor:
    return (ids[0] == model.tokenizer.eos_token_id).int().argmax(1)


def _complement(rows: Tensor) -> Tensor:
    """Return the projection [width, width] away from the span of rows [n, width]."""
    return torch.eye(rows.shape[1], dtype=rows.dtype) - torch.linalg.pinv(rows) @ rows


def _named(model: Diffusion, concepts: Sequence[str], empty: Tensor) -> Tensor:
    """Embed the concept's names, as one prompt [1, tokens, width]."""
    return model.encode_prompts([", ".join(concepts)]).to(empty)


@dataclass(frozen=True)
class Guard:
    """What ``sample`` needs of a guard: how it embeds prompts and guides predictions, and the names it keeps out."""

    name: str
    encode: Encode = plain_prompts
    guide: Guide = classifier_free
    concepts: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the docstring of what it does."""
        function = self.encode if self.guide is classifier_free else getattr(self.guide, "func", self.guide)
        return (function.__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        """Return the name and what is kept out, as it stands in the settings of images."""
        return f"{self.name}: {', '.join(self.concepts)}"


PLAIN = Guard("none")
# The numbers of safe latent diffusion are those of the paper's four configurations.
GUARDS = {
    guard.name: guard
    for guard in (
        Guard("negative-prompt", guide=negative_prompt),
        Guard("sld-weak", guide=partial(safe_latent_diffusion, Safety(200, 15, 0.0, 0.0, 0.0))),
        Guard("sld-medium", guide=partial(safe_latent_diffusion, Safety(1000, 10, 0.01, 0.3, 0.4))),
        Guard("sld-strong", guide=partial(safe_latent_diffusion, Safety(2000, 7, 0.025, 0.5, 0.7))),
        Guard("sld-max", guide=partial(safe_latent_diffusion, Safety(5000, 0, 1.0, 0.5, 0.7))),
        Guard("safree", encode=safree),
    )
}


def find_guard(name: str, concept: Concept) -> Guard:
    """Return a guard against a concept, under all of its names; raises RequestError when there is no such guard."""
    if name not in GUARDS:
        raise RequestError("--guard", name, f"allowed: {', '.join(GUARDS)}")
    return replace(GUARDS[name], concepts=concept.names)
