"""Signatures that only this user on this machine can make: they tell our own notes in a file from somebody else's.

A manifest remembers ``--model``, and naming a callable runs it. What an unknown checkpoint remembers must therefore not be
acted on, unless it was noted here. The key lies in ``$XDG_STATE_HOME/nmconvert/key`` (``~/.local/state`` by default), made at
random when it is first needed, readable by its owner only.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

_BYTES = 32


def sign(text: str) -> str | None:
    """The signature of ``text`` (HMAC-SHA-256, hexadecimal), or None where no key can be kept."""
    key = _key(create=True)
    return None if key is None else _mac(key, text)


def is_ours(text: str, signature: object) -> bool:
    """Whether ``signature`` was made here, of this text."""
    key = _key(create=False)
    return key is not None and isinstance(signature, str) and hmac.compare_digest(_mac(key, text).encode(), signature.encode())


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def _key(*, create: bool) -> bytes | None:
    try:
        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "nmconvert", "key")
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(path)
        key = path.read_bytes()
    except (OSError, RuntimeError):  # no home folder, or none that can be written: nothing is remembered there
        return None
    return key if len(key) == _BYTES else None


def _write_new(path: Path) -> None:
    """Whole or not at all, and never over the key of another process: the name is linked to a finished file."""
    if path.exists():
        return
    draft = path.with_name(f"key.{secrets.token_hex(4)}")
    draft.touch(mode=0o600)
    try:
        draft.write_bytes(secrets.token_bytes(_BYTES))
        path.hardlink_to(draft)
    except FileExistsError:
        return
    finally:
        draft.unlink()
