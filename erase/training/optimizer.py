"""The masked optimizer: Adam on the salient weights alone, inside the backward pass where that is possible."""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask

State = Literal["fp32", "bf16", "8bit"]
STATE_BYTES: dict[State, float] = {"fp32": 8, "bf16": 4, "8bit": 2 * (1 + 4 / 256)}  # of both moments of a weight
_BLOCK = 256  # salient weights that share a scale in the 8-bit state
_PIECE = 1 << 20  # weights that one thread updates at a time
_OF_WEIGHTS = 0x5BD1E995  # makes the noise that rounds weights another than the moments'
# Gradients that wait to be updated together. torch's threads go on spinning for a moment after each of its own
# operations, in the way of ours: so we let them come to rest now and then, not for each parameter.
TOGETHER = 128 << 20


class Numbers(NamedTuple):
    """A step's numbers, all float32, for the update of each salient weight w by its gradient g.

    g = grad_scale g + l2 w,  m = beta1 m + one_minus_beta1 g,  v = beta2 v + one_minus_beta2 g^2,
    w = decay_factor w - step_size m / (bias_correction sqrt(v) + eps)
    """

    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    step_size: np.float32
    bias_correction: np.float32
    eps: np.float32
    grad_scale: np.float32
    l2: np.float32
    decay_factor: np.float32


@dataclass(frozen=True)
class Adam:
    """Settings of Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), whose weight decay is decoupled."""

    lr: float
    name: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    state: State = "fp32"


