"""Masks against brute force, as files, and as sets."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erase_concept import masks
from erase_concept.errors import RequestError
from erase_concept.masks import Mask, top_k
from erase_concept.pipelines.families.original_names import UNET
from erase_concept.pipelines.model import Diffusion


def by_sorting(scores: dict[str, Tensor], k: int) -> Tensor:
    """The k largest of all scores by a stable sort: the slow and obvious way."""
    flat = torch.cat([score.flatten().double() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return chosen


def flat(mask: Mask) -> Tensor:
    """All bits of a mask, one after the other."""
    return torch.cat([mask.dense(name).flatten() for name in mask.shapes])


def some_scores(kind: str) -> dict[str, Tensor]:
    """Scores of three parameters with awkward sizes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (7, 5), "b": (13,), "c": (2, 3, 11)}
    random = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "ties":
        return {name: (score * 4).floor() for name, score in random.items()}
    if kind == "zeros":
        return {name: torch.where(score < 0.7, -0.0, score) for name, score in random.items()}
    if kind == "wide":
        return {name: 10 ** (score * 80 - 42) for name, score in random.items()}
    return random


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "wide"])
@pytest.mark.parametrize("k", [0, 1, 13, 57, 113, 114])
def test_equals_a_sort_with_exactly_k_ones(kind: str, k: int) -> None:
    scores = some_scores(kind)
    mask = top_k(scores, k)
    assert mask.count == k == int(flat(mask).sum())
    assert torch.equal(flat(mask), by_sorting(scores, k))


def test_equals_a_sort_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("erase_concept.masks.top_k"), "_CHUNK", 16)
    scores = some_scores("ties")
    for k in range(0, 115, 7):
        assert torch.equal(flat(top_k(scores, k)), by_sorting(scores, k))


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("find", [top_k, masks.bottom_k])
def test_ranks_that_exchange_counts_find_the_whole_mask(kind: str, find: Any) -> None:
    """Three ranks, each with a share of every parameter, run in step and see each other's counts only."""
    import threading

    ranks, scores = 3, some_scores(kind)
    flattened = {name: score.flatten() for name, score in scores.items()}
    shares = [{name: score[8 * rank : 8 * rank + 8] for name, score in flattened.items()} for rank in range(ranks - 1)]
    shares.append({name: score[8 * (ranks - 1) :] for name, score in flattened.items()})
    barrier, posted, found = threading.Barrier(ranks), [None] * ranks, [None] * ranks

    def run(rank: int) -> None:
        def exchange(counts: Tensor) -> tuple[Tensor, int]:
            posted[rank] = counts
            barrier.wait()
            every = torch.stack(posted)
            barrier.wait()
            return every, rank

        found[rank] = find(shares[rank], 57, exchange=exchange)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    whole = find(scores, 57)
    assert whole.count == 57
    for name in scores:
        assert torch.equal(torch.cat([mask.bits[name] for mask in found]), whole.bits[name]), name


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_refuses_scores_that_do_not_rank(bad: float) -> None:
    scores = some_scores("random")
    scores["b"][4] = bad
    with pytest.raises(ValueError, match="b has others"):
        top_k(scores, 3)


def test_refuses_k_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 0 and 114"):
        top_k(some_scores("random"), 115)


def test_infinite_scores_rank_first() -> None:
    scores = some_scores("random")
    scores["c"][1, 2, 10] = float("inf")
    assert top_k(scores, 1).dense("c")[1, 2, 10]


def test_least_and_top_are_complements() -> None:
    scores = some_scores("ties")
    top, least = top_k(scores, 50), masks.bottom_k(scores, 64)
    assert torch.equal(flat(top), ~flat(least))


def test_algebra_is_that_of_sets() -> None:
    scores = some_scores("random")
    a, b = top_k(scores, 60), masks.bottom_k(scores, 70)
    x, y = flat(a), flat(b)
    for mask, expected in ((a | b, x | y), (a & b, x & y), (a - b, x & ~y)):
        assert torch.equal(flat(mask), expected)
        assert mask.count == int(expected.sum())  # no stray bits behind the last weight
    assert a.overlap(b) == pytest.approx(int((x & y).sum()) / int((x | y).sum()))
    assert a.overlap(a) == 1


