"""Judges, one file each: they say whether an image shows a concept."""

from __future__ import annotations

from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.eval.judges.judge import Judge
from erase_concept.registry import Registry

_SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")
JUDGES = Registry[Judge]("judges", "judge")


def find_judge(name: str) -> tuple[Judge, dict[str, str]]:
    """Return the judge of a name, and the setting that a value behind the name gives: ``torchvision:resnet50``.

    Raises RequestError when there is no such judge, and when the value is missing or not wanted.
    """
    kind, colon, value = name.partition(":")
    if Path(name).suffix in _SCRIPTS and kind not in JUDGES.all():
        what = f"a TorchScript file is a program: say torchscript:{name} if you trust it"
        raise RequestError("judge", name, f"{what}, or torchvision:NAME={name} where it holds weights alone")
    record = JUDGES.find(kind)
    if bool(record.value) != bool(value):
        allowed = f"must be {kind}:{record.value.upper()}" if record.value else f"must be {kind} alone"
        raise RequestError("judge", name, allowed)
    return record, {record.value: value} if colon else {}
