"""What a verification is asked for, and all that it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase_concept.eval.verify.check import Check
from erase_concept.eval.verify.weights import Compared


@dataclass(frozen=True)
class VerifyRequest:
    """What is verified.

    ``model`` is a run's folder, an export or a certificate. ``base`` is the base model, by path or name; a certificate
    needs none. ``exports`` and ``reports`` are paths of a run's that are not where they are looked for. ``recheck`` is
    the share of the images that are judged anew, drawn with ``seed``, or with one that nobody can foresee. ``ema``
    chooses the weights of a base model's file where the run did not. ``sign`` and ``public_key`` are files of Ed25519
    keys in PEM.
    """

    model: Path
    base: str | None = None
    exports: tuple[Path, ...] = ()
    reports: tuple[Path, ...] = ()
    recheck: float = 0.05
    seed: int | None = None
    ema: bool | None = None
    sign: Path | None = None
    public_key: Path | None = None


@dataclass(frozen=True, eq=False)
class Findings:
    """All that was found of a run or an export.

    ``about`` says what was removed, from which model, and how. ``subjects`` are the files that are certified, and
    ``evidence`` those by which. ``scores`` are plain values. ``untested`` says in sentences what was not looked at.
    """

    about: dict[str, Any]
    checks: tuple[Check, ...]
    parts: tuple[Compared, ...] = ()
    scores: tuple[dict[str, Any], ...] = ()
    subjects: tuple[Path, ...] = ()
    evidence: tuple[Path, ...] = ()
    untested: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing that was looked at is wrong."""
        return all(check.holds is not False for check in self.checks)


def files_in(path: Path) -> Iterator[Path]:
    """Yield a file, or all files of a model's folder but its card, which is written again with each evaluation."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / "README.md" and ".cache" not in file.parts:
            yield file
