"""The masked optimizer: torch's updates where the mask allows, not a bit changed elsewhere."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from erase_concept import masks
from erase_concept.errors import RequestError
from erase_concept.masks import Mask, top_k
from erase_concept.training import optimizer as optim
from erase_concept.training.optimizer import MaskedOptimizer
from erase_concept.training.rules import SGD, Adam


def module() -> nn.Module:
    """A small network with parameters of every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    """A loss that differs from step to step."""
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean() * (1 + step)


SETTINGS = list(itertools.product(["adam", "adamw"], [0.0, 0.1], [None, 0.5]))


@pytest.mark.parametrize(("name", "weight_decay", "max_grad_norm"), SETTINGS)
def test_frozen_weights_keep_every_bit_and_salient_ones_move(
    name: str, weight_decay: float, max_grad_norm: float | None
) -> None:
    net = module()
    before = copy.deepcopy(net)
    mask = masks.random(net, 0.3, seed=1)
    masked = MaskedOptimizer(net, mask, Adam(name=name, lr=0.1, weight_decay=weight_decay, max_grad_norm=max_grad_norm))
    for step in range(5):
        loss_of(net, step).backward()
        masked.step()
        for key, p in net.named_parameters():
            old = before.get_parameter(key)
            assert torch.equal(p[~mask.dense(key)].view(torch.int32), old[~mask.dense(key)].view(torch.int32))
            assert p.grad is None
    for key, p in net.named_parameters():
        assert bool((p != before.get_parameter(key))[mask.dense(key)].all())


@pytest.mark.parametrize(("name", "weight_decay", "max_grad_norm"), SETTINGS)
def test_without_a_mask_it_is_torchs_optimizer(name: str, weight_decay: float, max_grad_norm: float | None) -> None:
    net = module()
    other = copy.deepcopy(net)
    masked = MaskedOptimizer(
        net, None, Adam(name=name, lr=0.05, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    )
    plain_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    plain = plain_class(other.parameters(), lr=0.05, weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(4):
        loss_of(net, step).backward()
        masked.step()
        loss_of(other, step).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
        plain.step()
        plain.zero_grad()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_salient_weight_moves_as_in_a_plain_transcription_of_adam() -> None:
    net = module()
    start = [p.detach().double().clone() for p in net.parameters()]
    mask = masks.random(net, 0.5, seed=2)
    gradient = [torch.autograd.grad(loss_of(net, 0), p)[0].double() for p in net.parameters()]
    masked = MaskedOptimizer(net, mask, Adam(lr=0.01))
    loss_of(net, 0).backward()
    masked.step()
    for (key, p), old, g in zip(net.named_parameters(), start, gradient, strict=True):
        # Adam's first step: both moments are debiased to g and g^2.
        expected = torch.where(mask.dense(key), old - 0.01 * g / (g.square().sqrt() + 1e-8), old)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_keeps_state_for_salient_weights_only() -> None:
    net = module()
    mask = masks.random(net, 0.25, seed=1)
    masked = MaskedOptimizer(net, mask, Adam(lr=0.1))
    loss_of(net, 0).backward()
    masked.step()
    for moment in ("mean.", "square."):
        assert sum(value.numel() for key, value in masked.state().items() if key.startswith(moment)) == mask.count


def test_goes_on_from_its_state_bit_for_bit() -> None:
    straight, stopped = module(), module()
    mask = masks.random(straight, 0.4, seed=1)
    whole = MaskedOptimizer(straight, mask, Adam(lr=0.1))
    first = MaskedOptimizer(stopped, mask, Adam(lr=0.1))
    for step in range(3):
        loss_of(straight, step).backward()
        whole.step()
    loss_of(stopped, 0).backward()
    first.step()
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = module()
    second = MaskedOptimizer(resumed, mask, Adam(lr=0.1))
    second.restore(state)
    for step in (1, 2):
        loss_of(resumed, step).backward()
        second.step()
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mean.0.weight": None}, "mean.0.weight"),
        ({"mean.other": torch.ones(2)}, "mean.other"),
        ({"weights.0.bias": torch.ones(1)}, "weights.0.bias"),  # it would be broadcast
        ({"weights.0.bias": torch.ones(4).double()}, "weights.0.bias"),  # it would be rounded
        ({"step": torch.tensor(0)}, "step"),
    ],
)
def test_the_state_of_another_training_is_refused_before_anything_changes(
    changed: dict[str, torch.Tensor | None], named: str
) -> None:
    first, net = MaskedOptimizer(module(), None, Adam(lr=0.1)), module()
    loss_of(net, 0).backward()
    second = MaskedOptimizer(net, None, Adam(lr=0.1))
    before = {name: tensor.clone() for name, tensor in second.state().items()}
    state = {name: tensor + 1 for name, tensor in first.state().items()} | changed
    with pytest.raises(ValueError, match=f"^{re.escape(named)} is "):
        second.restore({name: tensor for name, tensor in state.items() if tensor is not None})
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state().items())


