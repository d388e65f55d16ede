"""Closed forms: exact minimisers, over all keys and values or over those of a mask."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from erase_concept import masks
from erase_concept.closed_form import (
    ClosedFormSettings,
    Demand,
    concept_tokens,
    edit,
    matrices,
    minimise,
    retained_tokens,
)
from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.make_data import make_data
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.formats.tokenizer import clip_tokenizer
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import DataRecipe

SCALES = {"erase": 1.3, "preserve": 0.2}


@pytest.fixture
def demands() -> dict[str, Demand]:
    g = torch.Generator().manual_seed(3)
    erase, wanted, kept = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (5, 5, 7))
    return {"erase": Demand(erase, wanted, SCALES["erase"]), "preserve": Demand(kept, kept, SCALES["preserve"])}


def prompt_data(model: Diffusion, concept: Concept) -> ForgetRetain:
    """Prompts alone: closed forms need no latents."""
    return make_data(model, concept, DataRecipe(steps=1, guidance=1.0), seed=1, parts=())


def objective(now: dict[str, Tensor], base: dict[str, Tensor], demands: dict[str, Demand], ridge: float) -> Tensor:
    """The sum of squares as it is written, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for name, before in base.items():
        for demand in demands.values():
            for c, u in zip(demand.tokens, demand.wanted, strict=True):
                total = total + demand.scale * (now[name] @ c - before @ u).square().sum()
        total = total + ridge * (now[name] - before).square().sum()
    return total


def values(unet: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in matrices(unet).items()}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_no_free_weight_has_a_gradient_at_the_solution(
    tiny: Diffusion, demands: dict[str, Demand], density: float
) -> None:
    unet = tiny.unet.double()
    base = values(unet)
    mask = None if density == 1 else masks.random(unet, density, seed=4)
    loss, terms = minimise(unet, demands, 0.3, mask)
    now = {name: value.requires_grad_() for name, value in values(unet).items()}
    total = objective(now, base, demands, 0.3)
    assert loss == pytest.approx(total.item(), rel=1e-9)
    assert terms.keys() == {"erase", "preserve", "change"}
    total.backward()
    start = {name: value.clone().requires_grad_() for name, value in base.items()}
    objective(start, base, demands, 0.3).backward()
    for name in base:
        free = torch.ones_like(base[name], dtype=torch.bool) if mask is None else mask.dense(name)
        grad, first = now[name].grad, start[name].grad
        assert grad is not None
        assert first is not None
        assert grad[free].norm() < 1e-8 * first.norm()
        assert torch.equal(now[name][~free], base[name][~free])
        if mask is not None:
            assert grad[~free].norm() > 1e-3  # what is frozen is missed


