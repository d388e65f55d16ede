"""The certificate: an in-toto Statement of what was found, a page that shows it, and the check of both later.

``certificate.json`` is a Statement of https://github.com/in-toto/attestation, version 1: its subjects are the certified
files with their SHA-256, and its predicate what is said of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError
from erase_concept.eval.report.html import render
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.findings import Findings
from erase_concept.eval.verify.folder import loaded_files
from erase_concept.eval.verify.scores import REJUDGED
from erase_concept.eval.verify.signature import check_envelope
from erase_concept.files import atomic_write, file_sha256, is_there, read_json, relative
from erase_concept.pipelines.formats.folder import INDEX
from erase_concept.pipelines.image_set import MANIFEST, is_intact, read_manifest
from erase_concept.run_folder import versions

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:erase-concept:erasure:v1"
_SAME = ("about", "components", "scores")  # of a predicate: what another verification finds again


@dataclass(frozen=True)
class Certificate:
    """Where a certificate is: the statement, its page, and the envelope with its signature."""

    file: Path

    @property
    def home(self) -> Path:
        """The folder from which its files are named."""
        return self.file.parent

    @property
    def page(self) -> Path:
        """The page that shows it."""
        return self.file.with_suffix(".html")

    @property
    def envelope(self) -> Path:
        """The DSSE envelope that signs it."""
        return self.file.with_suffix(".dsse.json")


def statement(found: Findings, home: Path) -> dict[str, Any]:
    """Return the statement of what was found, its files named by their paths from a folder."""
    return {
        "_type": STATEMENT,
        "subject": list(_described(found.subjects, home)),
        "predicateType": PREDICATE,
        "predicate": {
            "about": found.about,
            "components": [asdict(part) for part in found.parts],
            "checks": [asdict(check) for check in found.checks],
            "scores": list(found.scores),
            "not_tested": list(found.untested),
            "evidence": list(_described(found.evidence, home)),
            "verified": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "verifier": versions(),
        },
    }


def _described(files: Iterable[Path], home: Path) -> Iterator[dict[str, Any]]:
    """Yield files as in-toto describes them: name and digest."""
    for name, file in {relative(file, home): file for file in files}.items():
        yield {"name": name, "digest": {"sha256": file_sha256(file)}}


def write_certificate(content: Mapping[str, Any], where: Certificate) -> None:
    """Write a statement and its page."""
    text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
    with atomic_write(where.page) as file:
        file.write_bytes(page(json.loads(text)))
    with atomic_write(where.file) as file:  # last: it says that the page is there
        file.write_text(text, encoding="utf-8")


def page(content: Mapping[str, Any]) -> bytes:
    """Return the page of a statement; it loads nothing, and text from outside is escaped."""
    return render("certificate.html.j2", subjects=content["subject"], **content["predicate"])


def read_certificate(file: Path) -> dict[str, Any]:
    """Read a statement; raises RequestError for a file that holds none."""
    try:
        content = read_json(file)
        kinds = content["_type"], content["predicateType"]
        described = [*content["subject"], *content["predicate"]["evidence"]]
        for one in described:
            if not isinstance(one["name"], str) or not isinstance(one["digest"]["sha256"], str):
                raise TypeError("a file without a name or a digest")
    except (ValueError, KeyError, TypeError) as problem:
        raise RequestError("model", file, f"is no certificate that can be read: {problem}") from None
    if kinds != (STATEMENT, PREDICATE):
        raise RequestError("model", file, f"is a statement of another kind: {' '.join(map(str, kinds))}")
    return dict(content)


def check_certificate(where: Certificate, public: Any | None, *, whole: bool) -> list[Check]:
    """Check that the files are those of a certificate, and its signature by a public key, where one is given.

    With ``whole`` every file must be there, as in the run's folder; otherwise those count that are, one of the subjects
    at least. Raises RequestError where the file is no certificate.
    """
    content = read_certificate(where.file)
    name = where.file.name
    checks = [*_signature(where, public)]
    subjects, evidence = content["subject"], content["predicate"]["evidence"]
    wrong, absent, there, known = [], 0, 0, set[Path]()
    hashed, images = cache(file_sha256), cache(partial(_images, home=where.home))  # a file may be named several times
    for place, one in enumerate((*subjects, *evidence)):
        file = _find(where.home, one["name"])
        known |= set() if file is None else {file}
        if file is None:
            absent += 1
            wrong += [failed(f"files of {name}", one["name"], f"is missing, and {name} names it")] if whole else []
        elif hashed(file) != one["digest"]["sha256"]:
            wrong.append(failed(f"files of {name}", one["name"], f"was changed since {name} was written"))
        else:
            there += place < len(subjects)
            wrong += images(file) if file.name == MANIFEST else []
    wrong += [
        failed(f"files of {name}", relative(file, where.home), f"is in a certified model, and {name} does not name it")
        for file in _added(where.home, subjects, known)
    ]
    if not wrong and not there:
        wrong = [failed(f"files of {name}", subjects[0]["name"] if subjects else name, "is not here, nor any other")]
    total = len(subjects) + len(evidence)
    left = f"; {absent} are not here" if absent else ""
    checks += wrong or [Check(f"files of {name}", True, f"{total - absent} of {total} are as they were{left}")]
    return [*checks, *_page(where, content)]


def _find(home: Path, name: str) -> Path | None:
    """Return a certified file: by its path from the certificate's folder, or else in it."""
    return next((file for file in (home / name, home / Path(name).name) if is_there(file) and file.is_file()), None)


