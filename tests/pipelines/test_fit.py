"""The training of built-in models: it goes on where it was killed, and its schedule and averages are what they say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from erase_concept.pipelines.fit import Schedule, fit


def trained(work: Path, *, killed_at: int | None = None) -> dict[str, torch.Tensor]:
    """Fit a line in 600 steps; return the averaged weights."""
    torch.manual_seed(0)
    line = nn.Linear(2, 1)
    calls = 0

    def loss(rng: np.random.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 2))).float()
        return (line(x) - x.sum(1, keepdim=True) + 0.1 * torch.randn(8, 1)).square().mean()

    work.mkdir(exist_ok=True)
    return fit("line", {"line": line}, loss, work, Schedule(600, 1e-2, flat=0.3), seed=3)["line"].state_dict()


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", killed_at=550)
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    torch.testing.assert_close(whole["weight"], torch.ones(1, 2), atol=0.1, rtol=0)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [Schedule(2000, 1.0, flat=0.25).rate(step) for step in range(2000)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(rates[99:501]) == {1.0}
    assert rates[1250] == pytest.approx(0.5)  # half-way down the cosine
    assert all(later <= earlier for earlier, later in pairwise(rates[500:]))
    assert rates[-1] < 1e-5


def test_statistics_are_those_of_the_last_step(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2)

    def loss(rng: np.random.Generator) -> torch.Tensor:
        return norm(torch.from_numpy(rng.standard_normal((16, 2), np.float32)) * 3 + 5).square().mean()

    averaged = fit("norm", {"norm": norm}, loss, tmp_path, Schedule(50, 1e-3), seed=0)["norm"]
    assert torch.equal(averaged.running_var, norm.running_var)
    assert averaged.running_mean.mean() == pytest.approx(5, abs=0.5)
    assert int(averaged.num_batches_tracked) == 50
