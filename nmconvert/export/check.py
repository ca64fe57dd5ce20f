"""What every export must pass before it gets its name: checker, onnxruntime, outputs, folded graph, weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import ModelProto

from nmconvert.arrays import digest
from nmconvert.checkpoint.onnx_file import read_model, read_whole_model
from nmconvert.errors import ExportError, NmconvertError, first_line
from nmconvert.export.calls import packed_layers, values_name
from nmconvert.manifest import Layer
from nmconvert.onnx_graph import DOMAIN, graphs

Arrays = Mapping[str, npt.NDArray[Any]]
_TOLERANCE = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-9}  # of the largest output; sums run in another order
_ROUNDED = {"float16": 5e-3, "bfloat16": 4e-2, "int8": 1e-1}  # where the weights alone were rounded to these
_FOLDING = 15  # times the dense bytes: what each operator of a body gives is kept until all bodies are folded
_OURS_ALONE = ("CumSum", "ScatterElements")  # operators that only an unfolded body would leave behind


@dataclass(frozen=True)
class Difference:
    """How far an output is from what it should be: the largest absolute difference, and the largest expected value."""

    absolute: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest expected value."""
        return self.absolute / self.scale if self.scale else self.absolute

    @property
    def accepted(self) -> bool:
        """Whether it is within the tolerance of its type."""
        return self.relative <= self.tolerance


def stock_session(path: Path, optimized: Path | None = None, *, fold: bool = True) -> onnxruntime.InferenceSession:
    """An onnxruntime session with nothing of ours registered; ``optimized`` is where the graph that it runs is written.

    Without ``fold``, packed weights are unpacked one after the other as it runs: slow, but in little memory.

    Raises:
        ExportError: onnxruntime cannot load the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not fold:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", optimized.name + ".data")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        hint = "; what is float64 may load after --dtype float32" if "NOT_IMPLEMENTED" in str(error) else ""
        raise ExportError(f"{path.name}: onnxruntime cannot load it: {first_line(error)}{hint}") from error


def memory_to_fold(model: ModelProto, layers: Iterable[Layer]) -> int:
    """Bytes that a stock onnxruntime needs for a moment to load ``model``, in which some of ``layers`` are packed."""
    names = {tensor.name for tensor in model.graph.initializer}
    return _FOLDING * sum(layer.info.nbytes for layer in layers if values_name(layer.name) in names)


def free_memory() -> float:
    """Bytes that can be had without swapping; without limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def run(session: onnxruntime.InferenceSession, feed: Arrays) -> list[npt.NDArray[Any]]:
    """The outputs of a session.

    Raises:
        ExportError: it fails, as a graph does whose folding failed at load.
    """
    try:
        return [_array(output) for output in session.run(None, dict(feed))]
    except Exception as error:  # as above
        given = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise ExportError(f"onnxruntime fails on {given} (--input gives other shapes): {first_line(error)}") from error


def _array(output: Any) -> npt.NDArray[Any]:
    """An output as an array: of maps, such as a classifier's chances by label, their values in the order of their keys."""
    if isinstance(output, list) and output and isinstance(output[0], Mapping):
        output = [[row[key] for key in sorted(row, key=str)] for row in output]
    return np.asarray(output)


def compare(found: npt.NDArray[Any], expected: npt.NDArray[Any], stored: str | None = None) -> Difference:
    """The distance between two arrays of one output; ``stored`` is the type that the weights of one of them were rounded to.

    Raises:
        ExportError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise ExportError(f"an output has shape {list(found.shape)}, expected {list(expected.shape)}")
    tolerance = max([_ROUNDED.get(stored or "", 0.0), *(_TOLERANCE.get(array.dtype.name, 0.0) for array in (found, expected))])
    if expected.dtype.kind not in "biuf":  # texts
        return Difference(0.0 if np.array_equal(found, expected) else float("inf"), 1.0, tolerance)
    if not expected.size:
        return Difference(0.0, 0.0, tolerance)
    wide = [array.astype(np.float64) for array in (found, expected)]
    finite = np.isfinite(wide[1])
    if not np.array_equal(wide[0][~finite], wide[1][~finite], equal_nan=True) or not np.isfinite(wide[0][finite]).all():
        return Difference(float("inf"), 1.0, tolerance)
    if not finite.any():
        return Difference(0.0, 0.0, tolerance)
    return Difference(float(np.abs(wide[0] - wide[1])[finite].max()), float(np.abs(wide[1][finite]).max()), tolerance)


def check_export(
    path: Path, feed: Arrays, expected: Sequence[npt.NDArray[Any]], layers: Sequence[Layer], *, fold: bool = True
) -> Difference:
    """Hold the file at ``path`` against what it was made from; returns the largest difference of its outputs.

    Without ``fold``, for which there may be no memory (:func:`memory_to_fold`), the folded graph is not looked at.

    Raises:
        ExportError: it fails the checker, does not load or run, is not folded, or computes something else.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference raise classes of their own
        raise ExportError(f"{path.name}: the ONNX checker rejects it: {first_line(error)}") from error
    check_weights(path, layers)
    session = _folded_session(path) if fold else stock_session(path, fold=False)
    outputs = run(session, feed)
    if len(outputs) != len(expected):
        raise ExportError(f"{path.name}: it has {len(outputs)} outputs, the model {len(expected)}")
    differences = [compare(found, wanted) for found, wanted in zip(outputs, expected, strict=True)]
    worst = max(differences, key=lambda difference: difference.relative, default=Difference(0.0, 0.0, 0.0))
    if not worst.accepted:
        raise ExportError(
            f"{path.name}: its output differs from the model's by {worst.absolute:.3g} (largest value {worst.scale:.3g})"
        )
    return worst


def _folded_session(path: Path) -> onnxruntime.InferenceSession:
    """A session whose optimised graph was looked at."""
    with tempfile.TemporaryDirectory(prefix="nmconvert-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = stock_session(path, optimized)
        check_folded(path, read_model(path), read_model(optimized))
    return session


def check_weights(path: Path, layers: Sequence[Layer]) -> None:
    """Unpack every packed weight of the file and compare its hash.

    Raises:
        ExportError: a weight is not what was packed.
    """
    expected = {layer.name: layer.digest for layer in layers}
    try:
        for packed in packed_layers(read_whole_model(path), path.name):
            if expected[packed.name] != digest(packed.view.from_matrix(packed.matrix())):
                raise ExportError(f"{path.name}: the packed weight '{packed.name}' does not unpack to what was packed")
    except KeyError as error:
        raise ExportError(f"{path.name}: packed weight {error} is in no manifest") from error
    except ExportError:
        raise
    except NmconvertError as error:
        raise ExportError(f"{path.name}: {error}") from error


def check_folded(path: Path, model: ModelProto, optimized: ModelProto) -> None:
    """Hold the graph that onnxruntime runs against the file: nothing of the function bodies may be left in it.

    Raises:
        ExportError: a body was not folded, and would run at every inference.
    """
    own = {node.op_type for graph, _ in graphs(model) for node in graph.node if node.domain != DOMAIN}
    inlined = not any(node.domain == DOMAIN for graph, _ in graphs(model) for node in graph.node)
    for graph, _ in graphs(optimized):
        for node in graph.node:
            if node.domain == DOMAIN or (node.op_type in _OURS_ALONE and (inlined or node.op_type not in own)):
                raise ExportError(f"{path.name}: onnxruntime did not fold {node.op_type} '{node.name}'; report this model")
