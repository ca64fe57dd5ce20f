"""An onnxruntime session in which the calls of our functions run on the native kernels, where that is faster."""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from nmconvert.errors import check_choice, one_line
from nmconvert.runtime.cache import Cache
from nmconvert.runtime.locate import Kernels, kernels, library

if TYPE_CHECKING:
    from onnx import ModelProto

    from nmconvert.inputs import InputSpec

CPU = "CPUExecutionProvider"
MEASURE_VARIABLE = "NMCONVERT_MEASURE"  # "off": no measurement, all layers on the kernels
_LARGEST = 3 << 29  # bytes: a model that is larger, packed and dense together, is not measured; all of it runs on the kernels
_AUTOMATIC, _ALL = "auto", "all"
LAYERS = (_AUTOMATIC, "sparse")

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]


def session(
    model: str | os.PathLike[str] | bytes,
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Providers | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
    *,
    layers: str = _AUTOMATIC,
    inputs: Sequence[InputSpec] = (),
) -> onnxruntime.InferenceSession:
    """``onnxruntime.InferenceSession`` of ``model`` (a path, or the file's bytes) with the kernels registered.

    With ``layers="auto"`` each distinct layer is timed once, sparse against dense, at the shapes that ``inputs`` lead to (by
    default those that ``export`` was told, else of `nmconvert.inputs.example_feed`), and so is the whole: with the
    layers that won, with all on the kernels, and dense. The winners are kept in the user's cache, and the next session of the
    model is made at once. ``"sparse"`` measures nothing and runs every layer on the kernels, as registering the library alone
    does; so does the environment variable NMCONVERT_MEASURE=off.

    Where the kernels cannot be used a warning says why, and the session runs on the functions that the file carries:
    the same outputs, at dense speed. ``sess_options`` are changed: the library is registered with them.

    Raises:
        UsageError: ``layers`` is neither ``"auto"`` nor ``"sparse"``.
    """
    check_choice("layers", layers, LAYERS)
    options = sess_options or onnxruntime.SessionOptions()
    source = model if isinstance(model, bytes) else os.fspath(model)
    providers = providers or [CPU]
    found = kernels()
    if not found.usable or found.path is None:
        warnings.warn(f"no native kernels, dense speed: {found.reason}; {found.remedy}", RuntimeWarning, stacklevel=2)
        return onnxruntime.InferenceSession(source, options, providers, provider_options)
    if layers == _AUTOMATIC and os.environ.get(MEASURE_VARIABLE) != "off":
        source, sparse = _chosen(source, options, found, inputs)
        if not sparse:
            return onnxruntime.InferenceSession(source, options, providers, provider_options)
    options.register_custom_ops_library(str(found.path))
    return onnxruntime.InferenceSession(source, options, providers, provider_options)


def tuned(model: str | os.PathLike[str], *, threads: int = 0, inputs: Sequence[InputSpec] = ()) -> ModelProto:
    """``model`` as :func:`session` would run it here: the weights of layers that are faster dense are unpacked.

    For programs in any language that register the library themselves, and so measure nothing. The choice is one for this CPU
    and this number of ``threads`` (0: all). A weight that is unpacked gets its own name back, and the manifest stays.

    Raises:
        KernelsUnavailableError: there are no kernels to measure.
    """
    from nmconvert.checkpoint.onnx_file import read_whole_model

    library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    chosen, _ = _chosen(os.fspath(model), options, kernels(), inputs)
    proto = read_whole_model(Path(model))
    if isinstance(chosen, bytes):
        proto.ParseFromString(chosen)
    return proto


