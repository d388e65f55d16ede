"""The masked optimizer: Adam or SGD on the salient weights alone, inside the backward pass where that is possible."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.training.moments import zeros
from erase_concept.training.rules import SGD, Adam, AdamNumbers, SGDNumbers
from erase_concept.training.shards import Shards, joined, local, whole

_PIECE = 1 << 20  # weights that one thread updates at a time
_OF_WEIGHTS = 0x5BD1E995  # makes the noise that rounds weights another than the moments'
# Gradients that wait to be updated together. torch's threads go on spinning for a moment after each of its own
# operations, in the way of ours: so we let them come to rest now and then, not for each parameter.
TOGETHER = 128 << 20


@dataclass
class _Salient:
    """One parameter's salient weights: which they are, how many, and their moments in order, by name.

    Of a sharded parameter these are the ones of this process's shard; ``counts`` says how many there are in each.
    """

    parameter: nn.Parameter
    shards: Shards
    bits: Tensor
    counts: tuple[int, ...]
    moments: dict[str, Any]
    pieces: tuple[tuple[int, int, int], ...]  # first and last weight, and how many are salient before
    seed: int

    @property
    def count(self) -> int:
        """How many salient weights there are."""
        return self.counts[self.shards.rank]

    @property
    def before(self) -> int:
        """How many there are in the shards before."""
        return sum(self.counts[: self.shards.rank])

    def chosen(self) -> Tensor:
        """Tell of each weight of the flattened parameter whether it is salient, bool [weights]."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        size = self.shards.last - self.shards.first
        return ((self.bits[:, None] >> shifts) & 1).view(-1)[:size].bool()

    def indices(self) -> Tensor:
        """Return the indices of the salient weights in the flattened parameter, int64 [count]."""
        return self.chosen().nonzero().view(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the moments, by name."""
        found: dict[str, Tensor] = {}
        for name, moment in self.moments.items():
            if isinstance(moment, Tensor):
                found[name] = moment
            else:
                found |= {f"{name}_{part}": getattr(moment, part) for part in ("codes", "scales")}
        return found


class MaskedOptimizer:
    """Adam or SGD, whose step changes only the weights that a mask allows.

    Weights outside the mask are never written, so they stay bit-identical whatever the settings. Masking gradients
    alone would not do: weight decay and momentum move a weight without any gradient. The moments exist for salient
    weights only. SGD's is in fp32. Adam's two are in fp32; in bf16, rounded at random, because the slow mean of squares
    would never move if it was rounded to the nearest; or in 8 bits, in blocks with a scale each (arXiv 2110.02861,
    through bitsandbytes).

    ``step`` updates all weights from their gradients after a backward pass. Within ``in_backward`` a backward pass
    updates each parameter as soon as its gradient is there and drops the gradient, so that all of them never exist at
    once. Both give the same bits. ``max_grad_norm`` clips the norm of the salient gradient, which needs all of it.
    ``lr`` may be changed from step to step.

    Weights are fp32 or bf16. A bf16 weight is updated in fp32 and rounded at random, up with the probability of what is
    cut off: rounded to the nearest, it would not move at all by steps that are smaller than half of its last bit.

    Sets ``requires_grad`` on the parameters with salient weights and clears it on the others. Without a mask every
    weight is salient. Raises RequestError when the mask does not fit the module or the state's package is missing,
    ValueError when the mask is empty or weights are neither fp32 nor bf16.
    """

    def __init__(self, module: nn.Module, mask: Mask | None, rule: Adam | SGD) -> None:
        """Find the salient weights of ``module`` and begin with moments of zero."""
        if mask is not None:
            mask.check(module)
        self.rule, self.lr = rule, rule.lr
        self.count = 0  # steps taken
        self.salient: dict[str, _Salient] = {}
        kept = module.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
        for key, parameter in module.named_parameters():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"weights must be fp32 or bf16 to be trained, and {key} is {parameter.dtype}")
            packed = np.packbits(np.ones(parameter.numel(), bool)) if mask is None else mask.bits[key].numpy()
            parameter.requires_grad_(bool(packed.any()))
            if parameter.requires_grad:
                self.salient[key] = _salient(parameter, packed, rule, zlib.crc32(key.encode()))
        if not self.salient:
            raise ValueError("the mask allows no weight to change")

    @property
    def sharded(self) -> bool:
        """Whether each process has a shard of every parameter."""
        return any(len(one.counts) > 1 for one in self.salient.values())

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Take one step inside the one backward pass that is made in this context.

        All gradients never exist at once: they are used and dropped when some 64 MB have come together.
        """
        if self.rule.max_grad_norm is not None:
            raise ValueError("the norm of the gradient is not known before the backward pass is over")
        self.count += 1

        waiting: list[_Salient] = []

        def hook(one: _Salient) -> Callable[[Tensor], None]:
            def ready(parameter: Tensor) -> None:
                waiting.append(one)
                if sum(each.parameter.nbytes for each in waiting) >= TOGETHER:
                    self._update(waiting)
                    waiting.clear()

            return ready

        hooks = [one.parameter.register_post_accumulate_grad_hook(hook(one)) for one in self.salient.values()]
        try:
            yield
            self._update(waiting)
        finally:
            for handle in hooks:
                handle.remove()

    def step(self) -> None:
        """Update every salient weight from its gradient, and drop all gradients."""
        self.count += 1
        ready = [one for one in self.salient.values() if one.parameter.grad is not None]
        scale = 1.0
        if self.rule.max_grad_norm is not None:
            parts = [_flat(one)[1][one.indices()].float() for one in ready]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
            if self.sharded:
                norm = reduce(norm.square(), "sum").sqrt()
            scale = min(1.0, self.rule.max_grad_norm / (float(norm) + 1e-6))
        self._update(ready, scale)

    @torch.no_grad()
    def _update(self, ready: Sequence[_Salient], scale: float = 1.0) -> None:
        numbers = self.rule.numbers(self.lr, self.count, scale)
        work = []
        for one in ready:
            seed = (one.seed + self.count * 0x632BE5AB) & 0xFFFFFFFF
            if not _COMPILED or one.bits.device.type != "cpu":
                _update_plainly(one, numbers, seed)
            elif self.rule.state == "8bit":
                decoded = [moment.float() for moment in one.moments.values()]
                _together(_compiled(one, decoded, numbers, seed))
                for moment, value in zip(one.moments.values(), decoded, strict=True):
                    moment.copy_(value)
            else:
                work += _compiled(one, list(one.moments.values()), numbers, seed)
        _together(work)
        for one in ready:
            one.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the weights, the salient ones' moments and the module's buffers, such as BatchNorm's statistics.

        They are named tensors for a checkpoint, and none is a copy. Shards are joined, so that they are those of a
        single process: then every process has to call this, and only the main one gets them, in main memory.
        """
        tensors = {"step": torch.tensor(self.count)}
        tensors |= {f"buffers.{name}": buffer for name, buffer in self.buffers.items()}
        if not self.sharded:
            return tensors | {name: tensor for one in self.salient.items() for name, tensor in _named(*one)}
        main = PartialState().is_main_process
        for one in self.salient.items():
            for name, tensor in _named(*one):
                if main:
                    tensors[name] = tensor.cpu()
        return tensors if main else {}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``state`` returned, in the optimizer and in the module.

        Raises ValueError for tensors of another training, before anything is changed.
        """
        self._check(tensors)
        self.count = int(tensors["step"])
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"buffers.{name}"])
        for key, one in self.salient.items():
            first, last = one.shards.first, one.shards.last
            local(one.parameter).view(-1).copy_(tensors[f"weights.{key}"].view(-1)[first:last])
            for part, tensor in one.tensors().items():
                tensor.copy_(tensors[f"{part}.{key}"][one.before : one.before + one.count])

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Compare names, types and shapes with those of a state: ``copy_`` would convert and broadcast in silence."""
        fits = {"step": (torch.int64, ())} | {
            f"buffers.{name}": (buffer.dtype, tuple(buffer.shape)) for name, buffer in self.buffers.items()
        }
        for key, one in self.salient.items():
            fits[f"weights.{key}"] = one.parameter.dtype, tuple(one.parameter.shape)
            for part, tensor in one.tensors().items():
                whole_shape = (sum(one.counts),) if len(one.counts) > 1 else tuple(tensor.shape)
                fits[f"{part}.{key}"] = tensor.dtype, whole_shape
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if wrong := [name for name in fits.keys() | found.keys() if fits.get(name) != found.get(name)]:
            raise ValueError(f"{min(wrong)} is missing, or another one than this training's")
        if int(tensors["step"]) < 1:
            raise ValueError("step is less than 1")


def _named(key: str, one: _Salient) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter's tensors for a checkpoint by name, one at a time; shards are joined."""
    yield f"weights.{key}", whole(one.parameter)
    for part, tensor in one.tensors().items():
        yield f"{part}.{key}", joined(tensor, one.counts)