def test_parameters_without_salient_weights_ask_for_no_gradient() -> None:
    net = module()
    scores = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    scores["2.weight"] += 1
    MaskedOptimizer(net, top_k(scores, 10), Adam(lr=0.1))
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"2.weight"}


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the update is numba's or torch's."""
    if request.param:
        pytest.importorskip("numba", reason="the compiled update needs numba")
    monkeypatch.setattr(optim, "_COMPILED", request.param)
    return request.param


def trained(settings: dict[str, Any], *, in_backward: bool) -> list[torch.Tensor]:
    """Return the weights after five steps; the second layer is too wide for one piece of work."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 4, 30_001))
    masked = MaskedOptimizer(net, masks.random(net, 0.5, seed=1), Adam(lr=0.01, **settings))
    for step in range(5):
        if in_backward:
            with masked.in_backward():
                loss_of(net, step).backward()
        else:
            loss_of(net, step).backward()
            masked.step()
    assert all(p.grad is None for p in net.parameters())
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_a_step_inside_the_backward_pass_gives_the_same_bits(
    state: str, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit state needs bitsandbytes")
    settings = {"name": name, "state": state, "weight_decay": 0.1}
    after = trained(settings, in_backward=False)
    for together in (0, 64 << 20):
        monkeypatch.setattr(optim, "TOGETHER", together)
        lean = trained(settings, in_backward=True)
        assert all(torch.equal(p, q) for p, q in zip(after, lean, strict=True))


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_the_compiled_update_gives_torchs_bits(state: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the compiled update needs numba")
    settings = {"name": name, "state": state, "weight_decay": 0.1}
    both = []
    for compiled in (True, False):
        monkeypatch.setattr(optim, "_COMPILED", compiled)
        both.append(trained(settings, in_backward=False))
    assert all(torch.equal(p, q) for p, q in zip(*both, strict=True))


def test_what_numba_keeps_on_the_disk_names_no_class_of_ours() -> None:
    """A cache that holds the type of a class cannot be read once the class has another name."""
    compiled = pytest.importorskip("erase_concept.training.compiled", reason="the compiled update needs numba")
    trained({"name": "adam", "state": "fp32"}, in_backward=False)
    assert compiled.update.signatures
    assert "erase_concept" not in repr(compiled.update.signatures)
    assert "Numbers" not in repr(compiled.update.signatures)


@pytest.mark.parametrize(("state", "near"), [("bf16", 0.02), ("8bit", 0.05)])
def test_narrow_state_stays_near_the_exact_one(state: str, near: float, compiled: bool) -> None:
    if state == "8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit state needs bitsandbytes")
    start = [p.detach().clone() for p in trained({"name": "adam", "state": "fp32"}, in_backward=False)]
    rough = trained({"name": "adam", "state": state}, in_backward=False)
    # Adam's step is of the size of lr whatever the gradient: five of them move a weight by 0.05 at most.
    apart = torch.cat([(p - q).abs().flatten() for p, q in zip(start, rough, strict=True)])
    assert 0 < apart.mean() < near * 0.05


def test_bf16_state_is_rounded_without_a_bias() -> None:
    value = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = optim._rounded(value, optim._noise(torch.arange(len(value), dtype=torch.int32), 7) & 0xFFFF).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).float().mean() == pytest.approx(1 / 8, abs=0.005)


