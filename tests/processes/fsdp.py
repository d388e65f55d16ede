"""Scenarios of FSDP2: processes whose weights are in shards do what others do that hold all of them."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from erase_concept import masks
from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.load import load
from erase_concept.pipelines.processes import processes
from erase_concept.recipe import check_shards, recipe_for
from erase_concept.training import health, optimizer
from erase_concept.training.optimizer import MaskedOptimizer
from erase_concept.training.rules import SGD, Adam
from erase_concept.training.shards import Shards, is_sharded, local, sharded, sharding

CONFIGURATION = Path(__file__).parents[2] / "docs" / "accelerate" / "fsdp2.yaml"


def under_fsdp(work: Callable[[], object]) -> Callable[[], object]:
    """Return work that is done as ``accelerate launch`` would have it done, with the documentation's configuration."""

    def launched() -> object:
        asked = launch_command_parser().parse_args(["--config_file", str(CONFIGURATION), "--num_processes=2", "x.py"])
        found = prepare_multi_gpu_env(_validate_launch_command(asked)[0])
        os.environ.update({name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))})
        return work()

    return launched


def refused() -> None:
    """Check what goes with whole weights alone, and what with shards, too."""
    given: dict[str, dict[str, Any]] = {
        "method esd-x: cannot train on FSDP's shards": {"method": "esd-x"},
        "settings.state 8bit: is not for FSDP": {"method": "salun", "settings": {"state": "8bit"}},
        "mask.scope text-encoder: is not for FSDP": {"method": "concept-ablation", "mask": {"scope": "text-encoder"}},
    }
    for said, values in given.items():
        problem = None
        try:
            check_shards(recipe_for("emojinette", "church", **values))
        except RequestError as found:
            problem = str(found)
        assert str(problem).startswith(said)
    for method in ("salun", "edit-then-train"):
        check_shards(recipe_for("emojinette", "church", method=method))
    plugin = sharding()
    assert plugin is not None
    assert plugin.transformer_cls_names_to_wrap == ["BasicTransformerBlock", "ResnetBlock2D"]


def same_module(folder: Path) -> None:
    """Shard a UNet, and check that it predicts the same, that it comes back whole, and when it does not."""
    model = load(str(folder))
    whole = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    bits, given = health._sum_of_bits(model.unet), (torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 77, 16))
    accelerator, before = Accelerator(cpu=True), [weakref.ref(p) for p in model.unet.parameters()]
    with torch.no_grad():
        predicted = model.predict(*given)
        with sharded(accelerator, model.unet):
            assert not any(parameter() for parameter in before)  # nobody holds the whole weights
            shards = list(model.unet.parameters())
            assert all(map(is_sharded, shards))
            assert sum(local(p).numel() for p in shards) < 0.6 * sum(p.numel() for p in whole.values())
            assert torch.equal(model.predict(*given), predicted)
            assert health._sum_of_bits(model.unet) == bits
        assert not any(local(p).untyped_storage().size() for p in shards)  # nor their shards afterwards
        with contextlib.suppress(EraseError), sharded(accelerator, model.unet):
            raise EraseError("of all processes")
        after = model.unet.state_dict()
        assert all(torch.equal(whole[name], after[name]) for name in whole)
        assert torch.equal(model.predict(*given), predicted)
        with contextlib.suppress(OSError), sharded(accelerator, model.unet):
            raise OSError("perhaps of one process alone: it waits for nobody")
        assert all(is_sharded(p) for p in model.unet.parameters())


def network() -> nn.Module:
    """Parameters that two processes, or three, cannot cut evenly; the last is one that only the first has a part of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 4), nn.Linear(9, 1))


def same_steps() -> None:
    """Step the same gradients whole and in shards, and check that weights and state are the same, too."""
    exact = [Adam(0.1, weight_decay=0.1), Adam(0.1, state="bf16"), SGD(0.1)]
    for compiled in {optimizer._COMPILED, False}:
        optimizer._COMPILED = compiled
        for dtype in (torch.float32, torch.bfloat16):
            for rule in exact:
                for name, whole, joined in stepped(rule, dtype):
                    assert torch.equal(whole, joined), (name, rule, dtype, compiled)
    for name, whole, joined in stepped(SGD(0.1, max_grad_norm=0.5), torch.float32):  # the norm is summed otherwise
        torch.testing.assert_close(whole, joined, rtol=1e-5, atol=1e-6, msg=name)


def stepped(rule: Adam | SGD, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Take four steps, and yield each tensor of the checkpoint, of whole weights and of those in shards."""
    mesh = init_device_mesh("cpu", (processes().num_processes,))
    one, cut = network().to(dtype), network().to(dtype)
    for layer in cut:
        for name, p in list(layer.named_parameters()):
            shard = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            setattr(layer, name, shard)
            bounds = Shards.of(shard)
            assert shard.to_local().numel() == bounds.last - bounds.first
    mask = masks.random(one, 0.4, seed=1)
    whole, shards = (MaskedOptimizer(net, mask, rule) for net in (one, cut))
    for step in range(4):
        if step == 2:  # go on from what was saved
            saved, shards = checkpoint(shards), MaskedOptimizer(cut, mask, rule)
            shards.restore(saved)
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(one.parameters(), cut.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        whole.step()
        shards.step()
    expected, found = checkpoint(whole), checkpoint(shards)
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        yield name, tensor, found[name]


def checkpoint(masked: MaskedOptimizer) -> dict[str, Tensor]:
    """Return a state as each process reads it from the main one's file."""
    state = [{name: tensor.clone() for name, tensor in masked.state().items()}]
    torch.distributed.broadcast_object_list(state)
    return state[0]
