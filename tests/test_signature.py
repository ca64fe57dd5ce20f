from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nmconvert.manifest import Manifest
from nmconvert.signature import is_ours, sign


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_our_own_and_nothing_else() -> None:
    signature = sign("model é")
    assert is_ours("model é", signature)
    for text, other in (("model e", signature), ("model é", None), ("model é", ""), ("model é", 7), ("model é", "é" * 64)):
        assert not is_ours(text, other)


def test_of_another_machine(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = sign("text")
    monkeypatch.setenv("XDG_STATE_HOME", str(state / "other"))
    assert not is_ours("text", signature)
    assert list(state.rglob("other")) == []  # asking makes no key
    assert sign("text") != signature


def test_the_key_is_private_and_stays(state: Path) -> None:
    first = sign("text")
    key = state / "nmconvert" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sign("text") == first
    assert [path.name for path in key.parent.iterdir()] == ["key"]


def test_a_damaged_key_signs_nothing(state: Path) -> None:
    signature = sign("text")
    (state / "nmconvert" / "key").write_bytes(b"")
    assert sign("text") is None
    assert not is_ours("text", signature)


def test_no_place_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert sign("text") is None
    assert not is_ours("text", "0" * 64)


def test_no_home(state: Path, homeless: None) -> None:
    assert sign("text") is None
    assert not is_ours("text", "0" * 64)


def test_a_manifest_of_somebody_else_names_nothing_that_is_run(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"model": "os:system", "model_arguments": {"command": "true"}, "data": "os:getcwd", "input": ["1,3,8,8"]}
    text = Manifest().with_settings(**said).to_json()
    assert Manifest.from_json(text, "a.pt").settings == said
    changed = text.replace('"true"', '"false"')
    assert Manifest.from_json(changed, "a.pt").settings == {"input": ["1,3,8,8"]}
    monkeypatch.setenv("XDG_STATE_HOME", str(state / "other"))
    assert Manifest.from_json(text, "a.pt").settings == {"input": ["1,3,8,8"]}
