"""What all tests share: one thread each, hypothesis without deadlines, and the folder of real checkpoints and data."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and NumPy are imported: pytest-xdist fills the cores

import pytest
import torch
from hypothesis import HealthCheck, settings

from nmconvert.runtime import kernels
from nmconvert.runtime.cache import CACHE_VARIABLE
from nmconvert.runtime.locate import LIBRARY_VARIABLE

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
settings.register_profile("nmconvert", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("nmconvert"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "nmconvert")


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key that signs manifests is made for the tests; the user's own is left alone."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real checkpoints and data: ``NMCONVERT_DATA``, or ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("NMCONVERT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"no real data in {folder}: set NMCONVERT_DATA to the folder that holds checkpoints/")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Speeds that tests measure stay out of the user's cache."""
    os.environ["NMCONVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def sample_models() -> Path:
    """The folder ``sample_models`` of the repository."""
    return ROOT / "sample_models"


@pytest.fixture(scope="module", params=["native", "without"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the native library, where a compiler was, and without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without":
            patch.setenv(LIBRARY_VARIABLE, "off")
        elif not kernels().usable:
            pytest.skip(f"no native kernels: {kernels().reason}")
        yield request.param


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder, as in many containers: neither ``HOME`` nor an entry among the users."""
    for variable in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", CACHE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
