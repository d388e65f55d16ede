"""MACE's closed form against its formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erase_concept import masks
from erase_concept.closed_form import matrices
from erase_concept.make_data import make_data
from erase_concept.methods.mace import MACESettings, mace
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe

CONCEPT = Concept("square", "object", "disc", ("a {O} red",), retain=("line",), others=("",))


def test_equals_the_formula_over_the_words_behind_the_name(family: Diffusion) -> None:
    data = make_data(family, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    base = {name: weight.double().numpy().copy() for name, weight in matrices(family.unet).items()}
    (record,) = mace(family, data, None, MACESettings(erase_scale=2.0, preserve_scale=0.3, ridge=5.0), seed=0)
    # One token for each letter: behind "a square" come "red", the end and padding, at 8 to 15; behind "a disc" at 6.
    e_f = family.encode_prompts(["a square red"])[0, 8:16].double().numpy()
    e_g = family.encode_prompts(["a disc red"])[0, 6:14].double().numpy()
    kept = family.encode_prompts(["a line red", ""])[:, :16].flatten(0, 1).double().numpy()
    right = 2 * e_f.T @ e_f + 0.3 * kept.T @ kept + 5 * np.eye(kept.shape[1])
    loss = 0.0
    for name, weight in matrices(family.unet).items():
        left = 2 * (base[name] @ e_g.T) @ e_f + 0.3 * (base[name] @ kept.T) @ kept + 5 * base[name]
        now = left @ np.linalg.inv(right)
        np.testing.assert_allclose(weight.numpy(), now, rtol=1e-3, atol=1e-6)
        loss += 2 * np.square(now @ e_f.T - base[name] @ e_g.T).sum() + 5 * np.square(now - base[name]).sum()
        loss += 0.3 * np.square((now - base[name]) @ kept.T).sum()
    assert record.loss == pytest.approx(loss, rel=1e-4)


def test_the_words_around_the_name_lose_it(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    tokens, wanted = data.forget[0], data.remap[0, 0]
    base = {name: weight.clone() for name, weight in matrices(tiny.unet).items()}
    list(mace(tiny, data, None, MACESettings(preserve_scale=0.0, ridge=1e-6), seed=0))
    for name, weight in matrices(tiny.unet).items():
        torch.testing.assert_close(weight @ tokens[8:].T, base[name] @ wanted[6:14].T, rtol=1e-3, atol=1e-3)


def test_keeps_to_the_mask(tiny: Diffusion) -> None:
    data = make_data(tiny, CONCEPT, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    mask = masks.random(tiny.unet, 0.5, seed=4)
    list(mace(tiny, data, mask, MACESettings(), seed=0))
    for name, p in tiny.unet.named_parameters():
        moved = p.view(torch.int32) != before[name].view(torch.int32)
        assert not (moved & ~mask.dense(name)).any()
        assert bool(moved.any()) == (name in matrices(tiny.unet))
