"""The export stage: a checkpoint or an ONNX file → an ONNX file with compressed weights.

==============  =====================================================================================================
flavour         sparse weights are
==============  =====================================================================================================
``compressed``  packed; each layer calls a function of domain ``nmconvert``, which stock onnxruntime folds away
``dense``       zeros in place, for TensorRT and anything else
``inlined``     packed, the functions expanded, for runtimes that know no functions (OpenVINO)
==============  =====================================================================================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx.inliner
import onnx.version_converter
import torch
from onnx import ModelProto, TensorShapeProto

from nmconvert.checkpoint import Checkpoint, beside, check_apart, check_target, open_checkpoint
from nmconvert.checkpoint.onnx_file import OnnxCheckpoint, data_files, read_whole_model, save_model
from nmconvert.errors import ExportError, UsageError, check_choice
from nmconvert.export.check import Difference, check_export, compare, free_memory, memory_to_fold, run, stock_session
from nmconvert.export.compress import NO_PATTERN, Compressed, compress
from nmconvert.export.find import patterns_found, sparse_layers
from nmconvert.export.functions import FIRST_OPSET, IR_VERSION, OPSET
from nmconvert.export.fuse import fuse
from nmconvert.export.narrow import STORAGE, narrow, round_weights
from nmconvert.export.trace import Traced, trace, trace_program
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.manifest import Layer, Manifest
from nmconvert.onnx_graph import DOMAIN, graphs, opset
from nmconvert.pattern import Axis, Pattern

FLAVOURS = ("compressed", "dense", "inlined")
_WORTH_A_NOTE = 4 << 30  # bytes of memory to load a file
DYNAMIC_BATCH: Mapping[int, str] = {0: "batch"}


@dataclass(frozen=True)
class ExportResult:
    """The new file and what is in it; ``difference`` is that of its outputs in onnxruntime from the model's."""

    source: Path
    output: Path
    flavour: str
    nbytes: int
    compressed: Compressed
    difference: Difference
    notes: tuple[str, ...]
    folded: bool = True  # whether the graph that stock onnxruntime makes of it was looked at


@dataclass(frozen=True)
class _Source:
    """A model in ONNX form, with a run to hold the export against."""

    model: ModelProto
    feed: Mapping[str, npt.NDArray[Any]]
    outputs: Sequence[npt.NDArray[Any]]
    manifest: Manifest
    storage: torch.dtype | None  # in which a model that is computed in float32 was stored
    notes: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()  # weights that int8 and a scale for each row hold exactly


def export(
    source: Path,
    *,
    output: Path | None = None,
    flavour: str = "compressed",
    model: str | None = None,
    model_arguments: Mapping[str, str] | None = None,
    inputs: Sequence[InputSpec] = (),
    dynamic: Mapping[int, str] | None = None,
    dtype: torch.dtype | None = None,
    values: str | None = None,
    trust: bool = False,
) -> ExportResult:
    """Write ``source`` as ONNX, check it, and only then give it its name.

    ``model`` and ``inputs`` (needed for state dicts) are taken from the manifest where they are not given. ``dynamic`` names
    the dimensions of the inputs that stay open, by default the first; ``dtype`` converts the module before it is traced.
    ``values`` (float16, bfloat16, or int8 with a scale for each output channel) rounds the kept weights of float32 layers and
    stores them so; the model still computes in float32. Its outputs are then held against those of the rounded weights, and a
    note says how far they are from the model's.

    Raises:
        UsageError: a model or an input is missing, nothing in ``source`` is sparse, there is no such ``flavour`` or no such
            ``values``, these need another flavour, ``source`` is traced already and has its dimensions and types, or
            ``output`` is ``source``, a folder, in no folder, or called what it is not.
        ExportError: the file would not pass its checks; none is left.
    """
    check_choice("flavour", flavour, FLAVOURS)
    if values is not None:
        check_choice("values", values, STORAGE)
    if values == "int8" and flavour == "dense":
        raise UsageError(
            "--values int8 packs weights with a scale for each row: use --flavour compressed or inlined, or float16"
        )
    checkpoint = open_checkpoint(source, trust=trust)
    manifest = Manifest.of(checkpoint) or Manifest()
    traced_before = isinstance(checkpoint, OnnxCheckpoint) or checkpoint.format == "exported program"
    if traced_before and not (dynamic is None and dtype is None):
        raise UsageError(
            f"{source}: is traced already, so that dimensions and types stay as they are; "
            "leave out --dynamic, --static and --dtype"
        )
    output = output or default_output(source, flavour)
    check_target(output, made="an ONNX file")
    check_apart([(output, "--output")], [source])
    if isinstance(checkpoint, OnnxCheckpoint):
        loaded = _from_onnx(source, manifest, inputs)
    elif checkpoint.format == "exported program":
        traced = trace_program(torch.export.load(source))
        loaded = _Source(traced.model, traced.feed, traced.outputs, manifest, None, traced.notes)
    else:
        loaded = _from_checkpoint(
            checkpoint, manifest, model, model_arguments, inputs,
            dynamic=DYNAMIC_BATCH if dynamic is None else dynamic, dtype=dtype, trust=trust,
        )  # fmt: skip
    return _write(source, output, flavour, loaded, values)


