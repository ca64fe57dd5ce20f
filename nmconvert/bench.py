"""How fast a compressed model is: dense onnxruntime against the native kernels, in interleaved rounds.

Both sessions run in turn, so that they meet the same neighbours on the machine; what is reported is the median of the rounds'
ratios, and their spread, which says whether the machine was too noisy to tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from nmconvert import runtime
from nmconvert.checkpoint import check_apart, check_target, is_onnx
from nmconvert.checkpoint.onnx_file import read_whole_model, save_model
from nmconvert.errors import CheckpointError, NmconvertError, UsageError, first_line
from nmconvert.export import export
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.manifest import Manifest
from nmconvert.onnx_graph import DOMAIN, attribute, graphs
from nmconvert.pattern import Pattern
from nmconvert.runtime import kernels, session
from nmconvert.runtime.choice import (
    Feed,
    Met,
    Times,
    calls,
    dense_bytes,
    met_layers,
    open_session,
    race,
    time_layer,
    with_dense,
)

_LARGEST = 1 << 30  # bytes of dense weights that are unpacked here; beyond, onnxruntime folds them as it reads the file


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
    tuned: Path | None = None
    sparse_layers: int = 0  # that are left in ``tuned``

    @property
    def noisy(self) -> bool:
        """Whether some measurement says nothing."""
        return any(times.noisy for times in [*(row.times for row in self.models), *(layer.times for layer in self.layers)])

    @property
    def slowest(self) -> float:
        """The smallest of the whole model's ratios."""
        return min(row.times.ratio for row in self.models)


def bench(
    model: Path,
    *,
    against: Path | None = None,
    module: str | None = None,
    module_arguments: Mapping[str, str] | None = None,
    trust: bool = False,
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (),
    inputs: Sequence[InputSpec] = (),
    rounds: int = 15,
    seconds: float = 2.0,
    per_layer: bool = True,
    tuned: Path | None = None,
) -> BenchResult:
    """Time ``model`` on the kernels against ``against`` in stock onnxruntime (default: the same file with dense weights).

    ``against`` is an ONNX file, or a checkpoint, which is exported for that; ``module``, ``module_arguments`` and ``trust``
    are those of :func:`nmconvert.export.export`. ``batches`` are sizes of the batch (default: the model's own, 1 where that
    is open). ``seconds`` is the time that each side gets for each number of threads and batch size. Layers are timed with
    the first of both. ``tuned`` is where the model goes as it runs fastest here, with the first of both
    (:func:`nmconvert.runtime.tuned`).

    Raises:
        UsageError: the model is no ONNX file, has no compressed layer, or cannot take the batch size or the inputs; ``against``
            takes other inputs; ``tuned`` is a file that is read, or in no folder.
        CheckpointError: a file is damaged.
        KernelsUnavailableError: there are no kernels to measure.
    """
    path = runtime.library()
    if not is_onnx(model):
        raise UsageError(f"{model}: is not an ONNX file, the only ones that are measured; make one with nmconvert export")
    proto = read_whole_model(model)
    if not calls(proto):
        others = sorted({node.op_type for graph, _ in graphs(proto) for node in graph.node if node.domain == DOMAIN})
        if others:
            raise UsageError(f"{model}: its compressed layers ({', '.join(others)}) have no kernels: it is as fast as dense")
        raise UsageError(f"{model}: has no compressed layer to measure; write one with nmconvert export --flavour compressed")
    if tuned is not None:
        check_apart([(tuned, "--tuned")], [model] if against is None else [model, against])
        check_target(tuned, "--tuned", made="an ONNX file")
    manifest = Manifest.in_metadata(proto, str(model))
    if manifest and not batches:
        inputs = inputs or manifest.said_inputs()
    sizes = batches or (None,)
    feeds = [_feed(model, proto, inputs, size) for size in sizes]
    rows = []
    with _dense(model, proto, against, module, module_arguments, trust, inputs) as other:
        for size, feed in zip(sizes, feeds, strict=True):
            batch = size or next(iter(_batches(feed)), 1)
            rows += [ModelTimes(count, batch, _race(model, other, feed, count, seconds, rounds)) for count in threads]
    specs = _specs(feeds[0])
    layers = _time_layers(proto, path, threads[0], specs) if per_layer else ()
    left = 0
    if tuned is not None:
        fastest = runtime.tuned(model, threads=threads[0], inputs=specs)
        left = len(calls(fastest))
        save_model(fastest, tuned)
    version = onnxruntime.__version__
    return BenchResult(model, against or model, kernels().isa, version, tuple(rows), tuple(layers), tuned, left)


@contextmanager
def _dense(
    model: Path,
    proto: onnx.ModelProto,
    against: Path | None,
    module: str | None,
    module_arguments: Mapping[str, str] | None,
    trust: bool,
    inputs: Sequence[InputSpec],
) -> Iterator[str | bytes]:
    """The dense model to compare with, as a path or as a file's bytes."""
    if against is None:
        yield with_dense(proto, None) if dense_bytes(proto) < _LARGEST else str(model)
    elif is_onnx(against):
        yield str(against)
    else:
        with tempfile.TemporaryDirectory(prefix="nmconvert-") as folder:
            output = Path(folder) / "dense.onnx"
            specs = inputs or _specs(example_feed(proto))
            export(
                against,
                output=output,
                flavour="dense",
                model=module,
                model_arguments=module_arguments,
                inputs=specs,
                trust=trust,
            )
            yield str(output)


def _race(model: Path, other: str | bytes, feed: Feed, threads: int, seconds: float, rounds: int) -> Times:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        dense = open_session(other, threads)
    except Exception as error:  # onnxruntime's classes share no base but this one
        name = other if isinstance(other, str) else model
        raise CheckpointError(f"{name}: onnxruntime cannot load it: {first_line(error)}") from error
    if (taken := [value.name for value in dense.get_inputs()]) != list(feed):
        raise UsageError(f"the dense model takes {', '.join(taken)}, {model.name} {', '.join(feed)}: they are not comparable")
    try:
        sparse = session(model, options, inputs=_specs(feed))
        return race(dense, sparse, feed, seconds=seconds, rounds=rounds)
    except NmconvertError:
        raise
    except Exception as error:  # onnxruntime's classes share no base but this one
        given = " ".join(f"--input {spec}" for spec in _specs(feed))
        raise UsageError(f"{model}: cannot be run with {given}: {first_line(error)}") from error


def _feed(path: Path, model: onnx.ModelProto, inputs: Sequence[InputSpec], batch: int | None) -> Feed:
    """Example inputs, of which one at least has ``batch`` rows, if that is given."""
    feed = example_feed(model, inputs, batch=batch or 1)
    if batch is not None and batch not in (there := _batches(feed)):
        raise UsageError(
            f"{path}: takes a batch of {there[0] if there else 'no size'}, not of {batch}: leave out --batch, or let the batch "
            "be open (no --input here, no --static in nmconvert export)"
        )
    return feed


def _batches(feed: Feed) -> list[int]:
    return [array.shape[0] for array in feed.values() if array.ndim]


def _specs(feed: Feed) -> list[InputSpec]:
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
