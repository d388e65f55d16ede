"""The masked optimizer's update for CPUs, compiled by numba: the same operations as in ``optimizer``, in one pass.

In torch, picking half of the weights out of a vector and putting them back takes several times as long as the update
itself. Here a block of weights goes through all of it while it is in the processor's cache. Nothing is contracted or
reordered, so every operation rounds as torch's do.

In every update ``weights`` and ``gradient`` are float32 [n]; ``bits`` uint8, the first weight in the highest bit.
``moments`` are those of all salient weights in order: Adam's mean and mean of squares, or SGD's momentum. ``piece`` is
the first weight, a multiple of 8, the one behind the last, and how many salient weights lie before the first.
``numbers`` are those of ``rules.AdamNumbers`` or ``rules.SGDNumbers``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_BLOCK = 1024  # weights: with their gradients and moments they fit into the first cache


@numba.njit(nogil=True, cache=True, error_model="numpy")
def update(weights: Any, gradient: Any, moments: Any, bits: Any, piece: Any, numbers: Any) -> None:
    """Update weights by Adam, with float32 moments."""
    mean, square = moments
    first, last, place = piece
    where, own, slope = np.empty(_BLOCK + 8, np.int32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(first, last, _BLOCK):
        n = _find(bits, start, min(start + _BLOCK, last), where)
        _gather(weights, gradient, where, n, own, slope)
        _adam(own, slope, mean[place : place + n], square[place : place + n], n, numbers)
        _scatter(weights, where, n, own)
        place += n


@numba.njit(nogil=True, cache=True, error_model="numpy")
def update_bf16(
    weights: Any, gradient: Any, moments: Any, bits: Any, piece: Any, numbers: Any, seed: Any, before: Any
) -> None:
    """Update weights by Adam, with bfloat16 moments as uint16, rounded at random by a hash of place and seed.

    ``before`` salient weights of the parameter are in other processes' shards before these.
    """
    mean, square = moments
    first, last, place = piece
    where, own, slope = np.empty(_BLOCK + 8, np.int32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    mean_bits, square_bits = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    for start in range(first, last, _BLOCK):
        n = _find(bits, start, min(start + _BLOCK, last), where)
        _gather(weights, gradient, where, n, own, slope)
        for i in range(n):
            mean_bits[i] = np.uint32(mean[place + i]) << np.uint32(16)
            square_bits[i] = np.uint32(square[place + i]) << np.uint32(16)
        _adam(own, slope, mean_bits.view(np.float32), square_bits.view(np.float32), n, numbers)
        for i in range(n):
            noise = np.uint32((np.uint32(before + place + i) ^ seed) * np.uint32(0x9E3779B1))
            noise = np.uint32((noise ^ (noise >> np.uint32(15))) * np.uint32(0x85EBCA77))
            noise = noise ^ (noise >> np.uint32(13))
            mean[place + i] = (mean_bits[i] + (noise & np.uint32(0xFFFF))) >> np.uint32(16)
            square[place + i] = (square_bits[i] + (noise >> np.uint32(16))) >> np.uint32(16)
        _scatter(weights, where, n, own)
        place += n


@numba.njit(nogil=True, cache=True, error_model="numpy")
def update_sgd(weights: Any, gradient: Any, moments: Any, bits: Any, piece: Any, numbers: Any) -> None:
    """Update weights by SGD, with float32 momentum."""
    momentum = moments[0]
    factor, step_size, scale, l2 = numbers
    first, last, place = piece
    where = np.empty(_BLOCK + 8, np.int32)
    for start in range(first, last, _BLOCK):
        n = _find(bits, start, min(start + _BLOCK, last), where)
        for i in range(n):
            w = weights[where[i]]
            v = momentum[place + i] * factor + (gradient[where[i]] * scale + w * l2)
            momentum[place + i] = v
            weights[where[i]] = w - v * step_size
        place += n


@numba.njit(nogil=True, cache=True, error_model="numpy")
def widen(narrow: Any, wide: Any) -> None:
    """Write bfloat16 values, given as uint16, as float32."""
    bits = wide.view(np.uint32)
    for i in range(len(narrow)):
        bits[i] = np.uint32(narrow[i]) << np.uint32(16)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def round_at_random(wide: Any, narrow: Any, first: Any, seed: Any) -> None:
    """Write float32 values as bfloat16 in uint16, rounded at random by a hash of place, from ``first`` on, and seed."""
    bits = wide.view(np.uint32)
    for i in range(len(wide)):
        noise = np.uint32((np.uint32(first + i) ^ seed) * np.uint32(0x9E3779B1))
        noise = np.uint32((noise ^ (noise >> np.uint32(15))) * np.uint32(0x85EBCA77))
        noise = noise ^ (noise >> np.uint32(13))
        narrow[i] = (bits[i] + (noise & np.uint32(0xFFFF))) >> np.uint32(16)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _find(bits: Any, start: int, stop: int, where: Any) -> int:
    """Write the indices of the salient weights to ``where`` and return how many there are."""
    n = 0
    for byte in range(start >> 3, (stop + 7) >> 3):
        for k in range(8):
            where[n] = (byte << 3) + k
            n += (bits[byte] >> (7 - k)) & 1
    return n


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _gather(weights: Any, gradient: Any, where: Any, n: int, own: Any, slope: Any) -> None:
    for i in range(n):
        own[i] = weights[where[i]]
        slope[i] = gradient[where[i]]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _scatter(weights: Any, where: Any, n: int, own: Any) -> None:
    for i in range(n):
        weights[where[i]] = own[i]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _adam(weights: Any, gradient: Any, mean: Any, square: Any, n: int, numbers: Any) -> None:
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction, eps, scale, l2, factor = numbers
    for i in range(n):
        g = gradient[i] * scale + weights[i] * l2
        m = mean[i] * beta1 + g * one_minus_beta1
        v = square[i] * beta2 + g * g * one_minus_beta2
        mean[i] = m
        square[i] = v
        weights[i] = weights[i] * factor - m * step_size / (np.sqrt(v) * bias_correction + eps)