def default_output(source: Path, flavour: str) -> Path:
    """``a.nm2-4.pt`` → ``a.nm2-4.onnx``; the flavour is in the name where it is not the default or ``source`` ends so, too."""
    plain = flavour == "compressed" and source.suffix != ".onnx"
    return beside(source, "" if plain else f".{flavour}", ".onnx")


def _from_onnx(source: Path, manifest: Manifest, inputs: Sequence[InputSpec]) -> _Source:
    model = read_whole_model(source)
    if any(node.domain == DOMAIN for graph, _ in graphs(model) for node in graph.node):
        raise UsageError(f"{source}: is compressed already; export the checkpoint or ONNX file that it was made from")
    feed = example_feed(model, inputs or manifest.said_inputs())
    outputs = run(stock_session(source), feed)
    for value, output in zip(model.graph.output, outputs, strict=True):
        kind = value.type.tensor_type  # the checker wants a shape, onnxruntime does not
        if kind.elem_type and not kind.HasField("shape"):
            kind.shape.dim.extend(TensorShapeProto.Dimension() for _ in output.shape)
    try:
        return _Source(raised(model), feed, outputs, manifest.with_settings(input=[str(spec) for spec in inputs] or None), None)
    except ExportError as error:
        raise ExportError(f"{source}: {error}") from error


def raised(model: ModelProto) -> ModelProto:
    """``model`` in an opset that functions can be called in.

    Raises:
        ExportError: the converter cannot raise it.
    """
    if opset(model) >= FIRST_OPSET:
        return model
    model.ir_version = max(model.ir_version, IR_VERSION)  # below 4 the converter takes no initialiser that is no input
    try:
        converted: ModelProto = onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises RuntimeError and others for operators that it does not know
        raise ExportError(f"opset {opset(model)} cannot be raised to {OPSET}: {error}") from error
    return converted


def _from_checkpoint(
    checkpoint: Checkpoint,
    manifest: Manifest,
    model: str | None,
    model_arguments: Mapping[str, str] | None,
    inputs: Sequence[InputSpec],
    *,
    dynamic: Mapping[int, str],
    dtype: torch.dtype | None,
    trust: bool,
) -> _Source:
    from nmconvert.model import cast, load, matched_names

    path = checkpoint.path
    spec, arguments = manifest.said_model(path, model, model_arguments)
    if spec is None:
        what = "the module that is pickled in it is not run" if checkpoint.format == "pickled module" else "holds weights only"
        raise UsageError(f"{path}: {what}; name the module with --model package.module:callable")
    inputs = inputs or manifest.said_inputs()
    if not inputs:
        example = "input_ids=1,16:int64" if path.is_dir() else "1,3,224,224"
        raise UsageError(f"{path}: an example input is needed; give its shape, for example --input {example}")
    rank = max(len(said.shape) for said in inputs)
    if beyond := [axis for axis in dynamic if axis >= rank]:
        raise UsageError(f"no input has a dimension {beyond[0]} to leave open with --dynamic: the last one is {rank - 1}")
    module = load(spec, path, arguments, trust=trust)
    if dtype is not None:
        module = cast(module, dtype)
    storage = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    traced: Traced = trace(module, inputs, dynamic)
    settings = {"model": spec, "model_arguments": arguments, "input": [str(spec) for spec in inputs]}
    own = matched_names([*manifest.dense, *(layer.name for layer in manifest.layers)], module)
    manifest = replace(
        manifest,
        dense={own[name]: reason for name, reason in manifest.dense.items()},
        layers=tuple(replace(layer, info=replace(layer.info, name=own[layer.name])) for layer in manifest.layers),
    )
    return _Source(
        traced.model,
        traced.feed,
        traced.outputs,
        manifest.with_settings(**settings),
        storage if storage == torch.bfloat16 else None,
        traced.notes,
    )


