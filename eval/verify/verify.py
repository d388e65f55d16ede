"""Verify a run, an export or a certificate, and certify what holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError
from erase_concept.eval.verify.certificate import (
    Certificate,
    check_again,
    check_certificate,
    statement,
    write_certificate,
)
from erase_concept.eval.verify.check import Check
from erase_concept.eval.verify.findings import Findings, VerifyRequest
from erase_concept.eval.verify.signature import envelope, read_private_key, read_public_key
from erase_concept.files import atomic_write
from erase_concept.run_folder import RUN_FILE, UNLEARN_FILE


@dataclass(frozen=True, eq=False)
class Verification:
    """What was looked at, and where the certificate is: None where there is none, for something does not hold."""

    checks: tuple[Check, ...]
    certificate: Path | None

    @property
    def holds(self) -> bool:
        """Whether nothing that was looked at is wrong."""
        return all(check.holds is not False for check in self.checks)


def verify(model: Any, **request: Any) -> Verification:
    """Verify a run's folder, an export, or a certificate; ``request`` are the other fields of ``VerifyRequest``.

    Where all holds, ``certificate.json`` and its page are written into the run's folder, or beside an export. One that
    is there already is checked too, and stays as it is. Raises RequestError when the request is wrong: no run, another
    base model, a key that cannot be read.
    """
    return run_verification(VerifyRequest(model=Path(model), **request))


def run_verification(request: VerifyRequest) -> Verification:
    """Follow a request; see ``verify``."""
    model = Path(request.model)
    if not 0 <= request.recheck <= 1:
        raise RequestError("recheck", request.recheck, "a share from 0 to 1")
    private = None if request.sign is None else read_private_key(request.sign)
    public = None if request.public_key is None else read_public_key(request.public_key)
    if model.suffix == ".json":
        if private is not None:
            raise RequestError("sign", str(request.sign), "goes with a run or an export, not with a certificate")
        result = Verification(tuple(check_certificate(Certificate(model), public, whole=False)), model)
        return result if result.holds else Verification(result.checks, None)
    try:
        where, found = _find(request, model)
    except (
        KeyError,
        TypeError,
        AttributeError,
        json.JSONDecodeError,
    ) as problem:  # a record that is not as a run writes it
        raise RequestError("model", model, f"its record is damaged: {problem!r}") from problem
    content = statement(found, where.home)
    checks = list(found.checks)
    if where.file.is_file():
        checks += [*check_certificate(where, public, whole=True), check_again(where, content)]
    elif public is not None:
        raise RequestError("public_key", str(request.public_key), f"there is no {where.file.name} yet")
    result = Verification(tuple(checks), where.file)
    if not result.holds:
        return Verification(result.checks, None)
    if not where.file.is_file():
        write_certificate(content, where)
    if private is not None:
        with atomic_write(where.envelope) as partial:
            signed = json.dumps(envelope(where.file.read_bytes(), private, where.envelope), indent=1)
            partial.write_text(signed + "\n", encoding="utf-8")
    return result


def _find(request: VerifyRequest, model: Path) -> tuple[Certificate, Findings]:
    """Return where the certificate is or will be, and what is found; raises RequestError where nothing can be."""
    if not model.exists():
        raise RequestError("model", model, "there is no such run, export or certificate")
    if request.base is None:
        raise RequestError("base", "(not given)", "needed: the model that was erased from")
    if (model / UNLEARN_FILE).is_file():
        from erase_concept.eval.verify.unlearned import check_unlearned

        return Certificate(model / "certificate.json"), check_unlearned(request, request.base)
    if (model / RUN_FILE).is_file():
        from erase_concept.eval.verify.run import check_run

        return Certificate(model / "certificate.json"), check_run(request, request.base)
    from erase_concept.eval.verify.export import check_export_alone
    from erase_concept.pipelines.load import locate

    try:
        locate(request.base)
    except RequestError as problem:
        raise RequestError("base", request.base, problem.allowed) from None
    stem = model.name if model.is_dir() else model.stem
    return Certificate(model.parent / f"{stem}.certificate.json"), check_export_alone(request, request.base)
