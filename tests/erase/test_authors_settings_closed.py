"""The presets of closed forms, ESD and SPM against a table of what their authors' papers and code say."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from erase_concept.errors import RequestError
from erase_concept.methods import METHODS
from erase_concept.presets import authors_settings
from erase_concept.prompts.concept import Concept, parse
from erase_concept.recipe import recipe_for

COCO_CAPTIONS = 414_113 + 202_654  # of COCO 2014, train and validation
ESD = {
    "eta": 1.0,
    "lr": 1e-5,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "batch_size": 1,
    "steps": 1000,
    "sampling_steps": 50,
    "start_guidance": 3.0,
    "sampled_by": "current",
    "scheduler": "DDIMScheduler",
    "decay": False,
    "warmup": 0,
}
ESD_LATER = ESD | {"lr": 5e-5, "steps": 200, "sampled_by": "base", "scheduler": "PNDMScheduler"}
UCE = {"tokens": "name-to-end", "erase_scale": 1.0, "preserve_scale": None, "ridge": 0.5}
UCE_LATER = UCE | {"tokens": "last", "preserve_scale": 0.0}  # nothing is preserved unless it is named
RECE = {
    "tokens": "name-to-end",
    "ridge": 0.5,
    "preserve_scale": 1.0,
    "epochs": 1,
    "regular_scale": 0.1,
    "round_tokens": "all",
    "round_ridge": 0.1,
    "round_preserve_scale": 0.1,
}
MACE = {
    "erase_scale": 1.0,
    "preserve_scale": 0.0,
    "fuse_preserve_scale": 0.0,
    "ridge": 1000.0,
    "tokens": "around-name",
    "lora": True,
    "steps": 50,
    "batch_size": 1,
    "lr": 1e-5,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "importance": True,
}
SPM = {
    "eta": 1.0,
    "anchoring": 1000.0,
    "anchors": 4,
    "anchors_from": "noise",
    "sampling_steps": 30,
    "start_guidance": 3.0,
    "vary_size": True,
    "lr": 1e-4,
    "optimizer": "adamw",
    "decay": True,
    "cycles": 3,
    "warmup": 500,
    "steps": 3000,
    "batch_size": 1,
    "strength": 1.0,
}
# Method, preset, kind: settings, and parts of the concept. A prior scale s and a domain weight w of MACE's weigh s w in
# the fusion; its first part multiplies by s once more.
TABLE: dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("esd-x", "paper", "style"): (ESD, {"templates": ("{O}",)}),
    ("esd-x", "latest-code", "style"): (ESD_LATER, {"templates": ("{O}",)}),
    ("esd-u", "paper", "object"): (ESD, {"templates": ("{O}",)}),
    ("esd-u", "paper", "nudity"): (ESD, {"templates": ("{O}",), "name": "nudity"}),
    ("esd-u", "latest-code", "object"): (ESD_LATER, {"templates": ("{O}",)}),
    ("esd-full", "paper", "object"): (ESD, {"templates": ("{O}",)}),
    ("uce", "paper", "style"): (UCE, {"templates": ("{O}",), "anchor": "art"}),
    ("uce", "paper", "object"): (UCE, {"templates": ("{O}",), "anchor": "", "retain": (), "others": ("",)}),
    ("uce", "paper", "nudity"): (UCE, {"name": "nudity", "anchor": "", "retain": (), "others": ("",)}),
    ("uce", "latest-code", "style"): (UCE_LATER, {"templates": ("{O}",), "anchor": "art"}),
    ("uce", "latest-code", "object"): (UCE_LATER, {"templates": ("{O}",), "anchor": ""}),
    ("rece", "paper", "object"): (RECE, {"templates": ("{O}",), "anchor": "", "retain": (), "others": ("",)}),
    ("rece", "paper", "nudity"): (RECE | {"epochs": 3}, {"name": "nudity", "anchor": "", "others": ("",)}),
    ("rece", "paper", "unsafe"): (RECE | {"epochs": 2}, {"templates": ("{O}",), "anchor": ""}),
    ("rece", "paper", "style"): (RECE | {"preserve_scale": 0.1, "regular_scale": 1e-3}, {"anchor": "art"}),
    ("mace", "paper", "object"): (MACE, {"anchor": "ground", "retain": (), "others": ("",)}),
    ("mace", "paper", "person"): (
        MACE | {"lr": 1e-4, "ridge": 0.0, "fuse_preserve_scale": 1e-4 * 8e3, "preserve_scale": 1e-4**2 * 8e3},
        {"anchor": "a person"},
    ),
    ("mace", "paper", "style"): (
        MACE | {"lr": 1e-4, "ridge": 0.0, "fuse_preserve_scale": 1e-4 * 8e4, "preserve_scale": 1e-4**2 * 8e4},
        {"anchor": "art"},
    ),
    ("mace", "paper", "nudity"): (
        MACE
        | {"ridge": 0.0, "steps": 120, "importance": False}
        | {"fuse_preserve_scale": 7e-7 * COCO_CAPTIONS / 180, "preserve_scale": 7e-7**2 * COCO_CAPTIONS / 180},
        {"name": "nudity", "synonyms": ("naked", "erotic", "sexual"), "anchor": "a person wearing clothes"},
    ),
    ("spm", "paper", "object"): (SPM, {"templates": ("{O}",), "anchor": ""}),
    ("spm", "paper", "style"): (SPM | {"strength": 2.0}, {"templates": ("{O}",), "anchor": ""}),
    ("spm", "paper", "nudity"): (SPM | {"strength": 2.0}, {"templates": ("{O}",), "anchor": "", "name": "nudity"}),
}
# What is trained; SPM's adapters are in the transformers of the whole UNet.
SCOPES = dict.fromkeys(("esd-x", "uce", "rece", "mace"), "cross-attention")
SCOPES |= {"esd-u": "noxattn", "esd-full": "full", "spm": "full"}
OURS = ("uce", "rece", "mace", "esd-x", "esd-u", "esd-full", "spm")


def described(kind: str) -> Concept:
    """A concept of a kind, as a user would describe it: a preset changes its settings, and not itself."""
    return parse({"name": "thing", "kind": kind, "templates": ["a photo of {O}"], "retain": ["other thing"]})


@pytest.mark.parametrize(("method", "preset", "kind"), TABLE)
def test_settings_and_prompts_are_the_authors(method: str, preset: str, kind: str) -> None:
    settings, concept = TABLE[method, preset, kind]
    recipe = recipe_for("model", described(kind), method=method, preset_name=preset)
    found = asdict(recipe.settings)
    for name, value in settings.items():
        exact = isinstance(value, str) or value is None
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-3)), name
    later_u = (method, preset) == ("esd-u", "latest-code")  # with the time embedding and the last layers
    assert recipe.mask.scope == ("non-cross-attention" if later_u else SCOPES[method])
    assert recipe.mask.kind == "none"
    entry, of = authors_settings()[method].of(preset, kind)
    assert of == kind
    changed = described(kind).changed(entry.concept)
    assert {name: getattr(changed, name) for name in concept} == concept
    if method == "mace":
        assert len(changed.templates) == len(set(changed.templates)) == 30
        assert (recipe.data.forget, recipe.data.steps, recipe.data.guidance) == (8, 30, 7.5)


@pytest.mark.parametrize("method", OURS)
def test_the_default_preset_has_the_authors_settings_for_every_kind(method: str) -> None:
    for kind in ("object", "style", "person", "character", "brand", "nudity", "unsafe", "custom"):
        default, paper = (
            recipe_for("model", described(kind), method=method, preset_name=name) for name in ("default", "paper")
        )
        assert default.settings == paper.settings
        assert default.concept == described(kind)
        told = " ".join(paper.notes)
        assert ("have no settings for the kind" in told) == ((method, "paper", kind) not in TABLE and kind != "nudity")


def test_the_catalogues_nudity_is_called_as_the_authors_call_it() -> None:
    for method in OURS:
        concept = recipe_for("model", "nudity", method=method, preset_name="paper").concept
        assert concept.name == "nudity"
        assert "nude person" not in concept.names
        assert recipe_for("model", "nudity", method=method).concept.name != "nudity"


def test_what_differs_is_said_in_sentences() -> None:
    for method in OURS:
        authors = authors_settings()[method]
        assert ": " in authors.source  # repository, and where in it
        assert authors.differs
        for sentence in authors.differs:
            assert sentence.endswith(".")
            assert "\n" not in sentence
        assert METHODS.find(method).paper.startswith("arXiv ")


def test_rece_mace_and_spm_have_no_later_code() -> None:
    for method in ("rece", "mace", "spm"):
        with pytest.raises(RequestError, match="changed nothing since the paper"):
            recipe_for("model", described("object"), method=method, preset_name="latest-code")
