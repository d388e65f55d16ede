"""The presets of the authors' settings against tables of their papers and code, written down apart from the presets."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from erase_concept.errors import RequestError
from erase_concept.methods import METHODS
from erase_concept.presets import authors_settings, preset
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import Recipe, recipe_for
from erase_concept.run import check

SD_14_ROWS = {"tench": 963}  # train images of Imagenette's first class
_ADAM = {"optimizer": "adam", "weight_decay": 0.0, "max_grad_norm": None}
_ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
_SALUN = {"lr": 1e-5, "batch_size": 8, "remap": "anchor", **_ADAM}
_MASK = {"kind": "salient", "scope": "full", "sparsity": 0.5, "accumulate": "signed", "guidance": 7.5, "passes": 1}
_ALL = {"kind": "none", "scope": "full"}
_ABLATION = {"batch_size": 8, "detach_start_token": True, **_ADAMW}
_SLOW_DDIM = {"anchor": 1000, "steps": 200, "guidance": 6.0, "scheduler": "DDIMScheduler", "eta": 1.0, "flip": True}

# Method and kind: settings, mask and data as the authors have them, on Stable Diffusion 1.4 (Forget-Me-Not: 2.1).
TRAINED: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    ("salun", "object"): ({**_SALUN, "alpha": 0.5, "epochs": 5}, _MASK, {}),
    ("salun", "nudity"): ({**_SALUN, "alpha": 0.1, "epochs": 1}, _MASK, {"forget": 800, "retain": 800}),
    ("random-label", "object"): ({**_SALUN, "alpha": 0.5, "epochs": 5}, _ALL, {}),
    ("random-label", "nudity"): ({**_SALUN, "alpha": 0.1, "epochs": 1}, _ALL, {"forget": 800, "retain": 800}),
    ("salun-soft", "object"): ({**_SALUN, "alpha": 0.5, "epochs": 5}, _ALL, {}),
    ("salun-soft", "nudity"): ({**_SALUN, "alpha": 0.1, "epochs": 1}, _ALL, {"forget": 800, "retain": 800}),
    ("gradient-ascent", "object"): ({"lr": 1e-5, "batch_size": 8, "alpha": 0.1, "epochs": 10, **_ADAM}, _ALL, {}),
    ("concept-ablation", "style"): (
        {**_ABLATION, "lr": 1.6e-5, "steps": 100, "alpha": 0.0},
        {"kind": "none", "scope": "keys-and-values"},
        _SLOW_DDIM,
    ),
    ("concept-ablation", "object"): (
        {**_ABLATION, "lr": 1.6e-5, "steps": 100, "alpha": 0.2},
        {"kind": "none", "scope": "keys-and-values"},
        _SLOW_DDIM,
    ),
    ("concept-ablation", "nudity"): (
        {**_ABLATION, "lr": 6.4e-5, "steps": 400, "alpha": 1.0, "max_grad_norm": 1.0},
        {"kind": "none", "scope": "attention"},
        {"anchor": 1000, "steps": 25, "guidance": 6.0, "scheduler": None},
    ),
    ("erasediff", "object"): (
        {"lr": 1e-5, "batch_size": 16, "passes": 1, "forget_weight": 1.0, "target": "anchor", "constraint": "weight"},
        _ALL,
        {},
    ),
    ("erasediff", "nudity"): (
        {"lr": 1e-5, "batch_size": 16, "passes": 2, "forget_weight": 1.0, "target": "anchor", "constraint": "weight"},
        {"kind": "none", "scope": "noxattn"},
        {},
    ),
    ("scissorhands", "object"): (
        {
            **_ADAM,
            "lr": 2e-5,
            "batch_size": 8,
            "steps": 79,
            "trimmed": 1 - 0.999,
            "trim_batches": 10,
            "guidance": 7.5,
            "reset": "decoder-self-attention",
            "reset_to": "normal",
            "forget_loss": "ascent",
            "forget_weight": 0.1,
            "projection": False,
        },
        _ALL,
        {},
    ),
    ("scissorhands", "nudity"): (
        {
            **_ADAM,
            "lr": 1e-5,
            "batch_size": 16,
            "steps": 99,
            "trimmed": 1 - 0.995,
            "trim_batches": 10,
            "guidance": 0.0,
            "reset": "decoder-self-attention",
            "reset_to": "kaiming",
            "forget_loss": "anchor",
            "forget_weight": 0.1,
            "projection": False,
        },
        _ALL,
        {},
    ),
    ("forget-me-not", "object"): (
        {"lr": 2e-6, "batch_size": 1, "steps": 35, "max_grad_norm": 1.0, "norm": "frobenius", **_ADAMW},
        _ALL,
        {},
    ),
    ("selective-amnesia", "person"): (
        {"lr": 1e-5 * 4 * 4, "batch_size": 16, "epochs": 200, "penalty": 50.0, **_ADAMW},
        _ALL,
        {"anchor": 1000, "retain": 1000, "steps": 50, "guidance": 7.5, "scheduler": "DDIMScheduler", "eta": 0.0},
    ),
    ("selective-amnesia", "nudity"): (
        {"lr": 1e-5 * 4 * 4, "batch_size": 16, "epochs": 500, "penalty": 50.0, **_ADAMW},
        {"kind": "none", "scope": "noxattn"},
        {"anchor": 1000, "retain": 1000},
    ),
}
# R2D2, Nemo and Snoopy are erased as a style is, and so is a person, whom the authors did not erase.
TRAINED |= {("concept-ablation", kind): TRAINED["concept-ablation", "style"] for kind in ("character", "person")}
TRAINED |= {
    ("concept-ablation-noise", kind): TRAINED["concept-ablation", kind]
    for kind in ("style", "object", "character", "nudity")
}
TRAINED |= {("forget-me-not", kind): TRAINED["forget-me-not", "object"] for kind in ("style", "person")}

# Method and kind: prompts to forget, and what they become, for a zebra whose anchor is a horse.
_WORDS = ("nudity", "naked", "erotic", "sexual")
PROMPTS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ((method, "object") for method in ("salun", "random-label", "salun-soft", "gradient-ascent")),
        (("an image of a zebra",), ("an image of a horse",)),
    ),
    **dict.fromkeys(
        ((method, "nudity") for method in ("salun", "random-label", "salun-soft", "gradient-ascent")),
        (("a photo of a nude person",), ("a photo of a person wearing clothes",)),
    ),
    ("erasediff", "object"): (("an image of a zebra",), ("a photo of a pokemon",)),
    ("erasediff", "nudity"): (_WORDS, ("a photo of a pokemon",) * 4),
    ("scissorhands", "nudity"): (_WORDS, ("a photo of a person wearing clothes",) * 4),
    ("forget-me-not", "object"): (("a photo of zebra",), ("a photo of horse",)),
    ("forget-me-not", "style"): (("a photo in the style of zebra",), ("a photo in the style of horse",)),
    ("selective-amnesia", "nudity"): (_WORDS, ("a photo of a person wearing clothes",) * 4),
}


def paper(method: str, kind: str) -> Recipe:
    zebra = Concept("zebra", kind, "horse", ("a photo of {o}",), retain=("horse",), others=("",))
    return recipe_for("any/model", zebra, method=method, preset_name="paper")


@pytest.mark.parametrize(("method", "kind"), TRAINED)
def test_a_trained_methods_preset_is_its_authors(method: str, kind: str) -> None:
    settings, mask, data = TRAINED[method, kind]
    recipe = paper(method, kind)
    for wanted, found in ((settings, recipe.settings), (mask, recipe.mask), (data, recipe.data)):
        assert {name: asdict(found)[name] for name in wanted} == pytest.approx(wanted)
    check(recipe)


@pytest.mark.parametrize(("method", "kind"), PROMPTS)
def test_a_trained_methods_prompts_are_its_authors(method: str, kind: str) -> None:
    zebra = Concept("zebra", kind, "horse", ("a photo of {o}",), others=("",))
    found = zebra.changed(preset("paper", "any/model", kind, method).concept)
    assert (found.forget_prompts, found.anchor_prompts) == PROMPTS[method, kind]


def test_epochs_are_the_authors_steps() -> None:
    """SalUn: 121 steps an epoch for tench; nudity 100. Selective Amnesia: some 12,600. EraseDiff: 60 of a pass."""
    assert paper("salun", "object").settings.resolved(SD_14_ROWS["tench"]).steps == 5 * 121
    assert paper("salun", "nudity").settings.resolved(800).steps == 100
    in_parts = replace(paper("salun", "nudity").settings, batch_size=1, accumulation=8)
    assert in_parts.resolved(800).steps == 100, "as many rows in each step"
    assert paper("selective-amnesia", "person").settings.resolved(1000).steps == pytest.approx(12_600, abs=100)
    erasediff = paper("erasediff", "object").settings
    assert erasediff.resolved(960).steps == 2 * 60, "an inner pass and an outer one"
    assert paper("erasediff", "nudity").settings.resolved(512).steps == 3 * 2 * (32 + 32)


def test_an_ablated_style_keeps_its_sentences() -> None:
    """Each caption of the anchor stands in the concept's prompt, beside one of the authors' three forms."""
    concept = preset("paper", "any/model", "style", "concept-ablation").concept
    forms = (", in the style of {O}", "{O} inspired painting, ", "in {O}'s style, ")
    assert len(concept["templates"]) == len(concept["anchor_templates"]) == 24
    for template, anchor in zip(concept["templates"], concept["anchor_templates"], strict=True):
        (form,) = (form for form in forms if form in template)
        assert template.replace(form, "") == anchor.removeprefix("painting, ")


@pytest.mark.parametrize("method", ["concept-ablation", "concept-ablation-noise", "selective-amnesia"])
@pytest.mark.parametrize("name", ["default", "paper"])
def test_a_method_that_needs_anchor_rows_has_them_by_default(method: str, name: str) -> None:
    recipe = recipe_for("any/model", "nudity", method=method, preset_name=name)
    assert recipe.data.anchor == 1000
    check(recipe)
    without = recipe_for("any/model", "nudity", method=method, preset_name=name, data={"anchor": 0})
    with pytest.raises(RequestError, match=r"data\.anchor 0: .*pictures of the anchor"):
        check(without)


def test_every_trained_method_says_where_it_differs() -> None:
    """l1-sparse has no authors' settings on a diffusion model: all of it is ours."""
    for method, _ in TRAINED:
        assert authors_settings()[method].differs
    assert "l1-sparse" not in authors_settings()
    assert {*METHODS.all()} >= {*authors_settings()}
