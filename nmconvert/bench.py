"""How fast a compressed model is: dense onnxruntime against the native kernels, in interleaved rounds.

Both sessions run in turn, so that they meet the same neighbours on the machine; what is reported is the median of the rounds'
ratios, and their spread, which says whether the machine was too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from nmconvert.errors import UsageError
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.onnx_graph import attribute
from nmconvert.pattern import Pattern
from nmconvert.runtime import kernels, session
from nmconvert.runtime.choice import Met, Times, calls, met_layers, open_session, race, time_layer

NOISY = 0.2  # a spread of the rounds' ratios above this says nothing


@dataclass(frozen=True)
class ModelTimes:
    """The whole model: dense ÷ sparse for one number of threads and one batch size."""

    threads: int
    batch: int
    times: Times


@dataclass(frozen=True)
class LayerTimes:
    """One distinct layer: ``count`` calls of ``function`` on an input of ``shape`` with a dense weight of ``weight``."""

    function: str
    weight: tuple[int, ...]
    shape: tuple[int, ...]
    pattern: Pattern
    count: int
    times: Times

    @property
    def share(self) -> float:
        """The ratio as a share of what the pattern allows, m/n."""
        return self.times.ratio * self.pattern.density


@dataclass(frozen=True)
class BenchResult:
    """What was measured, with what."""

    model: Path
    against: Path
    isa: str
    onnxruntime: str
    models: tuple[ModelTimes, ...]
    layers: tuple[LayerTimes, ...]

    @property
    def noisy(self) -> bool:
        """Whether some measurement of the whole model says nothing."""
        return any(row.times.spread > NOISY for row in self.models)


def bench(
    model: Path,
    *,
    against: Path | None = None,
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    inputs: Sequence[InputSpec] = (),
    rounds: int = 15,
    seconds: float = 2.0,
    per_layer: bool = True,
) -> BenchResult:
    """Time ``model`` on the kernels against ``against`` in stock onnxruntime (default: the same file, whose functions fold).

    ``seconds`` is the time that each side gets for each number of threads and batch size. Layers are timed with the first of
    both.

    Raises:
        UsageError: the model has no compressed layer, or cannot take the batch size.
        KernelsUnavailableError: there are no kernels to measure.
    """
    from nmconvert.runtime import library

    path = library()
    proto = onnx.load(model)
    if not calls(proto):
        raise UsageError(f"{model}: has no compressed layer to measure; write one with nmconvert export --flavour compressed")
    rows = []
    for batch in batches:
        feed = example_feed(proto, inputs, batch=batch)
        for count in threads:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = count
            options.log_severity_level = 4
            options.add_session_config_entry("session.force_spinning_stop", "1")
            specs = [InputSpec(name, array.shape, array.dtype.name) for name, array in feed.items()]
            sparse = session(model, options, inputs=specs)
            dense = open_session(str(against or model), count)
            rows.append(ModelTimes(count, batch, race(dense, sparse, feed, seconds=seconds, rounds=rounds)))
    layers = _time_layers(proto, path, threads[0], _specs(proto, inputs, batches[0])) if per_layer else ()
    return BenchResult(model, against or model, kernels().isa, onnxruntime.__version__, tuple(rows), tuple(layers))


def _specs(model: onnx.ModelProto, inputs: Sequence[InputSpec], batch: int) -> list[InputSpec]:
    feed = example_feed(model, inputs, batch=batch)
    return [InputSpec(name, array.shape, array.dtype.name) for name, array in feed.items()]


def _time_layers(model: onnx.ModelProto, library: Path, threads: int, inputs: Sequence[InputSpec]) -> list[LayerTimes]:
    distinct: dict[str, list[Met]] = {}
    for met in met_layers(model, library, threads, inputs):
        distinct.setdefault(met.key, []).append(met)
    return [
        LayerTimes(
            met.node.op_type,
            tuple(attribute(met.node, "shape", [0])),
            met.shapes[0],
            Pattern(attribute(met.node, "n", 1), attribute(met.node, "m", 1)),
            len(same),
            time_layer(model, met, library, threads),
        )
        for same in distinct.values()
        for met in same[:1]
    ]