def _added(home: Path, subjects: Iterable[Mapping[str, Any]], known: set[Path]) -> Iterator[Path]:
    """Yield the files in certified models' folders that a program could load, and no line of the certificate names."""
    for folder in (home / one["name"] for one in subjects if Path(one["name"]).name == INDEX):
        yield from (file for file in loaded_files(folder.parent) if file not in known) if folder in known else ()


def _images(manifest: Path, home: Path) -> list[Check]:
    """Return the first image of a manifest that is there and was changed."""
    for line in read_manifest(manifest.parent):
        file = manifest.parent / line["image"]
        if file.is_file() and not is_intact(manifest.parent, line):
            return [failed("images", relative(file, home), "is not the image of the manifest")]
    return []


def _signature(where: Certificate, public: Any | None) -> Iterator[Check]:
    what = f"signature of {where.file.name}"
    if public is not None:
        fault = check_envelope(where.envelope, where.file.read_bytes(), public)
        yield failed(what, where.envelope.name, fault) if fault else Check(what, True, "is of this key")
    elif where.envelope.is_file():
        yield Check(what, None, "was not checked, for no public key is given")


def _page(where: Certificate, content: Mapping[str, Any]) -> Iterator[Check]:
    """Check that the page shows the certificate, where the same version wrote it."""
    from jinja2 import TemplateError

    if not where.page.is_file():
        return
    try:
        if content["predicate"]["verifier"]["erase-concept"] != versions()["erase-concept"]:
            yield Check(where.page.name, None, "was not compared: another version wrote it")
            return
        shown = where.page.read_bytes() == page(content)
    except (TemplateError, KeyError, TypeError, ValueError, AttributeError):  # it is not as verify writes it
        shown = False
    if not shown:
        yield failed(where.page.name, where.page.name, f"does not show what {where.file.name} says")


def check_again(where: Certificate, found: Mapping[str, Any]) -> Check:
    """Check that a certificate says what was found now, of the same files.

    How many images were judged anew may differ. What could not be looked at now is not confirmed.
    """
    name = where.file.name
    before, now = read_certificate(where.file), json.loads(json.dumps(found))
    said, seen = before["predicate"], now["predicate"]
    if wrong := next((key for key in _SAME if said.get(key) != seen[key]), ""):
        return failed(name, name, f"says something else of {wrong} than is found now")
    files = [{one["name"] for one in _files(some)} for some in (before, now)]  # their hashes are checked already
    if other := sorted(one for one in files[0] - files[1] if is_there(where.home / one)):
        how = "'export' or 'report' names its path"
        return failed(name, name, f"certifies {other[0]}, which is none of the files that were looked at now; {how}")
    if other := sorted(files[1] - files[0]):
        return failed(name, name, f"does not name {other[0]}")
    try:
        open_now, fault = _checks_differ(_lines(said["checks"]), _lines(seen["checks"]))
        lost = {_words(line) for line in seen["not_tested"] if not line.startswith((REJUDGED, *open_now))}
        lost -= {_words(line) for line in said["not_tested"]}
    except (KeyError, TypeError, AttributeError):
        return failed(name, name, "has checks that are not as verify writes them")
    if fault or lost:
        return failed(name, name, fault or f"does not say what was not tested: {min(lost)}")
    if open_now:
        return Check(name, None, f"could not be confirmed throughout: {open_now[0]} was not looked at now")
    return Check(name, True, "says what is found now")


def _files(content: Mapping[str, Any]) -> list[Any]:
    return [*content["subject"], *content["predicate"]["evidence"]]


def _lines(checks: Any) -> dict[str, tuple[Any, str]]:
    """Return the checks of a certificate by what they are of, but for those of a random share."""
    return {one["what"]: (one["holds"], one["found"]) for one in checks if not one["what"].startswith(REJUDGED)}


def _checks_differ(said: dict[str, tuple[Any, str]], seen: dict[str, tuple[Any, str]]) -> tuple[list[str], str]:
    """Return which checks could not be made now, and what else differs; "" for nothing."""
    if other := sorted(said.keys() ^ seen.keys()):
        return [], f"says something else of {other[0]} than is found now"
    differ = [what for what in said if said[what] != seen[what]]
    open_now = [what for what in differ if seen[what][0] is None]
    wrong = next((what for what in differ if what not in open_now), "")
    return open_now, f"says something else of {wrong} than is found now" if wrong else ""


def _words(line: str) -> str:
    """Return a sentence without its numbers, which depend on how many images were judged anew."""
    return re.sub(r"[\d,.]*\d", "N", line)