def test_a_slow_mean_of_squares_moves_in_bf16() -> None:
    """Rounded to the nearest, an average that changes by a thousandth of itself would stand still for ever."""
    weight = nn.Linear(1000, 1, bias=False)
    masked = MaskedOptimizer(weight, None, Adam(lr=0.0, state="bf16"))
    for size, steps in ((1.0, 50), (0.1, 300)):
        for _ in range(steps):
            weight.weight.grad = torch.full_like(weight.weight, size)
            masked.step()
    expected = (1 - 0.999**50) * 0.999**300 + 0.01 * (1 - 0.999**300)
    assert masked.state()["square.weight"].float().mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_narrow_state_goes_on_bit_for_bit(state: str) -> None:
    if state == "8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit state needs bitsandbytes")
    nets = [module(), module()]
    mask = masks.random(nets[0], 0.4, seed=1)
    first, second = (MaskedOptimizer(net, mask, Adam(lr=0.1, state=state)) for net in nets)
    for step in range(2):
        loss_of(nets[0], step).backward()
        first.step()
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for net, masked in zip(nets, (first, second), strict=True):
        loss_of(net, 2).backward()
        masked.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_bits_behind_the_last_weight_do_not_count() -> None:
    """The compiled update would write past the end of its arrays."""
    net = nn.Linear(3, 3, bias=False)
    mask = Mask({"weight": torch.tensor([0b10000000, 0b01111111], dtype=torch.uint8)}, {"weight": (3, 3)})
    masked = MaskedOptimizer(net, mask, Adam(lr=0.1))
    before = net.weight.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    masked.step()
    assert (net.weight != before).view(-1).tolist() == [True] + [False] * 8


def test_the_step_inside_the_backward_pass_cannot_clip() -> None:
    masked = MaskedOptimizer(module(), None, Adam(lr=0.1, max_grad_norm=1.0))
    with pytest.raises(ValueError, match="norm"), masked.in_backward():
        pass


def test_refuses_weights_that_are_neither_fp32_nor_bf16() -> None:
    with pytest.raises(ValueError, match="must be fp32 or bf16"):
        MaskedOptimizer(module().half(), None, Adam(lr=0.1))


def test_refuses_an_empty_mask_and_one_of_another_model() -> None:
    with pytest.raises(ValueError, match="no weight"):
        MaskedOptimizer(module(), masks.random(module(), 0.0, seed=0), Adam(lr=0.1))
    with pytest.raises(RequestError, match="does not fit"):
        MaskedOptimizer(nn.Linear(2, 2), masks.random(nn.Linear(2, 3), 0.5, seed=0), Adam(lr=0.1))
    with pytest.raises(RequestError, match="does not fit"):
        MaskedOptimizer(nn.Linear(2, 2), Mask({}, {}), Adam(lr=0.1))


