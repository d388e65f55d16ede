"""The masked optimizer: torch's own, run on the salient weights alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from erase_concept.mask import Mask

_INNER = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class MaskedOptimizer:
    """An Adam or AdamW whose step changes only the weights that a mask allows.

    ``inner`` is a torch optimizer over one compact fp32 vector per parameter, its salient weights. Its ``step`` first
    gathers their gradients, runs torch's fused update on the vectors, and writes these back. Weights outside the mask
    are never written, so they stay bit-identical whatever the settings: masking gradients alone would not do, because
    weight decay and momentum move a weight without any gradient. State exists for salient weights only. Gradients are
    dropped after each step; ``max_grad_norm`` clips the norm of the salient gradient before it.

    Sets ``requires_grad`` on the parameters with salient weights and clears it on the others. Without a mask every
    weight is salient. Raises RequestError when the mask does not fit the module, ValueError when it is empty.
    """

    def __init__(
        self,
        module: nn.Module,
        mask: Mask | None,
        name: Literal["adam", "adamw"] = "adam",
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        """Gather the salient weights of ``module`` and build the optimizer over them."""
        if mask is not None:
            mask.check(module)
        self.max_grad_norm = max_grad_norm
        self.parameters: list[nn.Parameter] = []
        self.places: list[Tensor | None] = []  # which weights of the flattened parameter; None for all of them
        self.vectors: list[nn.Parameter] = []
        for key, parameter in module.named_parameters():
            salient = None if mask is None else mask.dense(key).view(-1)
            parameter.requires_grad_(salient is None or bool(salient.any()))
            if not parameter.requires_grad:
                continue
            place = None if salient is None or salient.all() else salient.nonzero().view(-1).to(parameter.device)
            self.parameters.append(parameter)
            self.places.append(place)
            self.vectors.append(nn.Parameter(_gather(parameter.detach(), place).float().clone()))
        if not self.vectors:
            raise ValueError("the mask allows no weight to change")
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "fused": True}
        self.inner = _INNER[name](self.vectors, **options)
        self.inner.register_step_pre_hook(self._gather_gradients)
        self.inner.register_step_post_hook(self._write_back)

    def _gather_gradients(self, *_: object) -> None:
        for vector, parameter, place in zip(self.vectors, self.parameters, self.places, strict=True):
            vector.grad = None if parameter.grad is None else _gather(parameter.grad, place).float()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.vectors, self.max_grad_norm)

    @torch.no_grad()
    def _write_back(self, *_: object) -> None:
        for vector, parameter, place in zip(self.vectors, self.parameters, self.places, strict=True):
            vector.grad = parameter.grad = None
            if place is None:
                parameter.copy_(vector.view_as(parameter))
            else:
                parameter.view(-1).index_copy_(0, place, vector.to(parameter.dtype))

    def state(self) -> dict[str, Tensor]:
        """Return the salient weights and the optimizer's state as named tensors, for a checkpoint."""
        tensors = {f"weights.{i}": vector.detach() for i, vector in enumerate(self.vectors)}
        for i, vector in enumerate(self.vectors):
            tensors |= {f"{key}.{i}": value for key, value in self.inner.state[vector].items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``state`` returned, in the optimizer and in the module."""
        for i, vector in enumerate(self.vectors):
            vector.copy_(tensors[f"weights.{i}"])
            # The fused update wants its count of steps on the weights' device, like the rest of the state.
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.inner.state[vector] = {key: tensors[f"{key}.{i}"].to(vector.device) for key in keys}
        self._write_back()


def _gather(values: Tensor, place: Tensor | None) -> Tensor:
    flat = values.reshape(-1)
    return flat if place is None else flat.index_select(0, place)
