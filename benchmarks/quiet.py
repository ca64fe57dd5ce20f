"""Whether other virtual machines leave this one's cores alone.

Machines that are rented share their cores: a neighbour on the other half of a core makes loops that read the L1 cache with
every product two to four times as slow, for seconds, and dense ones less. Processor time does not show it. A :class:`Probe`
runs a small layer on the kernels: a turn of a benchmark is quiet where the layer took no longer than usual before and after
it.
"""

from __future__ import annotations

import itertools
import os
import time

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from nmconvert import runtime
from nmconvert.export.compress import compress
from nmconvert.masks import nm_mask
from nmconvert.pattern import Pattern

_SIZE, _TOKENS = 256, 256  # what one thread computes in about 0.1 ms; all of it stays in the L2 cache
_PATTERN = Pattern(2, 4)
_SLACK = 1.3  # times the fastest so far: the clock changes by a fifth, a neighbour makes it 1.4 to 3
_RUNS = 4


class Probe:
    """A small layer at 2:4 on one thread, on the core of the thread that calls, or on each core in turn.

    No second thread computes it: that of another session would go on spinning beside what is measured next.
    """

    def __init__(self, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = runtime.session(_layer().SerializeToString(), options, layers="sparse")
        self._feed = {"x": np.random.default_rng(0).standard_normal((1, _TOKENS, _SIZE), np.float32)}
        self._moves = threads == 1
        self._all = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._cores = itertools.cycle(self._all)
        self._best = min(self._seconds() for _ in range(200))

    def quiet(self) -> bool:
        """Whether the layer takes the time that it took when nothing disturbed it; if not, one thread goes to another core."""
        if self._moves or not self._all:
            found = self._undisturbed()
            if not found and self._all:
                os.sched_setaffinity(0, {next(self._cores)})
            return found
        found = True
        for core in self._all:
            os.sched_setaffinity(0, {core})
            found = self._undisturbed() and found
        self.leave()
        return found

    def leave(self) -> None:
        """Let the thread run on every core again."""
        if self._all:
            os.sched_setaffinity(0, self._all)

    def _undisturbed(self) -> bool:
        seconds = self._seconds()
        self._best = min(self._best, seconds)
        return seconds <= _SLACK * self._best

    def _seconds(self) -> float:
        def run() -> float:
            start = time.perf_counter()
            self._session.run(None, self._feed)
            return time.perf_counter() - start

        return min(run() for _ in range(_RUNS))


def _layer() -> onnx.ModelProto:
    weight = np.random.default_rng(1).standard_normal((_SIZE, _SIZE)).astype(np.float32)
    weight *= nm_mask(torch.from_numpy(weight).abs().T, _PATTERN).T.numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, _TOKENS, _SIZE])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, _TOKENS, _SIZE])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    compress(model, [(_PATTERN, "channel")])
    return model