def bf16_loss(net: nn.Module, step: int) -> torch.Tensor:
    """A loss of a network in bf16."""
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
    return net(x).float().square().mean()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_frozen_bf16_weights_keep_every_bit(name: str, compiled: bool) -> None:
    net = module().to(torch.bfloat16)
    before = copy.deepcopy(net)
    mask = masks.random(net, 0.3, seed=1)
    masked = MaskedOptimizer(net, mask, Adam(name=name, lr=0.1, weight_decay=0.1))
    for step in range(3):
        with masked.in_backward():
            bf16_loss(net, step).backward()
    moved = 0
    for key, p in net.named_parameters():
        frozen = ~mask.dense(key)
        assert torch.equal(p[frozen].view(torch.int16), before.get_parameter(key)[frozen].view(torch.int16))
        moved += int((p != before.get_parameter(key)).sum())
    assert moved


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_bf16_weights_get_the_same_bits_compiled_and_in_torch(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the compiled update needs numba")
    monkeypatch.setattr(optim, "_PIECE", 1024)
    after = []
    for compiled in (True, False):
        monkeypatch.setattr(optim, "_COMPILED", compiled)
        torch.manual_seed(0)
        net = nn.Linear(64, 65).to(torch.bfloat16)
        masked = MaskedOptimizer(net, masks.random(net, 0.5, seed=1), Adam(lr=1e-3, state=state, weight_decay=0.1))
        for step in range(3):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            masked.step()
        after.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*after, strict=True))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bf16_weights_are_rounded_to_their_neighbours_and_right_on_average(sign: float, compiled: bool) -> None:
    """Adam's first step is lr: 1 - 1e-3 lies 0.256 of the way from 1 to the bfloat16 below it, 1 - 2^-8."""
    net = nn.Linear(200_000, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(net.weight, sign)
    masked = MaskedOptimizer(net, None, Adam(lr=1e-3))
    net.weight.grad = torch.full_like(net.weight, sign)
    masked.step()
    assert set((sign * net.weight.detach().float()).unique().tolist()) == {1.0, 1 - 2**-8}
    share = (net.weight.float() != sign).float().mean().item()
    assert share == pytest.approx(1e-3 * 2**8, abs=0.005)


SGD_SETTINGS = list(itertools.product([0.0, 0.9], [0.0, 0.1], [None, 0.5]))


@pytest.mark.parametrize(("momentum", "weight_decay", "max_grad_norm"), SGD_SETTINGS)
@pytest.mark.parametrize("compiled", [True, False])
def test_sgd_is_torchs_and_keeps_frozen_weights(
    momentum: float, weight_decay: float, max_grad_norm: float | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Salient weights move as torch's SGD moves all of them, for the loss of a step is the same; frozen keep bits."""
    monkeypatch.setattr(optim, "_COMPILED", compiled and optim._COMPILED)
    net, before = module(), module()
    mask = masks.random(net, 0.3, seed=1)
    masked = MaskedOptimizer(net, mask, SGD(0.05, momentum, weight_decay, max_grad_norm))
    other = [p.detach().clone().requires_grad_() for p in net.parameters()]
    plain = torch.optim.SGD(other, lr=0.05, momentum=momentum, weight_decay=weight_decay)
    for step in range(5):
        loss_of(net, step).backward()
        for (key, p), q in zip(net.named_parameters(), other, strict=True):
            q.grad = None if p.grad is None else torch.where(mask.dense(key), p.grad, 0)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(other, max_grad_norm)
        masked.step()
        plain.step()
    for (key, p), q in zip(net.named_parameters(), other, strict=True):
        salient, old = mask.dense(key), before.get_parameter(key)
        assert torch.equal(p[~salient].view(torch.int32), old[~salient].view(torch.int32))
        torch.testing.assert_close(p[salient], q[salient], rtol=1e-5, atol=1e-6)
        assert bool((p != old)[salient].all())


def test_sgd_has_the_same_bits_compiled_and_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [module(), module()]
    for net, compiled in zip(nets, (True, False), strict=True):
        monkeypatch.setattr(optim, "_COMPILED", compiled and optim._COMPILED)
        masked = MaskedOptimizer(net, masks.random(net, 0.5, seed=2), SGD(0.1, 0.9, 5e-4))
        for step in range(4):
            with masked.in_backward():
                loss_of(net, step).backward()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_the_state_holds_batch_statistics() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    masked = MaskedOptimizer(net, None, SGD(0.1))
    net(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    masked.step()
    state = {name: tensor.clone() for name, tensor in masked.state().items()}
    again = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    MaskedOptimizer(again, None, SGD(0.1)).restore(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    assert again[1].num_batches_tracked == 1
