"""Several processes train one model: they average the gradients of the weights that the mask lets change, alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from erase_concept.training.optimizer import MaskedOptimizer

Value = tuple[Tensor, dict[str, Tensor]]  # a loss, and its terms for the log


class LossOf(nn.Module):
    """A loss as the output of a module, which owns the weights that are trained.

    Distributed training follows the graph from a module's output to find the weights that it does not depend on. A loss
    of attention maps, say, depends on fewer weights than a prediction does.
    """

    def __init__(self, trained: nn.Module, loss: Callable[..., Value]) -> None:
        """Take the module that is trained, and a loss that depends on its weights."""
        super().__init__()
        self.trained, self.loss = trained, loss

    def forward(self, *given: Any) -> Value:
        """Compute the loss. No graph leads to its terms."""
        value, terms = self.loss(*given)
        return value, {name: term.detach() for name, term in terms.items()}


# An unused weight is found only where it is looked for, and no loss says beforehand whether it has any. Where there is
# none torch warns, unless TORCH_CPP_LOG_LEVEL is ERROR, to which the command sets it.
# Gradients are parts of what is exchanged, and no copies of them.
DDP_SETTINGS = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)


def shared(accelerator: Accelerator, loss: LossOf, masked: MaskedOptimizer) -> nn.Module:
    """Let several processes train: return what computes the loss and averages the gradients in its backward pass.

    They send each other the gradients of salient weights alone. Those of the others become zero. A single process has
    nothing to send, and of weights in shards FSDP sends the gradients itself.
    """
    prepared: nn.Module = loss if masked.sharded else accelerator.prepare(loss)
    if not isinstance(prepared, DistributedDataParallel):
        return prepared
    places = {id(one.parameter): one for one in masked.salient.values()}

    def chosen(bucket: Any) -> Tensor:
        return torch.cat([places[id(p)].chosen() for p in bucket.parameters()])

    # Without annotations: torch compares them, and these are texts.
    prepared.register_comm_hook(None, lambda _, bucket: averaged(bucket.buffer(), chosen(bucket)))
    return prepared


def averaged(gradients: Tensor, chosen: Tensor) -> Future[Tensor]:
    """Average gradients [n] over the processes, in place, where they are chosen, bool [n]; the others become zero."""
    sent = gradients[chosen].div_(torch.distributed.get_world_size())
    work: Any = torch.distributed.all_reduce(sent, async_op=True)

    def put_back(done: Future[list[Tensor]]) -> Tensor:
        return gradients.zero_().masked_scatter_(chosen, done.value()[0])

    future: Future[Tensor] = work.get_future().then(put_back)
    return future
