"""The library outside of Python: the C++ example, builds with sanitizers and without a compiler, libraries that do not fit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from runtime_models import layer, random_weight

from nmconvert import __version__, runtime

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: set CXX")


@needs_compiler
@pytest.mark.skipif(not runtime.kernels().usable, reason=f"no native kernels: {runtime.kernels().reason}")
def test_a_cpp_program_needs_one_call(tmp_path: Path) -> None:
    shared = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)
    if shared is None:
        pytest.skip("this onnxruntime has no shared library to link with")
    (tmp_path / "libonnxruntime.so.1").symlink_to(shared)  # the name that the linker notes
    (tmp_path / "libonnxruntime.so").symlink_to(shared)
    program = tmp_path / "run_model"
    headers = os.environ.get("ONNXRUNTIME_INCLUDE", str(ROOT / "tests" / "native"))
    build = [COMPILER, "-std=c++17", "-I", headers, str(ROOT / "examples" / "run_model.cpp"), "-o", str(program)]
    subprocess.run([*map(str, build), f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}"], check=True)
    weight = random_weight(np.random.default_rng(0), "matmul", (32, 16), "2:4")
    onnx.save(layer("SparseMatMul", weight, ["t", 32]), tmp_path / "model.onnx")
    command = [str(program), str(runtime.library()), str(tmp_path / "model.onnx"), "3", "32"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = [float(line) for line in run.stdout.split()]
    np.testing.assert_allclose(printed, weight.dense.sum(0)[:4], rtol=1e-4, atol=1e-6)
    refused = subprocess.run([str(program), "nowhere.so", *command[2:]], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "nowhere.so" in refused.stderr


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(not (CROSS and EMULATOR), reason="apt-get install g++-aarch64-linux-gnu qemu-user")
def test_neon_computes_what_plain_loops_do(tmp_path: Path) -> None:
    speak_to_onnxruntime = {"context", "nodes", "conv_node", "product_node", "node", "library"}
    folder = ROOT / "nmconvert" / "runtime" / "native"
    sources = [path for path in folder.glob("*.cpp") if path.stem not in speak_to_onnxruntime]
    build = [CROSS, "-std=gnu++17", "-O1", "-Wall", "-Wextra", "-Werror", "-static", f"-I{folder}"]
    program = [str(ROOT / "tests" / "native" / "kernels_check.cpp"), "-o", str(tmp_path / "check")]
    subprocess.run([*map(str, build), *program, *map(str, sources)], check=True)
    run = subprocess.run([str(EMULATOR), str(tmp_path / "check")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["portable", "neon"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the tests run on a library with AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-DNMCONVERT_SANITIZE=ON"], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True)
    names = ("libasan.so", "libubsan.so")
    preload = [subprocess.check_output([str(COMPILER), f"-print-file-name={name}"], text=True).strip() for name in names]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # Python and onnxruntime own what they own
        "NMCONVERT_KERNELS": str(next(folder.glob("libnmconvert.*"))),
    }


SHARDS = {
    "linear layers": ("test_runtime.py", "linear_layers"),
    "convolutions": ("test_runtime.py", "convolutions"),
    "mutated files": ("test_runtime.py", "mutated"),
    "the rest": ("test_runtime.py", "not linear_layers and not convolutions and not mutated"),
    "fused": ("test_export_fuse.py", ""),
}


@needs_compiler
@pytest.mark.skipif(not os.environ.get("NMCONVERT_SANITIZE"), reason="takes minutes: set NMCONVERT_SANITIZE=1")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shard", SHARDS)
def test_the_kernel_tests_pass_under_sanitizers(sanitized: dict[str, str], shard: str) -> None:
    name, chosen = SHARDS[shard]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=0", str(ROOT / "tests" / name), "-k", chosen]
    assert subprocess.run(command, env=sanitized, cwd=ROOT).returncode == 0


def compiled(source: str, folder: Path) -> Path:
    """A shared library of ``source``."""
    (folder / "source.cpp").write_text(source)
    library = folder / "libnmconvert.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(folder / "source.cpp"), "-o", str(library)], check=True)
    return library


@needs_compiler
@pytest.mark.parametrize(
    ("version", "isa", "says"),
    [("0.0.9", "avx2", "is of version 0.0.9, nmconvert of"), (__version__, "", "has no instruction set that they")],
)
def test_a_library_that_does_not_fit_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, isa: str, says: str
) -> None:
    """Of another version, or on a CPU that it was not written for: a warning, and the functions serve."""
    monkeypatch.delenv("NMCONVERT_ISA", raising=False)
    names = {"NmconvertVersion": version, "NmconvertIsa": isa}
    source = "".join(f'extern "C" const char* {name}() {{ return "{text}"; }}\n' for name, text in names.items())
    monkeypatch.setenv("NMCONVERT_KERNELS", str(compiled(source, tmp_path)))
    weight = random_weight(np.random.default_rng(1), "matmul", (32, 16), "2:4")
    with pytest.warns(RuntimeWarning, match=says):
        session = runtime.session(layer("SparseMatMul", weight, ["t", 32]).SerializeToString())
    x = np.ones((3, 32), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.dense, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not runtime.kernels().path, reason="no library that could refuse")
def test_the_library_registers_nothing_on_a_cpu_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    library = runtime.kernels().path
    monkeypatch.setenv("NMCONVERT_ISA", "vax")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    weight = random_weight(np.random.default_rng(2), "matmul", (32, 16), "2:4")
    session = onnxruntime.InferenceSession(layer("SparseMatMul", weight, ["t", 32]).SerializeToString(), options)
    x = np.ones((3, 32), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.dense, rtol=1e-5, atol=1e-6)


class FullOnnxruntime(ctypes.Structure):
    """What the library calls to register itself, as onnxruntime's C ABI has it, of one that takes ``room`` operators."""

    _fields_ = (("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)), ("version", ctypes.CFUNCTYPE(ctypes.c_void_p)))

    def __init__(self, room: float) -> None:
        self.room, self.made, self.released, self.taken = room, 0, 0, 0
        step = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
        release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        slots = {26: make(self._make), 27: step(self._add), 28: step(self._take), 101: release(self._release)}
        self.functions = [*slots.values()]  # not to be freed while they may be called
        self.table = (ctypes.c_void_p * 300)()
        for slot, function in slots.items():
            self.table[slot] = ctypes.cast(function, ctypes.c_void_p)
        self.name = ctypes.create_string_buffer(b"1.32.0")
        (_, get_api), (_, version) = self._fields_
        super().__init__(get_api(lambda asked: ctypes.addressof(self.table)), version(lambda: ctypes.addressof(self.name)))

    def _make(self, name: bytes, domain: Any) -> None:
        self.made += 1
        domain[0] = self.made

    def _add(self, domain: int, operator: int) -> int | None:
        self.room -= 1
        return 1 if self.room < 0 else None  # an OrtStatus is an error

    def _take(self, options: int, domain: int) -> None:
        self.taken += 1

    def _release(self, domain: int) -> None:
        self.released += 1


@pytest.mark.skipif(not runtime.kernels().usable, reason=f"no native kernels: {runtime.kernels().reason}")
def test_a_domain_that_onnxruntime_does_not_take_is_released(tmp_path: Path) -> None:
    """Each attempt makes one of its own; the first that is taken whole serves all later sessions."""
    of_its_own = tmp_path / "libnmconvert.so"  # with nothing registered yet
    shutil.copy(str(runtime.kernels().path), of_its_own)
    register = ctypes.CDLL(str(of_its_own)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.POINTER(FullOnnxruntime))
    program = FullOnnxruntime(room=3)
    for attempt in (1, 2):
        program.room = 3
        assert register(None, program) == 1
        assert (program.made, program.released, program.taken) == (attempt, attempt, 0)
    program.room = float("inf")
    for session in (1, 2):
        assert register(None, program) is None
        assert (program.made, program.released, program.taken) == (3, 2, session)


@pytest.mark.skipif(find_spec("scikit_build_core") is None, reason="building needs scikit-build-core: pip install it")
def test_without_a_compiler_the_package_is_built_without_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/bin/false", "CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/bin/false"}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    settings = ["--config-settings", f"build-dir={tmp_path / 'build'}"]
    subprocess.run([*build, *settings, str(ROOT)], env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nmconvert/runtime/locate.py" in names
    assert not [name for name in names if "libnmconvert" in name]


@pytest.mark.skipif(not runtime.kernels().usable, reason=f"no native kernels: {runtime.kernels().reason}")
@pytest.mark.skipif(
    not os.environ.get("NMCONVERT_OTHER_ORT"),
    reason="set NMCONVERT_OTHER_ORT to a folder (pip install --target) with another onnxruntime, for example 1.20.1",
)
@pytest.mark.parametrize("stored", [np.float32, np.float16, np.int8])
def test_another_onnxruntime_gives_the_same_answers(tmp_path: Path, stored: Any) -> None:
    rng = np.random.default_rng(3)
    weight = random_weight(rng, "conv", (16, 32, 3, 3), "2:4", dtype=stored)
    proto = layer("SparseConvRelu", weight, [1, 32, 9, 9], {"B": rng.standard_normal(16).astype(np.float32)})
    onnx.save(proto, tmp_path / "model.onnx")
    program = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
if sys.argv[2]: options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = numpy.random.default_rng(0).standard_normal((1, 32, 9, 9)).astype(numpy.float32)
numpy.save(sys.argv[3], session.run(None, {"x": x})[0])
print(onnxruntime.__version__)
"""
    outputs, versions = [], set()
    for other in (os.environ["NMCONVERT_OTHER_ORT"], ""):
        for library in (str(runtime.library()), ""):
            command = [sys.executable, "-c", program, str(tmp_path / "model.onnx"), library, str(tmp_path / "y.npy")]
            run = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": other}, cwd=tmp_path, capture_output=True, text=True, check=True
            )
            versions.add(run.stdout.strip())
            outputs.append(np.load(tmp_path / "y.npy"))
    assert len(versions) == 2
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=1e-4, atol=1e-5)