def _salient(parameter: nn.Parameter, packed: np.ndarray, rule: Adam | SGD, seed: int) -> _Salient:
    """Begin with a parameter's salient weights, given as the mask's bits."""
    shards = Shards.of(parameter)
    if len(shards.bounds) > 2 and rule.state == "8bit":
        raise RequestError(
            "settings.state", "8bit", "is not for FSDP, whose shards cut its blocks; allowed: fp32, bf16"
        )
    chosen = np.unpackbits(packed, count=parameter.numel())
    counts = tuple(int(chosen[a:b].sum(dtype=np.int64)) for a, b in pairwise(shards.bounds))
    if len(counts) > 1:
        chosen = chosen[shards.first : shards.last]
        packed = np.packbits(chosen)
    elif packed[-1] & (spare := 0xFF >> (len(chosen) % 8 or 8)):
        # Whatever stands behind the last weight must be zero: the compiled update relies on it.
        packed = np.append(packed[:-1], packed[-1] & ~np.uint8(spare))
    count, device = counts[shards.rank], parameter.device
    moments = {name: zeros(count, rule.state, device, signed=signed) for name, signed in rule.moments.items()}
    return _Salient(parameter, shards, torch.from_numpy(packed).to(device), counts, moments, _pieces(chosen), seed)