def _rounded(loaded: _Source, patterns: Collection[tuple[Pattern, Axis]], values: str) -> _Source:
    """The same source with its sparse weights rounded, and with the outputs that follow from that."""
    layers = [layer for layer in sparse_layers(loaded.model, patterns) if layer.info.dtype == "float32"]
    errors = round_weights(loaded.model, layers, values)
    with tempfile.TemporaryDirectory(prefix="nmconvert-") as folder:
        file = Path(folder) / "rounded.onnx"
        save_model(loaded.model, file)
        outputs, model = run(stock_session(file), loaded.feed), read_whole_model(file)
    worst = max((compare(new, old).relative for new, old in zip(outputs, loaded.outputs, strict=True)), default=0.0)
    rounded = f"{len(errors)} weights rounded to {values}, by at most {max(errors.values(), default=0.0):.1e} of their norm"
    note = f"{rounded}; outputs within {worst:.1e} of the model's"
    quantized = frozenset(errors) if values == "int8" else frozenset()
    return replace(loaded, model=model, outputs=outputs, notes=(*loaded.notes, note), quantized=quantized)


def _write(source: Path, output: Path, flavour: str, loaded: _Source, values: str | None) -> ExportResult:
    model = loaded.model
    patterns = {(layer.pattern, layer.axis) for layer in loaded.manifest.layers} or patterns_found(model)
    if not patterns and flavour != "dense":
        raise UsageError(f"{source}: nothing in it is N:M sparse; run nmconvert prune first, or export with --flavour dense")
    if values is not None:
        loaded = _rounded(loaded, patterns, values)
        model = loaded.model
    elif loaded.storage is torch.bfloat16:
        narrow(model)
    compressed = Compressed()
    if flavour != "dense":
        compressed = compress(model, list(patterns), quantized=loaded.quantized, dense=loaded.manifest.dense)
        left = dict(_not_packed(loaded.manifest.layers, compressed))
        if left and len(left) == len(loaded.manifest.layers):
            name, why = next(iter(left.items()))
            raise UsageError(f"{source}: none of its pruned weights can be packed: '{name}' was {why}")
        compressed.dense.update(left)
    if flavour == "compressed":
        fuse(model)
    if flavour == "inlined":
        model = without_empty_ends(onnx.inliner.inline_local_functions(model))
    manifest = replace(
        loaded.manifest.after("export", flavour=flavour, **({"values": values} if values else {})),
        layers=tuple(compressed.layers) if flavour != "dense" else tuple(sparse_layers(model, patterns)),
        dense=compressed.dense,
    )
    differences: list[Difference] = []
    layers = manifest.layers if flavour == "compressed" else ()
    needed, free = memory_to_fold(model, manifest.layers), free_memory()
    fold = needed <= free

    def check(path: Path) -> None:
        try:
            differences.append(check_export(path, loaded.feed, loaded.outputs, layers, fold=fold))
        except ExportError as error:  # the file does not have its name yet
            raise ExportError(str(error).replace(str(path), str(output)).replace(path.name, output.name)) from error

    save_model(model, output, manifest=manifest.to_json, check=check)
    nbytes = output.stat().st_size + sum(path.stat().st_size for path in data_files(output))
    notes = (*loaded.notes, *_memory_notes(needed, free))
    return ExportResult(source, output, flavour, nbytes, compressed, differences[0], notes, fold)


def without_empty_ends(model: ModelProto) -> ModelProto:
    """``model``, whose nodes do not list the inputs that they leave out at the end: OpenVINO and quantisers trip over them."""
    for graph, _ in graphs(model):
        for node in graph.node:
            while node.input and not node.input[-1]:
                del node.input[-1]
    return model


def _not_packed(pruned: Iterable[Layer], compressed: Compressed) -> Iterator[tuple[str, str]]:
    """Why layers that were pruned are not packed, as far as the graph itself does not say it."""
    packed = {layer.name for layer in compressed.layers}
    for layer in pruned:
        if layer.name not in packed | compressed.dense.keys():
            yield layer.name, "pruned, but the graph has no weight of that name: computed with before it is used, or not used"
        elif compressed.dense.get(layer.name) == NO_PATTERN and layer.assumed:
            yield layer.name, f"pruned as {layer.info.kind}, by its name and shape, which it is not: prune again with --model"


def _memory_notes(needed: int, free: float) -> Iterator[str]:
    if needed > _WORTH_A_NOTE:
        yield (
            f"a stock onnxruntime needs about {needed / 1e9:.0f} GB of memory for a moment when it loads this file; "
            "a session on nmconvert's kernels does not, nor does the dense flavour"
        )
    if needed > free:
        yield f"the folded graph was not looked at: {free / 1e9:.0f} GB were free"
