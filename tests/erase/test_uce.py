"""UCE against the published formula in numpy, from prompts to weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erase_concept.closed_form import matrices
from erase_concept.make_data import make_data
from erase_concept.masks.mask import Mask
from erase_concept.methods.uce import UCESettings, uce
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe, recipe_for
from erase_concept.run import iter_erase


@pytest.mark.parametrize("anchor", ["circle", ""])
@pytest.mark.parametrize("tokens", ["name-to-end", "last"])
def test_equals_the_formula_on_embedded_prompts(family: Diffusion, square: Concept, anchor: str, tokens: str) -> None:
    concept = replace(square, anchor=anchor)
    data = make_data(family, concept, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())
    base = {name: weight.double().numpy().copy() for name, weight in matrices(family.unet).items()}
    config = UCESettings(erase_scale=2.0, preserve_scale=0.3, ridge=0.7, tokens=tokens)
    (record,) = uce(family, data, None, config, seed=0)
    assert (record.step, record.steps) == (1, 1)
    assert record.loss == pytest.approx(
        2 * record.terms["erase"] + 0.3 * record.terms["preserve"] + 0.7 * record.terms["change"]
    )
    # One token for each letter: "a square" ends at 1 + 7 and "a circle" too, "one square" at 1 + 9, "" at 1 + 0.
    pairs = []
    for prompt, becomes, last in (("a square", "a circle", 7), ("one square", "one circle", 9)):
        end = last + 1 if tokens == "last" else 16
        c = family.encode_prompts([prompt])[0, last:end].double().numpy()
        start = last if anchor else 0
        u = family.encode_prompts([becomes if anchor else ""])[0, start : start + end - last].double().numpy()
        pairs += list(zip(c, u, strict=True))
    kept = family.encode_prompts(["a circle", "one circle", "a line", "one line", ""])[:, :16]
    kept = kept[range(5), [7, 9, 5, 7, 0]] if tokens == "last" else kept.flatten(0, 1)
    right = sum(2.0 * np.outer(c, c) for c, _ in pairs) + 0.7 * np.eye(len(pairs[0][0]))
    right = right + 0.3 * sum(np.outer(c, c) for c in kept.double().numpy())
    for name, weight in matrices(family.unet).items():
        left = sum(2.0 * np.outer(base[name] @ u, c) for c, u in pairs) + 0.7 * base[name]
        left = left + 0.3 * sum(np.outer(base[name] @ c, c) for c in kept.double().numpy())
        np.testing.assert_allclose(weight.numpy(), left @ np.linalg.inv(right), rtol=1e-3, atol=1e-6)


def test_a_run_needs_no_latents_and_moves_keys_and_values_alone(tiny: Diffusion, tmp_path: Path) -> None:
    save_pipeline(tiny, tmp_path / "model")
    concept = {"name": "square", "kind": "custom", "anchor": "circle", "templates": ["a {O}"], "retain": ["line"]}
    for kind, density in (("none", None), ("random", 0.5)):
        out = tmp_path / kind
        recipe = recipe_for(str(tmp_path / "model"), concept, method="uce", mask={"kind": kind} if density else {})
        assert (recipe.mask.kind, recipe.mask.scope) == (kind, "cross-attention")
        assert recipe.data_parts == ()
        list(iter_erase(recipe, out))
        account = json.loads((out / "run.json").read_text())
        assert account["checks"]["changed_outside_mask"] == 0
        count = sum(weight.numel() for weight in matrices(tiny.unet).values())
        assert 0.5 * count * (density or 1) < account["checks"]["changed"] <= count
        assert Mask.load(out / "mask.safetensors").density < 0.2
        lines = (out / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["steps"] for line in lines] == [1]
