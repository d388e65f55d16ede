"""Graphics cards: how much memory they have and how fast they are, at hand or by name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import psutil
import torch
import yaml
from torch import nn

from erase_concept.counting import LivingBytes
from erase_concept.errors import RequestError
from erase_concept.pipelines.processes import processes

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CONTEXT = 600 << 20  # bytes that CUDA takes for itself
EFFICIENCY = 0.4  # of a card's published peak: ours, a guess at what a UNet reaches


@dataclass(frozen=True)
class NamedCard:
    """A card by its name: bytes of memory, and the published peak in operations per second by precision."""

    name: str
    memory: int
    peaks: dict[str, float]
    process: int = _CONTEXT

    @property
    def speed_from(self) -> str:
        """Where the speed comes from, in words."""
        rounded = "" if "bf16" in self.peaks else "; it has no bf16, which is taken as fast as fp32"
        return f"assumed to reach {EFFICIENCY:.0%} of the card's published peak{rounded}"

    def speed(self, precision: Precision) -> float:
        """Return the operations per second that are expected of it."""
        return EFFICIENCY * self.peaks.get(precision, self.peaks["fp32"])


@dataclass(frozen=True)
class CardAtHand:
    """The device that this process would run on; on a CPU its memory is the machine's.

    ``measured`` are operations per second in steps of the model itself, where some were taken.
    """

    device: torch.device
    measured: float | None = None

    @property
    def speed_from(self) -> str:
        """Where the speed comes from, in words."""
        return f"as measured on {'a convolution' if self.measured is None else 'its own steps'}"

    @property
    def name(self) -> str:
        """The card's name, or that of another kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @cached_property
    def process(self) -> int:
        """Bytes that the process takes before it loads a model: on a CPU in all, otherwise on the device."""
        return int(psutil.Process().memory_info().rss) if self.device.type == "cpu" else _CONTEXT

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(psutil.virtual_memory().total)

    def speed(self, precision: Precision) -> float:
        """Return the operations per second, measured where they are not known."""
        return operations_per_second(self.device, precision) if self.measured is None else self.measured


Card = NamedCard | CardAtHand


@cache
def cards() -> dict[str, NamedCard]:
    """Return the known cards by name. A card of so many GB has as many GiB."""
    known = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
    return {
        name: NamedCard(name, facts.pop("memory") << 30, {key: value * 1e12 for key, value in facts.items()})
        for name, facts in known.items()
    }


def find_card(name: str | None) -> Card:
    """Return a card by name, or the one at hand; raises RequestError when none has that name."""
    if name is None:
        return CardAtHand(processes().device)
    plain = " ".join(word for word in name.casefold().split() if word not in ("nvidia", "geforce"))
    for known, card in cards().items():
        if known.casefold() == plain:
            return card
    raise RequestError("card", name, f"unknown; allowed: {', '.join(cards())}")


def on_cpu(card: Card) -> bool:
    """Tell whether a card is none: a CPU, whose memory is the machine's."""
    return isinstance(card, CardAtHand) and card.device.type == "cpu"


@cache
def operations_per_second(device: torch.device, precision: Precision) -> float:
    """Measure how fast a device is at what UNets are made of, a convolution forward and backward."""
    layer = nn.Conv2d(640, 640, 3, padding=1, device=device, dtype=_DTYPES[precision])
    rows = torch.randn(2, 640, 32, 32, device=device, dtype=_DTYPES[precision], requires_grad=True)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        with LivingBytes(layer) as counted:
            layer(rows).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return counted.operations / best