def _chosen(
    source: str | bytes, options: onnxruntime.SessionOptions, found: Kernels, inputs: Sequence[InputSpec]
) -> tuple[str | bytes, bool]:
    """The model to load, and whether the kernels are to be registered for it.

    What reads the graph is imported only where there is something to measure or to change: it brings torch along.
    """
    threads = options.intra_op_num_threads
    assert found.path is not None
    build = hashlib.sha256(found.path.read_bytes()).hexdigest()[:16]  # not its version: it may have been built anew
    situation = {"isa": found.isa, "kernels": build, "onnxruntime": onnxruntime.__version__, "threads": threads}
    cache = Cache(situation | {"cores": os.cpu_count()})
    fingerprint = _fingerprint(source, inputs)
    dense = cache.get(fingerprint)  # the outputs of the calls that are left dense, or "all"
    if dense == [] or _size(source) > _LARGEST:
        return source, True
    import onnx
    from google.protobuf.message import DecodeError

    from nmconvert.runtime import choice

    try:
        model = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    except DecodeError:
        return source, True  # onnxruntime will say so
    if _size(source) + choice.dense_bytes(model) > _LARGEST:
        return source, True
    if dense is None:
        dense, steady = _measured(model, found, cache, threads, inputs)
        if steady:
            cache.put(fingerprint, dense)
        cache.save()
    return (source, True) if dense == [] else (choice.with_dense(model, None if dense == _ALL else dense), dense != _ALL)


def _size(source: str | bytes) -> int:
    """Bytes of a model and its external data."""
    if isinstance(source, bytes):
        return len(source)
    path = Path(source)
    name = glob.escape(path.name)
    return sum(f.stat().st_size for f in [path, *path.parent.glob(f"{name}.data"), *path.parent.glob(f"{name}.*.data")])


def _fingerprint(source: str | bytes, inputs: Sequence[InputSpec]) -> str:
    """What tells one model from another without reading it: the place, size and time of a file, a digest of bytes."""
    shapes = " ".join(map(str, inputs))
    if isinstance(source, bytes):
        return f"model {hashlib.sha256(source).hexdigest()} {shapes}"
    path = Path(source).resolve()
    stat = path.stat()
    return f"model {path} {stat.st_size} {stat.st_mtime_ns} {shapes}"


def _measured(
    model: ModelProto, found: Kernels, cache: Cache, threads: int, inputs: Sequence[InputSpec]
) -> tuple[list[str] | str, bool]:
    """:func:`_measure` on ``inputs``, or those that the file tells of; where the model cannot be run on them, on none."""
    from nmconvert.manifest import Manifest

    try:
        manifest = None if inputs else Manifest.in_metadata(model, "the model")
        return _measure(model, found, cache, threads, manifest.said_inputs() if manifest else inputs)
    except Exception as error:  # onnxruntime's classes share no base but this one, and the model's own operators raise anything
        said = one_line(error, 150)
        warnings.warn(
            f"no layer was measured, all run on the kernels: the model cannot be run on example inputs ({said}); "
            'give inputs=[InputSpec.parse("NAME=SHAPE:DTYPE"), …], or layers="sparse" to do without',
            RuntimeWarning,
            stacklevel=4,
        )
        return [], False


def _measure(
    model: ModelProto, found: Kernels, cache: Cache, threads: int, inputs: Sequence[InputSpec]
) -> tuple[list[str] | str, bool]:
    """The outputs of the calls that are better left dense, or "all"; and whether the machine was quiet enough to remember."""
    from nmconvert.inputs import example_feed
    from nmconvert.runtime import choice

    assert found.path is not None
    timed = choice.time_layers(model, found.path, cache, threads, inputs)
    slow = [layer.node.output[0] for layer, ratio in timed if ratio < choice.MARGIN]
    steady = all(cache.get(layer.key) is not None for layer, _ in timed)
    count = len(choice.calls(model))
    if count == 0:
        return [], steady
    # Single layers do not show what dense gains from its own layouts and fusions, nor what a change between the two costs.
    # Where all of them lose the whole is raced nevertheless: what is remembered of them may come from a busy hour.
    stock = choice.open_session(choice.with_dense(model, None), threads)
    feed, wholes = example_feed(model, inputs), []
    for left in [slow, []] if 0 < len(slow) < count else [[]]:
        chosen = choice.open_session(choice.with_dense(model, left), threads, found.path)
        wholes.append((left, choice.race(stock, chosen, feed, seconds=0.3)))
    left, whole = max(wholes, key=lambda raced: raced[1].best)
    return (left if whole.best >= 1 else _ALL), steady and not whole.noisy