@dataclass
class _Salient:
    """One parameter's salient weights: which they are, how many, and their moments in order."""

    parameter: nn.Parameter
    bits: Tensor
    count: int
    mean: Any
    square: Any
    pieces: tuple[tuple[int, int, int], ...]  # first and last weight, and how many are salient before
    seed: int

    def indices(self) -> Tensor:
        """Return the indices of the salient weights in the flattened parameter, int64 [count]."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[:, None] >> shifts) & 1).view(-1)[: self.parameter.numel()].nonzero().view(-1)

    def moments(self) -> dict[str, Tensor]:
        """Return the tensors that hold the moments, by name."""
        if isinstance(self.mean, Tensor):
            return {"mean": self.mean, "square": self.square}
        pairs = {"mean": self.mean, "square": self.square}.items()
        return {f"{name}_{part}": getattr(value, part) for name, value in pairs for part in ("codes", "scales")}


class _Coded:
    """A moment in 8 bits: a code for each weight, and a scale for each block of them."""

    def __init__(self, count: int, device: torch.device, *, signed: bool) -> None:
        from bitsandbytes.functional import create_dynamic_map

        self.map = create_dynamic_map(signed).to(device)
        self.codes = torch.zeros(count, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-count // _BLOCK), device=device)

    def float(self) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(self.codes, absmax=self.scales, code=self.map, blocksize=_BLOCK)

    def copy_(self, value: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        codes, made = quantize_blockwise(value, code=self.map, blocksize=_BLOCK)
        self.codes.copy_(codes)
        self.scales.copy_(made.absmax)


class MaskedOptimizer:
    """Adam whose step changes only the weights that a mask allows.

    Weights outside the mask are never written, so they stay bit-identical whatever the settings. Masking gradients
    alone would not do: weight decay and momentum move a weight without any gradient. The two moments exist for salient
    weights only: in fp32; in bf16, rounded at random, because the slow mean of squares would never move if it was
    rounded to the nearest; or in 8 bits, in blocks with a scale each (arXiv 2110.02861, through bitsandbytes).

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

    def __init__(self, module: nn.Module, mask: Mask | None, adam: Adam) -> None:
        """Find the salient weights of ``module`` and begin with moments of zero."""
        if mask is not None:
            mask.check(module)
        self.adam, self.lr = adam, adam.lr
        self.count = 0  # steps taken
        self.salient: dict[str, _Salient] = {}
        for key, parameter in module.named_parameters():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"weights must be fp32 or bf16 to be trained, and {key} is {parameter.dtype}")
            packed = np.packbits(np.ones(parameter.numel(), bool)) if mask is None else mask.bits[key].numpy()
            spare = 0xFF >> (parameter.numel() % 8 or 8)
            if packed.size and packed[-1] & spare:
                # Whatever stands behind the last weight must be zero: the compiled update relies on it.
                packed = np.append(packed[:-1], packed[-1] & ~np.uint8(spare))
            chosen = np.unpackbits(packed, count=parameter.numel())
            count = int(chosen.sum(dtype=np.int64))
            parameter.requires_grad_(count > 0)
            if count:
                pieces, seed = _pieces(chosen), zlib.crc32(key.encode())
                bits = torch.from_numpy(packed).to(parameter.device)
                mean, square = (_zeros(count, adam.state, parameter.device, signed=signed) for signed in (True, False))
                self.salient[key] = _Salient(parameter, bits, count, mean, square, pieces, seed)
        if not self.salient:
            raise ValueError("the mask allows no weight to change")

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Take one step inside the one backward pass that is made in this context.

        All gradients never exist at once: they are used and dropped when some 64 MB have come together.
        """
        if self.adam.max_grad_norm is not None:
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
        if self.adam.max_grad_norm is not None:
            parts = [_flat(one)[1][one.indices()].float() for one in ready]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
            scale = min(1.0, self.adam.max_grad_norm / (float(norm) + 1e-6))
        self._update(ready, scale)

    def _numbers(self, scale: float) -> Numbers:
        adam, (beta1, beta2), decoupled = self.adam, self.adam.betas, self.adam.name == "adamw"
        step_size, bias_correction = self.lr / (1 - beta1**self.count), 1 / math.sqrt(1 - beta2**self.count)
        l2 = 0.0 if decoupled else adam.weight_decay
        decay_factor = 1 - self.lr * adam.weight_decay if decoupled else 1.0
        moments = (beta1, 1 - beta1, beta2, 1 - beta2)
        numbers = (*moments, step_size, bias_correction, adam.eps, scale, l2, decay_factor)
        return Numbers(*map(np.float32, numbers))

    @torch.no_grad()
    def _update(self, ready: Sequence[_Salient], scale: float = 1.0) -> None:
        numbers = self._numbers(scale)
        work = []
        for one in ready:
            seed = (one.seed + self.count * 0x632BE5AB) & 0xFFFFFFFF
            if not _COMPILED or one.bits.device.type != "cpu":
                _update_plainly(one, numbers, seed)
            elif isinstance(one.mean, _Coded):
                mean, square = one.mean.float(), one.square.float()
                _together(_compiled(one, (mean, square), numbers, seed))
                one.mean.copy_(mean)
                one.square.copy_(square)
            else:
                work += _compiled(one, (one.mean, one.square), numbers, seed)
        _together(work)
        for one in ready:
            one.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the salient ones' moments as named tensors, for a checkpoint: none is a copy."""
        tensors = {"step": torch.tensor(self.count)}
        for key, one in self.salient.items():
            tensors[f"weights.{key}"] = one.parameter.detach()
            tensors |= {f"{part}.{key}": tensor for part, tensor in one.moments().items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``state`` returned, in the optimizer and in the module."""
        self.count = int(tensors["step"])
        for key, one in self.salient.items():
            one.parameter.copy_(tensors[f"weights.{key}"])
            for part, tensor in one.moments().items():
                tensor.copy_(tensors[f"{part}.{key}"])


def _pieces(salient: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Cut a parameter in pieces: first and last weight of each, and how many weights are salient before it."""
    cuts = np.append(np.arange(0, len(salient), _PIECE), len(salient))
    before = np.cumsum([0, *np.add.reduceat(salient, cuts[:-1], dtype=np.int64)])
    return tuple(zip(cuts[:-1].tolist(), cuts[1:].tolist(), before[:-1].tolist(), strict=True))


def _zeros(count: int, state: State, device: torch.device, *, signed: bool) -> Any:
    if state != "8bit":
        return torch.zeros(count, dtype=torch.float32 if state == "fp32" else torch.bfloat16, device=device)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError("settings.state", "8bit", 'needs bitsandbytes: pip install "erase-concept[8bit]"')
    return _Coded(count, device, signed=signed)


def _update_plainly(one: _Salient, numbers: Numbers, seed: int) -> None:
    """Update in torch, one rounded operation after another, on any device."""
    weights, gradient = _flat(one)
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction, eps, scale, l2, factor = map(
        float, numbers
    )
    indices = one.indices()
    w = weights[indices].float()
    g = gradient[indices].float() * scale + w * l2
    m = one.mean.float().mul_(beta1).add_(g * one_minus_beta1)
    v = one.square.float().mul_(beta2).add_(g * g * one_minus_beta2)
    # In fp64, for the fp32 root of some of torch's builds is not rounded correctly, and bits would differ.
    root_mean_square = v.double().sqrt().float()
    changed = w * factor - m * step_size / (root_mean_square * bias_correction + eps)
    if weights.dtype == torch.bfloat16:
        changed = _rounded(changed, _noise(indices.to(torch.int32), seed ^ _OF_WEIGHTS) & 0xFFFF)
    weights.index_copy_(0, indices, changed)
    if isinstance(one.mean, Tensor) and one.mean.dtype == torch.bfloat16:
        noise = _noise(torch.arange(one.count, dtype=torch.int32, device=weights.device), seed)
        m, v = _rounded(m, noise & 0xFFFF), _rounded(v, noise >> 16 & 0xFFFF)
    if m is not one.mean:  # in fp32 the moments were updated in place
        one.mean.copy_(m)
        one.square.copy_(v)


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


def _compiled(one: _Salient, moments: tuple[Tensor, Tensor], numbers: Numbers, seed: int) -> list[Callable[[], None]]:
    """Return the compiled update of each piece."""
    from erase_concept.training import compiled

    narrow = moments[0].dtype == torch.bfloat16
    function: Any = compiled.update_bf16 if narrow else compiled.update
    given = tuple(_array(moment) for moment in moments)
    more = (np.uint32(seed),) if narrow else ()
    weights, gradient = map(_array, _flat(one))
    if one.parameter.dtype == torch.bfloat16:
        function = partial(_in_fp32, function, np.uint32(seed ^ _OF_WEIGHTS))
    return [
        partial(function, weights, gradient, given, one.bits.numpy(), piece, numbers, *more) for piece in one.pieces
    ]


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as an array that shares its memory, bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _in_fp32(
    function: Any, seed: np.uint32, weights: np.ndarray, gradient: np.ndarray, given: Any, bits: np.ndarray, *rest: Any
) -> None:
    """Update a piece of bf16 weights in fp32, and round at random. What did not move is exact and stays as it is."""
    from erase_concept.training import compiled

    (first, last, place), *more = rest
    wide, slope = (np.empty(last - first, np.float32) for _ in range(2))
    compiled.widen(weights[first:last], wide)
    compiled.widen(gradient[first:last], slope)
    function(wide, slope, given, bits[first >> 3 :], (0, last - first, place), *more)
    compiled.round_at_random(wide, weights[first:last], first, seed)


def _flat(one: _Salient) -> tuple[Tensor, Tensor]:
    """Return a parameter and its gradient, flattened."""
    gradient = one.parameter.grad
    assert gradient is not None  # only parameters that have one are updated
    return one.parameter.detach().view(-1), gradient.reshape(-1)