def _pieces(salient: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Cut a parameter in pieces: first and last weight of each, and how many weights are salient before it."""
    if not salient.any():
        return ()
    cuts = np.append(np.arange(0, len(salient), _PIECE), len(salient))
    before = np.cumsum([0, *np.add.reduceat(salient, cuts[:-1], dtype=np.int64)])
    return tuple(zip(cuts[:-1].tolist(), cuts[1:].tolist(), before[:-1].tolist(), strict=True))


def _update_plainly(one: _Salient, numbers: AdamNumbers | SGDNumbers, seed: int) -> None:
    """Update in torch, one rounded operation after another, on any device."""
    weights, gradient = _flat(one)
    indices = one.indices()
    w = weights[indices].float()
    g = gradient[indices].float() * float(numbers.grad_scale) + w * float(numbers.l2)
    moments = [moment.float() for moment in one.moments.values()]  # in fp32 they are the moments themselves
    changed = _adam(w, g, moments, numbers) if isinstance(numbers, AdamNumbers) else _sgd(w, g, moments, numbers)
    if weights.dtype == torch.bfloat16:
        places = (indices + one.shards.first).to(torch.int32)
        changed = _rounded(changed, _noise(places, seed ^ _OF_WEIGHTS) & 0xFFFF)
    weights.index_copy_(0, indices, changed)
    narrow = [isinstance(moment, Tensor) and moment.dtype == torch.bfloat16 for moment in one.moments.values()]
    places = torch.arange(one.before, one.before + one.count, dtype=torch.int32, device=weights.device)
    noise = _noise(places, seed) if any(narrow) else None
    for place, (moment, value) in enumerate(zip(one.moments.values(), moments, strict=True)):
        if noise is not None:
            moment.copy_(_rounded(value, noise >> 16 * place & 0xFFFF))
        elif moment is not value:
            moment.copy_(value)


def _adam(w: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: AdamNumbers) -> Tensor:
    """Return the weights after a step of Adam, and update its moments in place."""
    mean, square = moments
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction, eps, _, _, factor = map(float, numbers)
    mean.mul_(beta1).add_(g * one_minus_beta1)
    square.mul_(beta2).add_(g * g * one_minus_beta2)
    # In fp64, for the fp32 root of some of torch's builds is not rounded correctly, and bits would differ.
    root_mean_square = square.double().sqrt().float()
    return w * factor - mean * step_size / (root_mean_square * bias_correction + eps)


def _sgd(w: Tensor, g: Tensor, moments: Sequence[Tensor], numbers: SGDNumbers) -> Tensor:
    """Return the weights after a step of SGD, and update its momentum in place."""
    (momentum,) = moments
    momentum.mul_(float(numbers.momentum)).add_(g)
    return w - momentum * float(numbers.step_size)


def _noise(places: Tensor, seed: int) -> Tensor:
    """Return 32 random bits for each place int32 as int32, hashed from it and the seed."""
    signed = torch.tensor([seed, 0x9E3779B1, 0x85EBCA77]).to(torch.int32)  # wraps around
    noise = (places ^ int(signed[0])) * int(signed[1])
    noise = (noise ^ (noise >> 15 & 0x1FFFF)) * int(signed[2])
    return noise ^ (noise >> 13 & 0x7FFFF)


def _rounded(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability of what is cut off, given 16 random bits each."""
    return ((value.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


_COMPILED = importlib.util.find_spec("numba") is not None
_THREADS = ThreadPoolExecutor(thread_name_prefix="masked-update")


def _together(work: Sequence[Callable[[], None]]) -> None:
    """Do all of the work, each of torch's threads an equal share."""
    threads = torch.get_num_threads()
    list(_THREADS.map(lambda share: [piece() for piece in share], [work[i::threads] for i in range(threads)]))


def _compiled(
    one: _Salient, moments: Sequence[Tensor], numbers: AdamNumbers | SGDNumbers, seed: int
) -> list[Callable[[], None]]:
    """Return the compiled update of each piece."""
    from erase_concept.training import compiled

    # A plain tuple: numba keeps the arguments' types on the disk, and could not read those of a class that was renamed.
    plain = tuple(numbers)
    narrow = moments[0].dtype == torch.bfloat16
    function: Any = compiled.update_bf16 if narrow else compiled.update
    if isinstance(numbers, SGDNumbers):
        function = compiled.update_sgd
    given = tuple(_array(moment) for moment in moments)
    more = (np.uint32(seed), one.before) if narrow else ()
    weights, gradient = map(_array, _flat(one))
    if one.parameter.dtype == torch.bfloat16:
        function = partial(_in_fp32, function, np.uint32(seed ^ _OF_WEIGHTS), one.shards.first)
    return [partial(function, weights, gradient, given, one.bits.numpy(), piece, plain, *more) for piece in one.pieces]


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as an array that shares its memory, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _in_fp32(function: Any, seed: np.uint32, begins: int, *arguments: Any) -> None:
    """Update a piece of bf16 weights in fp32, and round at random. What did not move is exact and stays as it is.

    ``begins`` is the place of the first weight in the whole parameter.
    """
    from erase_concept.training import compiled

    weights, gradient, given, bits, (first, last, place), *more = arguments
    wide, slope = (np.empty(last - first, np.float32) for _ in range(2))
    compiled.widen(weights[first:last], wide)
    compiled.widen(gradient[first:last], slope)
    function(wide, slope, given, bits[first >> 3 :], (0, last - first, place), *more)
    compiled.round_at_random(wide, weights[first:last], begins + first, seed)


def _flat(one: _Salient) -> tuple[Tensor, Tensor]:
    """Return a parameter and its gradient, flattened; of a sharded one this process's shard."""
    gradient = one.parameter.grad
    assert gradient is not None  # only parameters that have one are updated
    return local(one.parameter.detach()).view(-1), local(gradient).reshape(-1)
