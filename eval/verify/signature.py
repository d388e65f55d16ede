"""Signs a statement with an Ed25519 key, and checks a signature: a DSSE envelope, as in-toto's own tools read it.

DSSE (https://github.com/secure-systems-lab/dsse) signs the type and the bytes of what is inside, so that nothing has to
be brought into a canonical form.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError, first_line
from erase_concept.files import read_json, regular_size

_MOST_SIGNATURES = 100  # each is tried
_MOST_BYTES = 1 << 16  # of a key's file
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def read_private_key(file: Path) -> Any:
    """Read an Ed25519 private key in PEM, without a password; raises RequestError for anything else."""
    serialization, _, private = _cryptography()
    try:
        key = serialization.load_pem_private_key(_pem(file), password=None)
    except _unreadable() as problem:
        raise RequestError(
            "sign", file, f"is no private key in PEM without a password: {first_line(problem)}"
        ) from None
    if not isinstance(key, private):
        raise RequestError("sign", file, "is a key of another kind; allowed: Ed25519")
    return key


def read_public_key(file: Path) -> Any:
    """Read an Ed25519 public key in PEM; raises RequestError for anything else."""
    serialization, public, _ = _cryptography()
    try:
        key = serialization.load_pem_public_key(_pem(file))
    except _unreadable() as problem:
        raise RequestError("public_key", file, f"is no public key in PEM: {first_line(problem)}") from None
    if not isinstance(key, public):
        raise RequestError("public_key", file, "is a key of another kind; allowed: Ed25519")
    return key


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what the library raises for a file that is no key, or one of a kind that it does not know."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return OSError, ValueError, TypeError, UnsupportedAlgorithm


def _pem(file: Path) -> bytes:
    """Return the bytes of a key's file; raises ValueError for one that is too large, or no regular file."""
    if regular_size(file) > _MOST_BYTES:
        raise ValueError(f"is larger than {_MOST_BYTES:,} bytes")
    return file.read_bytes()


def key_id(public: Any) -> str:
    """Return the SHA-256 of a public key's 32 bytes, by which an envelope names it."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def envelope(payload: bytes, private: Any, file: Path) -> dict[str, Any]:
    """Return the DSSE envelope of a statement, signed with a private key, beside those who have signed it in a file."""
    signature = private.sign(_signed_bytes(payload))
    signed = {"keyid": key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}
    text = base64.b64encode(payload).decode()
    try:
        earlier = read_json(file)
        same = earlier["payload"] == text and earlier["payloadType"] == PAYLOAD_TYPE
        others = [one for one in earlier["signatures"] if same and one["keyid"] != signed["keyid"]]
    except (ValueError, KeyError, TypeError):  # none, or none that can be read
        others = []
    return {"payloadType": PAYLOAD_TYPE, "payload": text, "signatures": [*others[: _MOST_SIGNATURES - 1], signed]}


def check_envelope(file: Path, payload: bytes, public: Any) -> str:
    """Say what is wrong with the envelope in a file of a statement's bytes; "" where the key's signature holds."""
    from cryptography.exceptions import InvalidSignature

    try:
        content = read_json(file)
        inside = base64.b64decode(content["payload"], validate=True)
        signatures = [base64.b64decode(one["sig"], validate=True) for one in content["signatures"]]
    except (ValueError, KeyError, TypeError) as problem:
        return f"is missing or damaged: {first_line(problem)}"
    if len(signatures) > _MOST_SIGNATURES:
        return f"has more than {_MOST_SIGNATURES} signatures"
    if content.get("payloadType") != PAYLOAD_TYPE or inside != payload:
        return "signs another certificate"
    for signature in signatures:
        try:
            public.verify(signature, _signed_bytes(payload))
        except InvalidSignature:
            continue
        return ""
    return "has no signature of this key"


def _signed_bytes(payload: bytes) -> bytes:
    """Return what is signed: DSSE's pre-authentication encoding of type and payload."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _cryptography() -> tuple[Any, Any, Any]:
    """Return what is used of the package: its reader of keys, and the kinds of public and private keys."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise RequestError("sign", "(cryptography)", 'is not installed: pip install "erase-concept[sign]"') from None
    return serialization, ed25519.Ed25519PublicKey, ed25519.Ed25519PrivateKey
