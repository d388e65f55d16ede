"""Each method against a transcription of its formula, with torch's own optimizers, on a small network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.mask import ClassifierMask, make_mask
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.pipelines.classifiers.architectures import build
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_generator, stage_seed

SEED = 3
# A transcription of a step's loss: network, images (normalised), labels, which are forgotten, epoch, generator.
StepLoss = Callable[[nn.Module, Tensor, Tensor, Tensor, int, torch.Generator], Tensor]


def run(name: str, model: Classifier, data: ForgetRetainImages, mask: Any = None, **values: Any) -> Any:
    """Run a method with some settings and return them."""
    method = UNLEARNERS.find(name)
    settings = method.settings(**values)
    list(method.run(model, data, mask, settings, seed=SEED))
    return settings


def batches(data: ForgetRetainImages, epochs: int, size: int, parts: Callable[[int], list[str]]) -> list[Any]:
    """The batches of all epochs: each part in an order that the seed, the epoch and its name give."""
    rows = {"forget": data.forget, "retain": data.retain, "mixed": torch.cat([data.forget, data.retain])}
    found = []
    for epoch in range(epochs):
        for part in parts(epoch):
            order = torch.randperm(len(rows[part]), generator=stage_generator(SEED, "epoch", epoch, part))
            found += [(epoch, part, some) for some in rows[part][order].split(size)]
    return found


def transcribed(
    network: nn.Module, data: ForgetRetainImages, found: list[Any], loss: StepLoss, optimizer: torch.optim.Optimizer
) -> nn.Module:
    """Train a network in training mode with torch's optimizer."""
    network.train()
    for step, (epoch, _, rows) in enumerate(found):
        x = (data.images[rows].float() / 255 - 0.4) / 0.5
        generator = stage_generator(SEED, "step", step, 0, 0)
        optimizer.zero_grad()
        loss(network, x, data.labels[rows], torch.isin(rows, data.forget), epoch, generator).backward()
        optimizer.step()
    return network.eval()


def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def same(model: Classifier, network: nn.Module, tolerance: float = 1e-5) -> None:
    """The network has the transcription's weights and statistics, and is in evaluation mode."""
    assert not any(module.training for module in model.network.modules())
    expected = network.state_dict()
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def cross_entropy(
    network: nn.Module, x: Tensor, y: Tensor, forgotten: Tensor, epoch: int, g: torch.Generator
) -> Tensor:
    return -network(x).log_softmax(1)[torch.arange(len(y)), y].mean()


def test_fine_tune(model: Classifier, data: ForgetRetainImages) -> None:
    network = copy.deepcopy(model.network)
    run("fine-tune", model, data, epochs=2, batch_size=8, lr=0.005)
    found = batches(data, 2, 8, lambda _: ["retain"])
    same(model, transcribed(network, data, found, cross_entropy, sgd(network, 0.005)))


def test_retrain_begins_anew_and_its_rate_falls_at_milestones(model: Classifier, data: ForgetRetainImages) -> None:
    run("retrain", model, data, epochs=2, batch_size=8, lr=0.02, milestones=(1,))
    network = build(model.architecture, 3, 1, stage_seed(SEED, "weights"))
    found = batches(data, 2, 8, lambda _: ["retain"])
    optimizer = sgd(network, 0.02)
    transcribed(network, data, found[:3], cross_entropy, optimizer)
    optimizer.param_groups[0]["lr"] = 0.002
    network.train()
    for _, _, rows in found[3:]:
        optimizer.zero_grad()
        x = (data.images[rows].float() / 255 - 0.4) / 0.5
        F.cross_entropy(network(x), data.labels[rows]).backward()
        optimizer.step()
    same(model, network, 1e-4)


def test_l1_sparse(model: Classifier, data: ForgetRetainImages) -> None:
    network = copy.deepcopy(model.network)
    run("l1-sparse", model, data, epochs=3, batch_size=11, lr=0.01, alpha=3e-3)

    def loss(network: nn.Module, x: Tensor, y: Tensor, forgotten: Tensor, epoch: int, g: torch.Generator) -> Tensor:
        norm = torch.linalg.vector_norm(torch.cat([p.view(-1) for p in network.parameters()]), ord=1)
        return F.cross_entropy(network(x), y) + 3e-3 * (1 - epoch / 3) * norm

    same(model, transcribed(network, data, batches(data, 3, 11, lambda _: ["retain"]), loss, sgd(network, 0.01)))


def random_labels(
    network: nn.Module, x: Tensor, y: Tensor, forgotten: Tensor, epoch: int, g: torch.Generator
) -> Tensor:
    drawn = torch.randint(0, 3, y.shape, generator=g)
    return F.cross_entropy(network(x), torch.where(forgotten, drawn, y))


@pytest.mark.parametrize(("order", "parts"), [("forget-first", ["forget", "retain"]), ("mixed", ["mixed"])])
def test_random_label(model: Classifier, data: ForgetRetainImages, order: str, parts: list[str]) -> None:
    network = copy.deepcopy(model.network)
    run("random-label", model, data, epochs=2, batch_size=8, lr=0.005, order=order)
    same(model, transcribed(network, data, batches(data, 2, 8, lambda _: parts), random_labels, sgd(network, 0.005)))