def test_random_masks_depend_on_the_seed_alone() -> None:
    module = nn.Linear(30, 20)
    first, again, other = (masks.random(module, 0.25, seed) for seed in (1, 1, 2))
    assert first.count == round(0.25 * 620)
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))


def test_comes_back_from_a_file_with_its_provenance(tmp_path: Path) -> None:
    mask = top_k(some_scores("random"), 40)
    Mask(mask.bits, mask.shapes, {"concept": "church", "seed": "0"}).save(tmp_path / "m.safetensors")
    back = Mask.load(tmp_path / "m.safetensors")
    assert torch.equal(flat(back), flat(mask))
    assert back.shapes == mask.shapes
    assert back.provenance == {"concept": "church", "seed": "0"}
    # One bit per weight: three parameters of 35, 13 and 66 weights take 5 + 2 + 9 bytes.
    assert sum(bits.numel() for bits in back.bits.values()) == 16
    assert not list(tmp_path.glob("*.partial"))


def test_refuses_damaged_and_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    top_k(some_scores("random"), 40).save(file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RequestError, match="not a readable mask"):
        Mask.load(file)
    with pytest.raises(RequestError, match="not a readable mask"):
        Mask.load(tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(RequestError, match="not a mask file"):
        Mask.load(file)


def test_names_the_first_parameter_that_does_not_fit() -> None:
    mask = masks.random(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), 0.5, seed=0)
    with pytest.raises(RequestError, match=r"1\.weight: does not fit: the mask has \[5, 4\], the model has \[6, 4\]"):
        mask.check(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)))
    with pytest.raises(RequestError, match=r"1\.weight: .*the model has nothing"):
        mask.check(nn.Sequential(nn.Linear(3, 4)))


def test_layers_add_up() -> None:
    mask = top_k(some_scores("random"), 40)
    layers = mask.layers()
    assert sum(ones for ones, _ in layers.values()) == 40
    assert {name: weights for name, (_, weights) in layers.items()} == {"a": 35, "b": 13, "c": 66}


def test_bits_behind_the_last_weight_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "mask.safetensors"
    Mask({"w": torch.tensor([0b10100001], dtype=torch.uint8)}, {"w": (3,)}).save(file)
    with pytest.raises(RequestError, match="w has bits behind its last weight"):
        Mask.load(file)


def test_noxattn_leaves_out_cross_attention_the_time_embedding_and_the_last_layers(family: Diffusion) -> None:
    """As the authors' code of ESD names them: attn2, time_embed, and all that starts with "out."."""
    every = dict(family.unet.named_parameters())
    original = UNET.names(every)
    theirs = {name: original[name].removeprefix("model.diffusion_model.") for name in every}
    wanted = {
        name
        for name, other in theirs.items()
        if "attn2" not in other and "time_embed" not in other and not other.startswith("out.")
    }
    assert set(masks.in_scope(family.unet, "noxattn")) == wanted
    assert 0 < len(wanted) < len(masks.in_scope(family.unet, "non-cross-attention")) < len(every)


def test_the_scopes_of_attention_are_diffusers_layers_of_these_names(family: Diffusion) -> None:
    every = [name for name, _ in family.unet.named_parameters()]
    wanted = {
        "keys-and-values": [name for name in every if re.search(r"\.attn2\.to_[kv]\.weight$", name)],
        "attention": [name for name in every if re.search(r"\.attn[12]\.", name)],
        "cross-attention": [name for name in every if ".attn2." in name],
        "self-attention": [name for name in every if ".attn1." in name],
        "non-cross-attention": [name for name in every if ".attn2." not in name],
        "full": every,
    }
    assert {scope: list(masks.in_scope(family.unet, scope)) for scope in wanted} == wanted
    assert {*masks.SCOPES} == {*wanted, "noxattn"}