def test_equals_the_published_formula_in_numpy(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    """W = (sum v* c^T + l sum W0 c_p c_p^T + r W0) (sum c c^T + l sum c_p c_p^T + r I)^-1."""
    unet = tiny.unet.double()
    base = {name: value.numpy() for name, value in values(unet).items()}
    minimise(unet, demands, 0.3, None)
    c, u, p = (t.numpy() for t in (demands["erase"].tokens, demands["erase"].wanted, demands["preserve"].tokens))
    for name, now in values(unet).items():
        left = 1.3 * (base[name] @ u.T) @ c + 0.2 * (base[name] @ p.T) @ p + 0.3 * base[name]
        right = 1.3 * c.T @ c + 0.2 * p.T @ p + 0.3 * np.eye(16)
        np.testing.assert_allclose(now.numpy(), left @ np.linalg.inv(right), rtol=1e-9, atol=1e-12)


def test_each_masked_row_solves_its_own_system(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    """A_SS w_S = B_S - A_SF w0_F, row by row in numpy."""
    unet = tiny.unet.double()
    base = {name: value.numpy() for name, value in values(unet).items()}
    mask = masks.random(unet, 0.5, seed=4)
    minimise(unet, demands, 0.3, mask)
    c, u, p = (t.numpy() for t in (demands["erase"].tokens, demands["erase"].wanted, demands["preserve"].tokens))
    a = 1.3 * c.T @ c + 0.2 * p.T @ p + 0.3 * np.eye(16)
    for name, now in values(unet).items():
        b = base[name] @ (1.3 * u.T @ c + 0.2 * p.T @ p + 0.3 * np.eye(16))
        for row, free in enumerate(mask.dense(name).numpy()):
            wanted = base[name][row].copy()
            wanted[free] = np.linalg.solve(a[free][:, free], b[row, free] - a[free][:, ~free] @ wanted[~free])
            np.testing.assert_allclose(now[row].numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_what_is_preserved_strongly_keeps_its_keys_and_values(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    unet = tiny.unet.double()
    base = values(unet)
    kept = demands["preserve"].tokens
    erase = demands["erase"]
    missed = []
    for scale in (1.0, 1e9):
        other = copy.deepcopy(unet)
        minimise(other, demands | {"preserve": Demand(kept, kept, scale)}, 1e-4, None)
        now = values(other)
        missed.append(max(float((now[name] @ kept.T - base[name] @ kept.T).abs().max()) for name in base))
        for name in base:  # 5 and 7 tokens of 16 dimensions: both can be had
            torch.testing.assert_close(now[name] @ erase.tokens.T, base[name] @ erase.wanted.T, rtol=0, atol=1e-2)
    assert missed[0] > 1e-6
    assert missed[1] < 1e-9


def test_a_mask_moves_its_own_weights_alone(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    """In fp32, bit for bit, minus zero among them; and nothing but keys and values, whatever the mask frees."""
    with torch.no_grad():
        for weight in matrices(tiny.unet).values():
            weight[:, ::3] = -0.0
    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    mask = masks.random(tiny.unet, 0.5, seed=4)
    minimise(tiny.unet, demands, 0.3, mask)
    for name, p in tiny.unet.named_parameters():
        moved = p.view(torch.int32) != before[name].view(torch.int32)
        if name in matrices(tiny.unet):
            assert not (moved & ~mask.dense(name)).any()
            assert moved[mask.dense(name)].float().mean() > 0.9
        else:
            assert not moved.any()


def test_a_mask_without_keys_and_values_is_refused(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    mask = masks.expand_to(masks.all_ones(masks.in_scope(tiny.unet, "self-attention")), tiny.unet)
    with pytest.raises(RequestError, match=r"mask\.kind .* leaves no weight of cross-attention"):
        minimise(tiny.unet, demands, 0.3, mask)


def test_rows_with_the_same_free_weights_are_solved_as_one_with_all(
    tiny: Diffusion, demands: dict[str, Demand]
) -> None:
    """A mask of ones in keys and values is no mask."""
    other = copy.deepcopy(tiny.unet)
    scope = masks.in_scope(tiny.unet, "cross-attention")
    ones: Mask = masks.expand_to(masks.all_ones(scope), tiny.unet)
    minimise(tiny.unet, demands, 0.3, None)
    minimise(other, demands, 0.3, ones)
    assert all(torch.equal(a, b) for a, b in zip(values(tiny.unet).values(), values(other).values(), strict=True))


BEHIND_ONE_SQUARE = 1 + len("one") + len("square")  # the tokenizer has a token for each letter, and a start token


@pytest.mark.parametrize(
    ("places", "first", "count"),
    [
        ("name-to-end", BEHIND_ONE_SQUARE - 1, 5),
        ("behind-name", BEHIND_ONE_SQUARE, 4),
        ("last", BEHIND_ONE_SQUARE - 1, 1),
        ("all", 0, 16),
    ],
)
def test_tokens_are_aligned_at_the_names_and_none_is_a_whole_prompt(
    family: Diffusion, square: Concept, places: str, first: int, count: int
) -> None:
    """Behind "one square" comes token 10, behind "one triangle" 12: the last two have no partner."""
    data = prompt_data(family, replace(square, templates=("one {O} on",), anchor="triangle", retain=("line",)))
    tokens, wanted = concept_tokens(family, data, places)
    start = 0 if places == "all" else first + 2
    torch.testing.assert_close(tokens, data.forget[0, first : first + count])
    torch.testing.assert_close(wanted, data.remap[0, 0, start : start + count])
    whole = data.forget.shape[1] - 16
    assert whole == (family.family.name == "sdxl")
    # fits every family's width
    edit(family, data, None, ClosedFormSettings(), tokens, wanted, retained_tokens(family, data))


def test_around_the_name_are_all_tokens_but_the_names(family: Diffusion, square: Concept) -> None:
    data = prompt_data(family, replace(square, templates=("one {O} on",), anchor="triangle", retain=("line",)))
    tokens, wanted = concept_tokens(family, data, "around-name")
    torch.testing.assert_close(tokens, torch.cat([data.forget[0, :4], data.forget[0, 10:14]]))
    torch.testing.assert_close(wanted, torch.cat([data.remap[0, 0, :4], data.remap[0, 0, 12:16]]))
    torch.testing.assert_close(tokens[:4], wanted[:4])  # a causal text encoder: they do not know what follows


def test_one_concepts_tokens_can_be_taken_alone(tiny: Diffusion, square: Concept) -> None:
    other = replace(square, name="dot", retain=("line",))
    both = prompt_data(tiny, Concept("square and dot", "several", combined=(replace(square, retain=("line",)), other)))
    alone = concept_tokens(tiny, prompt_data(tiny, other), "name-to-end")
    for found, wanted in zip(concept_tokens(tiny, both, "name-to-end", part=1), alone, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of SD 1.x, and of SD 2.x, whose id is 0
def test_a_name_becomes_the_start_of_an_empty_prompt_and_its_padding_the_padding(
    tiny: Diffusion, square: Concept, pad: str
) -> None:
    """As UCE's first code pairs them: from the last token of each prompt before its end token on."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.pad_token = pad
    model = tiny.with_components(tokenizer=tokenizer)
    assert tokenizer.pad_token_id == (0 if pad == "!" else tokenizer.eos_token_id)
    data = prompt_data(model, replace(square, templates=("{O}",), anchor=""))
    ids = tokenizer(["square", ""], padding="max_length", max_length=16).input_ids
    marks = tokenizer(["square", ""], padding="max_length", max_length=16).attention_mask
    if pad != "!":  # a tokenizer cannot tell its padding from the end token
        marks = [[int(place < ids[0].index(tokenizer.eos_token_id) + 1) for place in range(16)], [1, 1] + [0] * 14]
    last, last_empty = (sum(mark) - 2 for mark in marks)
    assert (last, last_empty) == (6, 0)
    tokens, wanted = concept_tokens(model, data, "name-to-end")
    embedded, empty = model.encode_ids([torch.tensor(ids)])
    torch.testing.assert_close(tokens, embedded[last : 16 - max(0, last_empty - last)])
    torch.testing.assert_close(wanted, empty[last_empty : 16 - max(0, last - last_empty)])
    becomes = list(zip(ids[0][last:], ids[1], strict=False))
    assert becomes[0] == (ids[0][6], tokenizer.bos_token_id)
    assert becomes[1] == (tokenizer.eos_token_id, tokenizer.eos_token_id)
    assert set(becomes[2:]) == {(tokenizer.pad_token_id, tokenizer.pad_token_id)}
    # and of the last token alone, of MACE's and of RECE's
    torch.testing.assert_close(concept_tokens(model, data, "last")[1], empty[:1])
    torch.testing.assert_close(concept_tokens(model, data, "behind-name")[1], empty[1:10])
    torch.testing.assert_close(concept_tokens(model, data, "all")[1], empty)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of SD 1.x, and of SD 2.x
def test_with_clips_own_tokenizer_an_artist_becomes_the_start_of_the_empty_prompt(tiny: Diffusion, pad: str) -> None:
    """ "Vincent van Gogh" is three tokens: the last is at place 3, the end at 4, and padding follows."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(pad)
    config = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = tiny.with_components(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())
    artist = Concept("Vincent van Gogh", "style", "", ("{O}",), others=("",))
    data = prompt_data(model, artist)
    ids, end = data.forget_ids[0].tolist(), tokenizer.eos_token_id
    assert tokenizer.decode(ids[3]).strip() == "gogh"
    assert ids[4:] == [end, *[tokenizer.pad_token_id] * 72]
    assert tokenizer.pad_token_id == (end if pad != "!" else 0)
    tokens, wanted = concept_tokens(model, data, "name-to-end")
    embedded, empty = model.encode_prompts(["Vincent van Gogh", ""])
    torch.testing.assert_close(tokens, embedded[3:])
    torch.testing.assert_close(wanted, empty[:74])
    becomes = list(zip(ids[3:], data.anchor_ids[0].tolist(), strict=False))
    assert [other for _, other in becomes[:2]] == [tokenizer.bos_token_id, end]
    assert all(old == new for old, new in becomes[1:])  # the end token's and the padding's are their own


def test_the_last_token_of_a_retained_prompt_is_the_one_before_its_end(family: Diffusion, square: Concept) -> None:
    data = prompt_data(family, square)  # a circle, one circle, a line, one line, and the empty prompt
    found = retained_tokens(family, data, "last")
    places = [len("acircle"), len("onecircle"), len("aline"), len("oneline"), 0]
    torch.testing.assert_close(found, data.retain[range(5), places])
    assert len(retained_tokens(family, data)) == 5 * 16


def test_preserving_weighs_less_the_more_there_is_and_never_less_than_a_tenth(tiny: Diffusion, square: Concept) -> None:
    for count, scale in ((1, 1.0), (4, 0.25), (10, 0.1), (20, 0.1)):
        concept = replace(square, retain=(), others=tuple(f"a line {chr(97 + i)}" for i in range(count)))
        data, models = prompt_data(tiny, concept), [tiny.with_components(unet=copy.deepcopy(tiny.unet)) for _ in "ab"]
        given = (*concept_tokens(tiny, data, "name-to-end"), retained_tokens(tiny, data))
        first, second = (
            edit(model, data, None, ClosedFormSettings(preserve_scale=value), *given)
            for model, value in zip(models, (None, scale), strict=True)
        )
        assert first == second


def test_values_of_other_matrices_are_wanted_as_in_numpy(tiny: Diffusion, demands: dict[str, Demand]) -> None:
    """W = (s sum V u c^T + l sum W0 p p^T + r W0) (s sum c c^T + l sum p p^T + r I)^-1, and the objective's terms."""
    unet = tiny.unet.double()
    base = {name: value.numpy() for name, value in values(unet).items()}
    generator = torch.Generator().manual_seed(5)
    by = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in base.items()}
    asked = demands | {"erase": replace(demands["erase"], by=by)}
    loss, terms = minimise(unet, asked, 0.3, None)
    c, u, p = (t.numpy() for t in (demands["erase"].tokens, demands["erase"].wanted, demands["preserve"].tokens))
    erase = preserve = change = 0.0
    for name, now in values(unet).items():
        left = 1.3 * (by[name].numpy() @ u.T) @ c + 0.2 * (base[name] @ p.T) @ p + 0.3 * base[name]
        right = 1.3 * c.T @ c + 0.2 * p.T @ p + 0.3 * np.eye(16)
        np.testing.assert_allclose(now.numpy(), left @ np.linalg.inv(right), rtol=1e-9, atol=1e-12)
        erase += np.square(now.numpy() @ c.T - by[name].numpy() @ u.T).sum()
        preserve += np.square((now.numpy() - base[name]) @ p.T).sum()
        change += np.square(now.numpy() - base[name]).sum()
    assert terms == pytest.approx({"erase": erase, "preserve": preserve, "change": change}, rel=1e-9)
    assert loss == pytest.approx(1.3 * erase + 0.2 * preserve + 0.3 * change, rel=1e-9)


@pytest.mark.parametrize("tokens", [5, 40])
def test_without_a_ridge_it_is_the_least_change_of_all_minimisers(tiny: Diffusion, tokens: int) -> None:
    """Fewer tokens than dimensions leave many; so does a text encoder whose last layer makes every mean zero."""
    g = torch.Generator().manual_seed(3)
    c, u = (torch.randn(tokens, 16, generator=g, dtype=torch.float64) for _ in range(2))
    c, u = c - c.mean(1, keepdim=True), u - u.mean(1, keepdim=True)
    unet = tiny.unet.double()
    base = {name: value.numpy() for name, value in values(unet).items()}
    minimise(unet, {"erase": Demand(c, u, 1.0)}, 0.0, None)
    for name, now in values(unet).items():
        wanted = base[name] + base[name] @ (u - c).numpy().T @ np.linalg.pinv(c.numpy()).T
        np.testing.assert_allclose(now.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_whole_prompts_are_not_preserved_as_tokens(family: Diffusion, square: Concept) -> None:
    data = prompt_data(family, square)
    given = concept_tokens(family, data, "name-to-end")
    retain = data.retain.clone()
    retain[:, 16:] = 1e6  # of SD XL alone
    changed = replace(data, retain=retain)
    other = family.with_components(unet=copy.deepcopy(family.unet))
    first = edit(family, data, None, ClosedFormSettings(), *given, retained_tokens(family, data))
    assert edit(other, changed, None, ClosedFormSettings(), *given, retained_tokens(family, changed)) == first


@pytest.mark.parametrize(
    ("name", "value"),
    [("erase_scale", -1.0), ("preserve_scale", float("inf")), ("ridge", -1.0), ("ridge", float("nan"))],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        ClosedFormSettings(**{name: value})
