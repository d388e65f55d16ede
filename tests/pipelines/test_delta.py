"""Deltas: applied and taken back to the bit, small, and refused where they do not belong."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.formats.delta import _floats, _ordered, apply_delta, open_delta, save_delta
from erase_concept.pipelines.model import Diffusion, weights_hash

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
AWKWARD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 65504.0, -65504.0, 3.0e-5, float("inf"), float("-inf")]


def erased_from(unet: nn.Module, *, share: float = 0.5, size: float = 1e-3) -> nn.Module:
    """A copy in which some of the weights have moved, as an erasing leaves it."""
    generator = torch.Generator().manual_seed(2)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for p in other.parameters():
            moves = torch.rand(p.shape, generator=generator) < share
            p.add_((torch.randn(p.shape, generator=generator) * size * moves).to(p.dtype))
    return other


def bits(unet: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in unet.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_in_order_are_neighbouring_integers(dtype: torch.dtype) -> None:
    values = torch.tensor(AWKWARD, dtype=torch.float64).to(dtype)
    ordered = _ordered(values)
    assert torch.equal(_floats(ordered, dtype).view(torch.uint8), values.view(torch.uint8))
    finite = values[values.isfinite()]
    after = torch.nextafter(finite, torch.full_like(finite, float("inf")))
    steps = _ordered(after).astype(np.int64) - _ordered(finite)
    # From -0.0 the next float is the smallest positive one: 0.0, its equal, lies between.
    assert steps.tolist() == [2 if v == 0 and torch.signbit(v) else 1 for v in finite]
    assert [float(v) for v in values[torch.from_numpy(np.argsort(ordered))]] == sorted(float(v) for v in values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_applies_and_reverts_bit_for_bit(tiny: Diffusion, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny.unet.to(dtype)
    with torch.no_grad():
        base.conv_in.weight.view(-1)[: len(AWKWARD) - 2] = torch.tensor(AWKWARD[:-2]).to(dtype)
    erased = erased_from(base)
    with torch.no_grad():  # the longest ways there are, and signs that change
        erased.conv_in.weight.neg_()
    file = tmp_path / "d.safetensors"
    save_delta(base, erased, file, {"concept": "church"})
    delta = open_delta(file)
    assert (delta.dtype, delta.about) == (dtype, {"concept": "church"})
    model = copy.deepcopy(base)
    apply_delta(delta, model)
    assert bits(model) == bits(erased)
    apply_delta(delta, model, revert=True)
    assert bits(model) == bits(base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_little_more_than_half_of_the_model_at_half_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(1000, 400).to(dtype)
    erased = erased_from(base, size=1e-4)
    save_delta(base, erased, tmp_path / "d.safetensors", {})
    share = (tmp_path / "d.safetensors").stat().st_size / sum(p.nbytes for p in base.parameters())
    assert share <= 0.55


def test_parameters_that_did_not_change_take_no_room(tiny: Diffusion, tmp_path: Path) -> None:
    erased = copy.deepcopy(tiny.unet)
    with torch.no_grad():
        erased.conv_out.bias[1] += 1
    save_delta(tiny.unet, erased, tmp_path / "d.safetensors", {})
    assert set(load_file(tmp_path / "d.safetensors")) == {f"conv_out.bias:{p}" for p in ("changed", "steps", "wide")}


def test_goes_to_its_own_base_alone(tiny: Diffusion, tmp_path: Path) -> None:
    erased = erased_from(tiny.unet)
    file = tmp_path / "d.safetensors"
    save_delta(tiny.unet, erased, file, {})
    other = erased_from(tiny.unet, size=1e-4)
    before = weights_hash(other)
    with pytest.raises(RequestError, match=r"^model .*is not the base model that this delta was made for"):
        apply_delta(open_delta(file), other)
    with pytest.raises(RequestError, match=r"^model .*is not the erased model"):
        apply_delta(open_delta(file), other, revert=True)
    assert weights_hash(other) == before
    with pytest.raises(RequestError, match=r"weight: does not fit: the delta has \[.*the model has nothing"):
        apply_delta(open_delta(file), nn.Linear(2, 2))


def test_transfers_to_a_near_model_as_the_same_relative_change(tiny: Diffusion, tmp_path: Path) -> None:
    erased = erased_from(tiny.unet)
    save_delta(tiny.unet, erased, tmp_path / "d.safetensors", {})
    double = copy.deepcopy(tiny.unet)
    with torch.no_grad():
        for p in double.parameters():
            p.mul_(2)
    apply_delta(open_delta(tmp_path / "d.safetensors"), double, transfer=True)
    for name, p in double.named_parameters():
        near = torch.isclose(p, 2 * erased.get_parameter(name), rtol=1e-6, atol=0)
        assert bool(near[tiny.unet.get_parameter(name).abs() > 0.01].all())


def test_a_model_in_another_dtype_is_refused(tiny: Diffusion, tmp_path: Path) -> None:
    before = copy.deepcopy(tiny.unet).half()
    after = copy.deepcopy(before)
    with torch.no_grad():
        next(after.parameters()).add_(1)
    save_delta(before, after, tmp_path / "d.safetensors", {})
    with pytest.raises(RequestError, match=r"is in torch.float32, and the delta is for torch.float16"):
        apply_delta(open_delta(tmp_path / "d.safetensors"), copy.deepcopy(before).float(), transfer=True)


def test_damaged_and_foreign_files_are_refused(tiny: Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    with pytest.raises(RequestError, match="is not a readable delta"):
        open_delta(file)
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(RequestError, match="is no delta file"):
        open_delta(file)
    save_delta(tiny.unet, erased_from(tiny.unet), file, {})
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(RequestError, match="is not a readable delta"):
        open_delta(file)
    file.write_bytes(whole)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    tensors["conv_in.weight:steps"][0] += 1
    save_file(tensors, file, about)
    with pytest.raises(EraseError, match="another model than it promised"):
        apply_delta(open_delta(file), copy.deepcopy(tiny.unet))
    tensors["conv_in.weight:steps"] = tensors["conv_in.weight:steps"][1:]
    save_file(tensors, file, about)
    with pytest.raises(RequestError, match="is damaged"):
        apply_delta(open_delta(file), copy.deepcopy(tiny.unet))


def test_makes_no_delta_between_unlike_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same shapes"):
        save_delta(nn.Linear(2, 2), nn.Linear(2, 3), tmp_path / "d", {})
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    for erased in (mixed, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()):
        with pytest.raises(ValueError, match="one dtype"):
            save_delta(mixed, erased, tmp_path / "d", {})
    assert not list(tmp_path.iterdir())


def test_a_base_in_another_dtype_counts_in_that_of_the_erased(tiny: Diffusion, tmp_path: Path) -> None:
    stored = copy.deepcopy(tiny.unet).half()
    base = copy.deepcopy(stored).float()
    erased = erased_from(base)
    save_delta(stored, erased, tmp_path / "d.safetensors", {})
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    apply_delta(open_delta(tmp_path / "d.safetensors"), base)
    assert bits(base) == bits(erased)
