"""The masked optimizer's update of 50 million weights, half of them salient: numba's against torch's, to the same bits.

    python benchmarks/update.py          half a minute on two cores

The two take turns, five times. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}.
"""

from __future__ import annotations

import json
import time
from statistics import median

import torch
from full_size import row
from torch import nn

from erase_concept import masks
from erase_concept.training import optimizer as optim

WEIGHTS = 50_000_000


def main() -> None:
    """Measure and print."""
    layers = {compiled: nn.Linear(WEIGHTS // 5000, 5000, bias=False) for compiled in (True, False)}
    layers[False].load_state_dict(layers[True].state_dict())
    mask = masks.random(layers[True], 0.5, seed=0)
    optimizers = {
        compiled: optim.MaskedOptimizer(layer, mask, optim.Adam(lr=1e-3)) for compiled, layer in layers.items()
    }
    gradient = torch.randn(layers[True].weight.shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(6):  # the first is for numba to compile, and for both to get their memory
        for compiled, layer in layers.items():
            optim._COMPILED = compiled
            layer.weight.grad = gradient
            began = time.perf_counter()
            optimizers[compiled].step()
            seconds[compiled].append(time.perf_counter() - began)
    if not torch.equal(layers[True].weight, layers[False].weight):
        raise SystemExit("the two updates differ")
    ours, plain = (median(found[1:]) for found in seconds.values())
    name = f"masked update, {WEIGHTS / 1e6:g} million weights"
    print(json.dumps([row(name, ours, "s", plain, "<= 0.5", holds=ours <= 0.5 * plain)], indent=1))


if __name__ == "__main__":
    main()
