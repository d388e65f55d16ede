"""Weight saliency: how strongly each weight bears on forgetting (SalUn, arXiv 2310.12508, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from erase_concept.pipelines.model import Diffusion

Accumulate = Literal["signed", "absolute", "squared"]


def accumulate(
    module: nn.Module, losses: Iterable[Callable[[], Tensor]], how: Accumulate = "signed", *, offload: bool = False
) -> dict[str, Tensor]:
    """Return each parameter's saliency over a sequence of losses, one per batch, in fp32.

    ``signed`` is the paper's |sum of gradients|, in which batches may cancel; ``absolute`` is the sum of |gradient|,
    ``squared`` that of gradient^2.
    Works one parameter at a time during the backward pass, so no batch's gradients ever exist in full beside the sums,
    which with ``offload`` are kept in main memory.
    The module's weights and ``requires_grad`` flags come out as they went in; gradients that it had are dropped.
    """
    parameters = dict(module.named_parameters())
    required = {name: p.requires_grad for name, p in parameters.items()}
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float32, device="cpu" if offload else p.device)
        for name, p in parameters.items()
    }

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None  # autograd calls this after it has set the gradient
            changed = {"absolute": Tensor.abs, "squared": Tensor.square}.get(how)
            sums[name] += (changed(gradient) if changed else gradient).to(sums[name])
            parameter.grad = None

        return hook

    module.zero_grad()
    module.requires_grad_(True)
    handles = [p.register_post_accumulate_grad_hook(collect(name)) for name, p in parameters.items()]
    try:
        for loss in losses:
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(required[name])
    return {name: total.abs_() for name, total in sums.items()}


def forgetting_loss(
    model: Diffusion,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    embeddings: Tensor,
    empty: Tensor,
    guidance: float = 0.0,
) -> Tensor:
    """Return the forgetting loss, minus the training loss on the concept's own latents and prompts.

    With ``guidance`` w > 0 the prediction is (1 + w) e(x_t, c) - w e(x_t, empty), as in the reference code, which
    uses w = 7.5: guidance of scale 1 + w; 0 leaves the plain prediction. ``empty`` is [1, tokens, width].
    """
    noisy = model.add_noise(latents, noise, timesteps)
    if guidance == 0:
        predicted = model.predict(noisy, timesteps, embeddings)
    else:
        predicted = model.cfg(noisy, timesteps, embeddings, empty, 1 + guidance)
    return -nn.functional.mse_loss(predicted, model.target(latents, noise, timesteps))
