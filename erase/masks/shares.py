"""Several processes rank weights together: each works on its own batches, and holds a share of every parameter.

The sums are those of one process, bit for bit: a weight's gradients are added in the order of the batches, by the one
process whose share it is in. No process holds the sums of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from erase_concept.masks.mask import Mask
from erase_concept.pipelines.processes import gathered, processes

_T = TypeVar("_T")


def sizes(weights: int) -> list[int]:
    """Return how many of a parameter's flattened weights each process holds: whole bytes of a mask, but for the end."""
    count = processes().num_processes
    width = math.ceil(weights / 8)
    bounds = [min(weights, 8 * (width * i // count)) for i in range(count + 1)]
    return [last - first for first, last in pairwise(bounds)]


def dealt(items: Iterable[_T]) -> Iterator[tuple[_T, int]]:
    """Yield this process's items, and with each how many processes have one of their own in this round.

    In the last round there may be too few. A process without one gets the last one that there is, so that all of them
    exchange as often; its gradients are not counted.
    """
    state, left = processes(), iter(items)
    while found := list(islice(left, state.num_processes)):
        yield found[min(state.process_index, len(found) - 1)], len(found)


def exchanged(gradient: Tensor, counted: int) -> Iterator[Tensor]:
    """Give each process its share of this gradient; yield the own share of the first ``counted`` processes' gradients.

    They come in the order of the processes, and so of their batches.
    """
    own = sizes(gradient.numel())
    mine = own[processes().process_index]
    received = gradient.new_empty(mine * len(own))
    torch.distributed.all_to_all_single(received, gradient.reshape(-1).contiguous(), [mine] * len(own), own)
    yield from received.split(mine)[:counted] if mine else ()


def counts_of_all(counts: Tensor) -> tuple[Tensor, int]:
    """Return the counts of all processes int64 [processes, m], and the place of this one: what ``top_k`` asks for."""
    return torch.stack(gathered(counts)), processes().process_index


def joined(own: Mask, shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Return the whole mask over parameters of these shapes, from the masks of all processes' shares."""
    parts = gathered(own.bits)
    return Mask({name: torch.cat([part[name] for part in parts]) for name in shapes}, dict(shapes))
