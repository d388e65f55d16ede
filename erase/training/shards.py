"""FSDP2 through Accelerate: every process holds a shard of each parameter while a module is trained.

``accelerate launch`` asks for it with ``distributed_type: FSDP`` and ``fsdp_version: 2`` in its configuration file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, gather, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.processes import processes

# Engines that take the weights over, so that the masked optimizer cannot step them.
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("DEEPSPEED", "ZeRO keeps weights in flat buffers, which its own optimizer steps"),
    "ACCELERATE_USE_MEGATRON_LM": ("MEGATRON_LM", "it has models and an optimizer of its own"),
}


def sharding() -> FullyShardedDataParallelPlugin | None:
    """Return the settings of FSDP2 that ``accelerate launch`` was given; None where weights are not sharded.

    Raises RequestError for an engine that cannot keep frozen weights bit-identical, for settings of FSDP that a masked
    training cannot follow, and for a single process. Names are those of Accelerate's configuration file.
    """
    for flag, (engine, reason) in _OTHER_ENGINES.items():
        if parse_flag_from_env(flag):
            allowed = f"{reason}, so frozen weights would not be safe; use DDP, or FSDP with fsdp_version 2"
            raise RequestError("distributed_type", engine, allowed)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise RequestError("fsdp_version", plugin.fsdp_version, "must be 2: version 1 joins weights in flat buffers")
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        reason = "cannot wrap the lists that a UNet keeps its blocks in; use TRANSFORMER_BASED_WRAP or NO_WRAP"
        raise RequestError("fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", reason)
    refused = {
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "each process loads the whole model"),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "weights stay on their device"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "set recompute in the recipe instead"),
        "parallelism_config": (parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"), "shards have one dimension"),
    }
    for setting, (given, reason) in refused.items():
        if given:
            raise RequestError(setting, "true", f"must be false: {reason}")
    if (count := processes().num_processes) == 1:
        raise RequestError("num_processes", count, "FSDP has nothing to share in one process; allowed: at least 2")
    return plugin


@contextmanager
def sharded(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Shard a module's parameters over the processes while the context lasts, if ``accelerate launch`` asked for that.

    A copy of the module's structure computes, under FSDP2. The module itself has the same parameters, which are
    DTensors now, and hands its forward on to the copy. So all other code goes on with the module that it knows.

    At the end the module gets whole parameters again, gathered one at a time, for which all processes are needed. After
    an error that may be of one process alone it keeps its shards. Raises RequestError as ``sharding`` does, and where
    the module has none of the layers that are to be gathered one at a time.
    """
    if (plugin := sharding()) is None:
        yield
        return
    _leave_own_layers(plugin, module)
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    # ``prepare`` would want torch's optimizer beside the model, and passes FSDP over on CPUs.
    accelerator.state.fsdp_plugin = plugin
    twin = fsdp2_prepare_model(accelerator, twin)
    shards = dict(twin.named_parameters(remove_duplicate=False))
    _set_parameters(module, shards.items())
    vars(module)["forward"] = twin.__call__
    try:
        yield
    except EraseError:  # which all processes raise
        _set_parameters(module, _gathered(shards))
        raise
    else:
        _set_parameters(module, _gathered(shards))
    finally:
        del vars(module)["forward"]


def _leave_own_layers(plugin: FullyShardedDataParallelPlugin, module: nn.Module) -> None:
    """Pass over names of layers that the module has not, which Accelerate refuses."""
    if names := plugin.transformer_cls_names_to_wrap:
        present = {type(part).__name__ for part in module.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in names if name in present]
        if not plugin.transformer_cls_names_to_wrap:
            raise RequestError("fsdp_transformer_layer_cls_to_wrap", ",".join(names), "are no layers of this model")


def _set_parameters(module: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Put parameters in the place of those of the same names."""
    for name, parameter in parameters:
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, parameter)


def _gathered(shards: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield whole parameters by name, and give back their shards; one that has two names becomes one parameter."""
    made: dict[int, nn.Parameter] = {}
    for name, shard in shards.items():
        if id(shard) not in made:
            made[id(shard)] = nn.Parameter(whole(shard), requires_grad=False)
            storage = local(shard.detach()).untyped_storage()
            if storage.resizable():  # the update on CPUs has arrays that share it
                storage.resize_(0)
        yield name, made[id(shard)]


@dataclass(frozen=True)
class Shards:
    """Where the shards of a flattened parameter begin, with its size behind the last, and which is this process's."""

    bounds: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, parameter: Tensor) -> Shards:
        """Return a parameter's shards; one that is not sharded is a single one."""
        if not isinstance(parameter, DTensor):
            return cls((0, parameter.numel()), 0)
        processes, rows = parameter.device_mesh.size(), len(parameter)
        each = -(-rows // processes)  # as torch.chunk cuts: the last ones may have fewer, or none
        width = parameter.numel() // max(rows, 1)
        bounds = tuple(min(place * each, rows) * width for place in range(processes + 1))
        return cls(bounds, parameter.device_mesh.get_local_rank())

    @property
    def first(self) -> int:
        """The first weight of the process."""
        return self.bounds[self.rank]

    @property
    def last(self) -> int:
        """The weight behind its last one."""
        return self.bounds[self.rank + 1]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor has a shard on each process."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, which shares the tensor's memory, or the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all processes; every process has to call it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def joined(part: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the processes' vectors, of so many elements each, one behind the other; every process has to call it."""
    if len(counts) == 1:
        return part
    padded = part.new_zeros(max(counts))
    padded[: len(part)] = part
    rows = gather(padded).view(len(counts), -1)
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
