"""Weight saliency: how strongly each weight bears on forgetting (SalUn, arXiv 2310.12508, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from erase_concept.data import Batch
from erase_concept.masks.shares import dealt, exchanged, sizes
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.processes import processes

Accumulate = Literal["signed", "absolute", "squared"]


def accumulate(
    module: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    how: Accumulate = "signed",
    *,
    offload: bool = False,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Return each parameter's saliency over a sequence of losses, one per batch, in fp32.

    ``signed`` is the paper's |sum of gradients|, in which batches may cancel; ``absolute`` is the sum of |gradient|,
    ``squared`` that of gradient^2. With ``offload`` the sums are kept in main memory.
    With ``shared`` several processes share the losses, and each returns its share of every parameter, flattened; see
    ``shares``. Otherwise each process goes through all of them by itself.
    Each parameter's gradient is added to its sum during the backward pass and dropped, so that the gradients of all
    parameters never exist at once. Weights and ``requires_grad`` flags come out as they went in.
    """
    parameters = dict(module.named_parameters())
    required = {name: p.requires_grad for name, p in parameters.items()}
    shared = shared and processes().num_processes > 1
    counted = 1  # processes whose gradients count
    sums = {
        name: torch.zeros(
            sizes(p.numel())[processes().process_index] if shared else p.shape,
            dtype=torch.float32,
            device="cpu" if offload else p.device,
        )
        for name, p in parameters.items()
    }

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None  # autograd calls this after it has set the gradient
            changed = {"absolute": Tensor.abs, "squared": Tensor.square}.get(how)
            for one in exchanged(gradient, counted) if shared else (gradient,):
                sums[name] += (changed(one) if changed else one).to(sums[name])
            parameter.grad = None

        return hook

    for p in parameters.values():  # one by one, for a TorchScript module has no method for all
        p.requires_grad_(True)
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(collect(name)) for name, p in parameters.items()]
    try:
        for loss, among in dealt(losses) if shared else ((loss, 1) for loss in losses):
            counted = among
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(required[name])
    return {name: total.abs_() for name, total in sums.items()}


def forgetting_loss(model: Diffusion, batch: Batch, uncond: Tensor, guidance: float = 0.0) -> Tensor:
    """Return the forgetting loss, minus the training loss on rows of the concept.

    With ``guidance`` w > 0 the prediction is (1 + w) e(x_t, c) - w e(x_t, uncond), which is guidance of scale 1 + w, as
    in SalUn's code with w = 7.5; 0 leaves the plain prediction. ``uncond`` is [1, tokens, width].
    """
    if guidance == 0:
        predicted = model.predict(batch.noisy, batch.timesteps, batch.embeddings)
    else:
        predicted = model.cfg(batch.noisy, batch.timesteps, batch.embeddings, uncond, 1 + guidance)
    return -nn.functional.mse_loss(predicted, model.target(batch.latents, batch.noise, batch.timesteps))
