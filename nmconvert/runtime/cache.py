"""What was measured on this CPU, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "NMCONVERT_CACHE"  # another folder, or "off"


def cpu_model() -> str:
    """The name of the CPU, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = [fields.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
    return " ".join(filter(None, known)) or platform.machine()


def folder() -> Path | None:
    """Where measurements are kept; None where they are not to be, or there is no home folder."""
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nmconvert")
    except RuntimeError:
        return None


class Cache:
    """Key → JSON value, for one ``situation`` (CPU, versions, threads); written by :meth:`save`, atomically."""

    def __init__(self, situation: Mapping[str, Any]) -> None:
        self.situation = json.dumps({"cpu": cpu_model(), **situation}, sort_keys=True)
        place = folder()
        self.path = None if place is None else place / "speed.json"
        self.changed: dict[str, Any] = {}
        self.known: dict[str, Any] = self._read().get(self.situation, {})

    def _read(self) -> dict[str, Any]:
        """All situations; a file that is missing or damaged is an empty one."""
        try:
            found = json.loads(self.path.read_text("utf-8")) if self.path else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()) else {}

    def get(self, key: str) -> Any:
        """What is known about ``key``, or None."""
        return self.known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember ``value``."""
        self.known[key] = self.changed[key] = value

    def save(self) -> None:
        """Write what is new; where the folder cannot be written it is measured again next time."""
        if not self.path or not self.changed:
            return
        content = self._read()
        content.setdefault(self.situation, {}).update(self.changed)
        scratch = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(content), "utf-8")
            scratch.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink()
        self.changed.clear()
