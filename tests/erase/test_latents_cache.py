"""Sampled latents that are kept across runs and methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erase_concept import make_data as module
from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.latents_cache import VARIABLE, LatentsCache, cache_folder
from erase_concept.make_data import make_data
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe

SMALL = DataRecipe(forget=18, retain=3, steps=2, guidance=2.0)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the sampler made."""
    calls: list[int] = []
    own = module.sample_latents

    def counted(*args, **options):
        calls.append(len(args[1]))
        return own(*args, **options)

    monkeypatch.setattr(module, "sample_latents", counted)
    return calls


def make(model: Diffusion, concept: Concept, folder: Path | None, settings: DataRecipe = SMALL) -> ForgetRetain:
    cache = folder and LatentsCache(folder, weights_hash(model.unet))
    return make_data(model, concept, settings, seed=1, cache=cache)


def same(a: ForgetRetain, b: ForgetRetain) -> bool:
    return torch.equal(a.forget_latents, b.forget_latents) and torch.equal(a.retain_latents, b.retain_latents)


def test_what_was_sampled_is_not_sampled_again(tiny: Diffusion, square: Concept, tmp_path: Path, sampled: list) -> None:
    first = make(tiny, square, tmp_path)
    assert sampled == [16, 2, 3]
    assert same(make(tiny, square, tmp_path), first)
    assert sampled == [16, 2, 3]
    assert same(make(tiny, square, None), first)
    assert sampled[3:] == [16, 2, 3]
    make(tiny, square, tmp_path, replace(SMALL, retain=4))  # the other part stays
    assert sampled[6:] == [4]


def test_a_killed_run_finds_its_first_batches(
    tiny: Diffusion, square: Concept, tmp_path: Path, sampled: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, counted = make(tiny, square, None), module.sample_latents
    del sampled[:]

    def killed(*args, **options):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return counted(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "sample_latents", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tiny, square, tmp_path)
    assert same(make(tiny, square, tmp_path), whole)
    assert sampled == [16, 2, 3]


@pytest.mark.parametrize("changed", ["steps", "guidance", "scheduler", "unet", "noise", "prompts", "dtype"])
def test_whatever_shapes_them_makes_others(
    tiny: Diffusion, square: Concept, tmp_path: Path, sampled: list, changed: str
) -> None:
    make(tiny, square, tmp_path)
    settings, concept, before = SMALL, square, len(sampled)
    if changed == "steps":
        settings = replace(SMALL, steps=3)
    elif changed == "guidance":
        settings = replace(SMALL, guidance=3.0)
    elif changed == "scheduler":
        settings = replace(SMALL, scheduler="DDIMScheduler")
    elif changed == "unet":
        with torch.no_grad():
            next(tiny.unet.parameters()).add_(1e-3)
    elif changed == "noise":
        tiny.scheduler.register_to_config(beta_end=0.013)
    elif changed == "prompts":
        concept = replace(square, templates=("the {O}", "one {O}"))
    else:
        tiny.unet.bfloat16()
    make(tiny, concept, tmp_path, settings)
    assert len(sampled) > before


def test_damaged_files_are_made_again(tiny: Diffusion, square: Concept, tmp_path: Path, sampled: list) -> None:
    first = make(tiny, square, tmp_path)
    torn, flipped, empty = sorted(tmp_path.glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-100])
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    empty.write_bytes(b"")
    assert same(make(tiny, square, tmp_path), first)
    assert len(sampled) == 6
    assert same(make(tiny, square, tmp_path), first)
    assert len(sampled) == 6


def test_a_folder_that_cannot_be_written_costs_a_warning(tiny: Diffusion, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache, made = LatentsCache(tmp_path / "file" / "latents", "hash"), torch.ones(1, 4, 8, 8)
    with pytest.warns(UserWarning, match="sampled latents could not be kept"):
        assert cache.find_or_make(tiny, {"size": 8}, lambda: made) is made


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert cache_folder() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path / "latents"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "erase-concept" / "latents"
    monkeypatch.setenv(VARIABLE, "~nobody-of-this-name/latents")
    with pytest.raises(RequestError, match=r"ERASE_CONCEPT_CACHE .* is in no home folder of this machine"):
        cache_folder()


def test_where_memory_is_short_the_halves_show_the_same_pictures(
    tiny: Diffusion, square: Concept, tmp_path: Path, sampled: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, own = make(tiny, square, None), module.sample_latents
    del sampled[:]

    def short(model: Diffusion, embeddings: torch.Tensor, *args, **options):
        if len(embeddings) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, embeddings, *args, **options)

    monkeypatch.setattr(module, "sample_latents", short)
    halves = make(tiny, square, tmp_path)
    assert sampled == [4, 4, 4, 4, 2, 3]
    assert torch.allclose(halves.forget_latents, whole.forget_latents, atol=1e-4)
    assert torch.equal(halves.forget_which, whole.forget_which)
    monkeypatch.setattr(module, "sample_latents", own)
    assert same(make(tiny, square, tmp_path), halves)  # kept as a whole batch

    def none(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "sample_latents", none)
    with pytest.raises(torch.OutOfMemoryError):
        make(tiny, square, None)
