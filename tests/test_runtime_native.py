"""The library outside of Python: the C++ example, built against the wheel's own shared library, and a sanitised build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from runtime_models import layer, random_weight

from nmconvert import runtime

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
    onnx.save(layer("MatMul", weight, ["t", 32]), tmp_path / "model.onnx")
    command = [str(program), str(runtime.library()), str(tmp_path / "model.onnx"), "3", "32"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = [float(line) for line in run.stdout.split()]
    np.testing.assert_allclose(printed, weight.dense.sum(0)[:4], rtol=1e-4, atol=1e-6)
    refused = subprocess.run([str(program), "nowhere.so", *command[2:]], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "nowhere.so" in refused.stderr


@needs_compiler
@pytest.mark.skipif(not os.environ.get("NMCONVERT_SANITIZE"), reason="takes minutes: set NMCONVERT_SANITIZE=1")
@pytest.mark.timeout(1800)
def test_the_kernel_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-DNMCONVERT_SANITIZE=ON"], check=True)
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True)
    names = ("libasan.so", "libubsan.so")
    preload = [subprocess.check_output([str(COMPILER), f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # Python and onnxruntime own what they own
        "NMCONVERT_KERNELS": str(next(tmp_path.glob("libnmconvert.*"))),
    }
    tests = [str(ROOT / "tests" / name) for name in ("test_runtime.py", "test_export_fuse.py")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--timeout=0", *tests], env=environment, cwd=ROOT, check=True)