def test_salun_is_random_label_in_the_salient_weights(model: Classifier, data: ForgetRetainImages) -> None:
    """The mask is the larger half of |grad CE| in evaluation mode, all weights ranked together; others are put back."""
    network = copy.deepcopy(model.network)
    mask = make_mask(ClassifierMask("salient", 0.5, "signed", 3), model, data, seed=0)
    x = (data.images[data.forget].float() / 255 - 0.4) / 0.5
    loss = F.cross_entropy(network(x), data.labels[data.forget])
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    flat = torch.cat([g.abs().flatten() for g in gradients])
    salient = torch.zeros(len(flat), dtype=torch.bool)
    salient[flat.argsort(descending=True, stable=True)[: len(flat) // 2]] = True
    assert mask is not None
    ours = torch.cat([mask.dense(name).flatten() for name, _ in network.named_parameters()])
    assert int((ours != salient).sum()) <= 4  # of equals at the threshold, rounding decides
    assert mask.count == round(len(flat) / 2)

    before = [p.detach().clone() for p in network.parameters()]
    run("salun", model, data, mask, epochs=1, batch_size=8, lr=0.005)
    optimizer = sgd(network, 0.005)
    network.train()
    for step, (_, _, rows) in enumerate(batches(data, 1, 8, lambda _: ["forget", "retain"])):
        optimizer.zero_grad()
        x = (data.images[rows].float() / 255 - 0.4) / 0.5
        g = stage_generator(SEED, "step", step, 0, 0)
        random_labels(network, x, data.labels[rows], torch.isin(rows, data.forget), 0, g).backward()
        optimizer.step()
        with torch.no_grad():
            for (name, p), old in zip(network.named_parameters(), before, strict=True):
                p.copy_(torch.where(mask.dense(name), p, old))
    same(model, network, 1e-4)


def test_salun_soft(model: Classifier, data: ForgetRetainImages) -> None:
    network = copy.deepcopy(model.network)
    base = torch.cat([p.detach().flatten() for p in network.parameters()])
    run("salun-soft", model, data, epochs=1, batch_size=8, lr=0.005, ratio=0.4)
    found = batches(data, 1, 8, lambda _: ["forget", "retain"])
    optimizer = sgd(network, 0.005)
    for step, (_, _, rows) in enumerate(found):
        network.train()
        optimizer.zero_grad()
        x = (data.images[rows].float() / 255 - 0.4) / 0.5
        g = stage_generator(SEED, "step", step, 0, 0)
        random_labels(network, x, data.labels[rows], torch.isin(rows, data.forget), 0, g).backward()
        optimizer.step()
        moved = torch.cat([p.detach().flatten() for p in network.parameters()]) - base
        share = 0.4 * (1 - step / len(found))
        threshold = moved.abs().sort().values[round(share * len(moved)) - 1]
        shrunk = base + moved.sign() * (moved.abs() - threshold).clamp(min=0)
        nn.utils.vector_to_parameters(shrunk, network.parameters())
    same(model, network.eval(), 1e-4)


def test_gradient_ascent(model: Classifier, data: ForgetRetainImages) -> None:
    network = copy.deepcopy(model.network)
    run("gradient-ascent", model, data, epochs=2, batch_size=5, lr=1e-3)

    def loss(*given: Any) -> Tensor:
        return -cross_entropy(*given)

    same(model, transcribed(network, data, batches(data, 2, 5, lambda _: ["forget"]), loss, sgd(network, 1e-3)))


def test_boundary_expand(model: Classifier, data: ForgetRetainImages) -> None:
    """The head has a fourth row of random weights, all images to forget become its class, and it is dropped."""
    network: Any = copy.deepcopy(model.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(SEED, "extra class"))
        head = nn.Linear(16, 4)
    with torch.no_grad():
        head.weight[:3], head.bias[:3] = network.fc.weight, network.fc.bias
    network.fc = head
    run("boundary-expand", model, data, epochs=2, batch_size=5, lr=5e-3)

    def loss(network: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return F.cross_entropy(network(x), torch.full_like(y, 3))

    transcribed(network, data, batches(data, 2, 5, lambda _: ["forget"]), loss, sgd(network, 5e-3))
    network.fc.weight, network.fc.bias = (nn.Parameter(p[:3]) for p in (network.fc.weight, network.fc.bias))
    same(model, network)


def test_boundary_shrink(model: Classifier, data: ForgetRetainImages) -> None:
    network, frozen = copy.deepcopy(model.network), copy.deepcopy(model.network)
    run("boundary-shrink", model, data, epochs=2, batch_size=5, lr=5e-3, bound=0.3)
    seen = []

    def loss(network: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        pixels = (x * 0.5 + 0.4).requires_grad_()
        F.cross_entropy(frozen((pixels - 0.4) / 0.5), y).backward()
        attacked = torch.clamp(pixels.detach() + 0.3 * pixels.grad.sign(), 0, 1)
        attacked = torch.round(attacked * 255) / 255
        nearest = frozen((attacked - 0.4) / 0.5).argmax(1)
        seen.append(int((nearest != y).sum()))
        return F.cross_entropy(network(x), nearest)

    same(model, transcribed(network, data, batches(data, 2, 5, lambda _: ["forget"]), loss, sgd(network, 5e-3)))
    assert sum(seen)  # the attack moves some image across a boundary


def test_scrub(model: Classifier, data: ForgetRetainImages) -> None:
    network, teacher = copy.deepcopy(model.network), copy.deepcopy(model.network)
    run("scrub", model, data, epochs=2, batch_size=8, forget_batch_size=8, forget_epochs=1, lr=5e-3, alpha=0.3)

    def loss(network: nn.Module, x: Tensor, y: Tensor, forgotten: Tensor, *_: Any) -> Tensor:
        p, q = (teacher(x) / 4).softmax(1).detach(), (network(x) / 4).softmax(1)
        divergence = (p * (p.log() - q.log())).sum(1).mean() * 16
        return -divergence if forgotten.all() else 0.99 * F.cross_entropy(network_logits(q), y) + 0.3 * divergence

    def network_logits(q: Tensor) -> Tensor:
        return 4 * q.log()  # softmax takes no notice of a constant

    found = batches(data, 2, 8, lambda epoch: ["forget", "retain"] if epoch < 1 else ["retain"])
    same(model, transcribed(network, data, found, loss, sgd(network, 5e-3)), 1e-4)


def test_bad_teacher(model: Classifier, data: ForgetRetainImages) -> None:
    network, good = copy.deepcopy(model.network), copy.deepcopy(model.network)
    bad = build(model.architecture, 3, 1, stage_seed(SEED, "bad teacher"))
    run("bad-teacher", model, data, epochs=2, batch_size=10, lr=1e-3, retained=1.0)
    order = torch.randperm(len(data.retain), generator=stage_generator(SEED, "bad teacher", "retain"))
    shuffled = ForgetRetainImages(data.images, data.labels, 3, data.forget, data.retain[order])

    def loss(network: nn.Module, x: Tensor, y: Tensor, forgotten: Tensor, *_: Any) -> Tensor:
        taught = torch.where(forgotten[:, None], bad(x).softmax(1), good(x).softmax(1)).detach()
        return (taught * (taught.log() - network(x).log_softmax(1))).mean()

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    same(model, transcribed(network, shuffled, batches(shuffled, 2, 10, lambda _: ["mixed"]), loss, optimizer), 2e-4)


def gradient(network: nn.Module, data: ForgetRetainImages, rows: Tensor) -> Tensor:
    x = ((data.images[rows].float() / 255 - 0.4) / 0.5).double()
    loss = F.cross_entropy(network(x), data.labels[rows])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def test_influence(model: Classifier, data: ForgetRetainImages) -> None:
    """WoodFisher's recursion is Sherman and Morrison's formula; here the matrix is written out and inverted."""
    network = copy.deepcopy(model.network).double().requires_grad_(True)
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    run("influence", model, data, alpha=2.0, samples=7, damping=5.0)
    v = 8 / 30 * (gradient(network, data, data.forget) - gradient(network, data, data.retain))
    singles = [gradient(network, data, data.retain[i : i + 1]) for i in range(7)]
    k, o = v.clone(), singles[0].clone()
    for g in singles[1:]:
        scale = 5.0 + o.dot(g)
        k, o = k - k.dot(g) / scale * o, o - o.dot(g) / scale * o
    after = torch.cat([p.detach().flatten() for p in model.network.parameters()]).double()
    torch.testing.assert_close(after - before, 2.0 * k, rtol=1e-3, atol=1e-5)
    for name, value in model.network.named_buffers():
        assert torch.equal(value.double(), network.get_buffer(name).double()), name


def test_ssd(model: Classifier, data: ForgetRetainImages) -> None:
    network = copy.deepcopy(model.network).double().requires_grad_(True)
    run("ssd", model, data, alpha=1.2, dampening=0.7, batch_size=4)
    every = torch.cat([data.forget, data.retain])
    importances = []
    for rows, part in ((data.forget, "forget"), (every, "all")):
        order = torch.randperm(len(rows), generator=stage_generator(SEED, "ssd", part))
        squares = [gradient(network, data, some).square() for some in rows[order].split(4)]
        importances.append(torch.stack(squares).mean(0))
    ours, of_all = importances
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    expected = torch.where(ours > 1.2 * of_all, before * (0.7 * of_all / ours).clamp(max=1), before)
    after = torch.cat([p.detach().flatten() for p in model.network.parameters()]).double()
    assert int((expected != before).sum()) > 100
    close = (after - expected).abs() <= 1e-3 * expected.abs() + 1e-6
    assert close.double().mean() > 0.999  # but for weights at the threshold
