"""A torch module or exported program → an ONNX model, with BatchNorm folded and a dynamic batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import nn

from nmconvert.errors import ExportError, MissingExtraError, UsageError, first_line
from nmconvert.export.check import compare
from nmconvert.export.functions import IR_VERSION, OPSET
from nmconvert.export.names import restore_names
from nmconvert.hugging_face import without_caches
from nmconvert.inputs import InputSpec, example_array
from nmconvert.model import forward_inputs

_UNBACKED = (
    ". How many results it gives depends on the values: export a module that returns as many each time, such as the scores and "
    "boxes of all points, and choose among them outside"
)


@dataclass(frozen=True)
class Traced:
    """The ONNX model; arguments with which the module was run, and what it gave, by output position."""

    model: ModelProto
    feed: Mapping[str, npt.NDArray[Any]]
    outputs: Sequence[npt.NDArray[Any]]
    notes: tuple[str, ...] = ()


def trace(module: nn.Module, specs: Sequence[InputSpec], dynamic: Mapping[int, str]) -> Traced:
    """Export ``module`` in evaluation mode; ``dynamic`` names dimensions of every input that stay open.

    bfloat16 modules are traced in float32, which holds their values exactly: no onnxruntime computes bfloat16 on a CPU.

    Raises:
        ExportError: torch cannot export it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError("a TorchScript module cannot be exported: name the Python module that it was made from with --model")
    module, dtype = _computing(module)
    arguments = _arguments(module, specs, dtype, dynamic)
    outputs = _outputs(module, arguments)
    _need_repeatable(module, arguments, outputs)
    notes: tuple[str, ...] = ()
    try:
        model = _export(module, arguments, dynamic)
    except ExportError as error:
        if not dynamic or str(error).endswith(_UNBACKED):  # what depends on values depends on them in any shape
            raise
        arguments = _arguments(module, specs, dtype, {})
        outputs = _outputs(module, arguments)
        model = _export(module, arguments, {})
        notes = ("the shape of the inputs is fixed: torch could not export it with a dynamic one",)
    restore_names(model, module.state_dict())
    feed = dict(zip((value.name for value in model.graph.input), (a.numpy() for a in arguments.values()), strict=True))
    return Traced(model, feed, outputs, notes)


def trace_program(program: torch.export.ExportedProgram) -> Traced:
    """Export a ``torch.export.ExportedProgram`` with the example inputs that it carries.

    Raises:
        ExportError: torch cannot export it, or it carries no example inputs.
    """
    if program.example_inputs is None:
        raise ExportError("the exported program carries no example inputs: export the state dict with --model and --input")
    args, kwargs = program.example_inputs
    model = _run_exporter(program, (), {}, None)
    restore_names(model, program.state_dict)
    with torch.no_grad():
        outputs = _flatten(program.module()(*args, **kwargs))
    arrays = [value.numpy() for value in torch.utils._pytree.tree_leaves((args, kwargs))]
    return Traced(model, dict(zip((value.name for value in model.graph.input), arrays, strict=True)), outputs)


def _arguments(
    module: nn.Module, specs: Sequence[InputSpec], dtype: torch.dtype, dynamic: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Example arguments by parameter name. A dynamic dimension of size 1 is traced with 2: torch would fix a 1."""
    names, takes_more = forward_inputs(module)
    rng = np.random.default_rng(0)
    arguments = {}
    for position, spec in enumerate(specs):
        if spec.name is None and position >= len(names):
            raise UsageError(f"{len(specs)} inputs were given, the model's forward takes {len(names)}: {', '.join(names)}")
        name = spec.name or names[position]
        if name not in names and not takes_more:
            raise UsageError(f"the model's forward has no input '{name}': it takes {', '.join(names)}")
        shape = [2 if axis in dynamic and size == 1 else size for axis, size in enumerate(spec.shape)]
        floating = spec.dtype.startswith(("float", "bfloat"))
        array = torch.from_numpy(example_array(shape, np.dtype("float32" if floating else spec.dtype), rng))
        arguments[name] = array.to(dtype) if floating else array
    return arguments


def _export(module: nn.Module, arguments: Mapping[str, torch.Tensor], dynamic: Mapping[int, str]) -> ModelProto:
    shapes = {
        name: {axis: torch.export.Dim.DYNAMIC for axis in dynamic if axis < value.ndim} for name, value in arguments.items()
    }
    model = _run_exporter(module, (), dict(arguments), shapes if dynamic else None, _output_names(module, arguments))
    _name_dimensions(model, dynamic)
    return model


def _run_exporter(
    module: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    output_names: list[str] | None = None,
) -> ModelProto:
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs or None,
                dynamic_shapes=shapes,
                output_names=output_names,
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
            )
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"torch's exporter needs {error.name}: pip install onnxscript") from error
    except Exception as error:  # torch.export raises whatever the traced code raises
        cause = error.__cause__ or error
        reason = first_line(cause)
        remedy = _UNBACKED if "data-dependent" in reason else ""
        raise ExportError(f"torch cannot export the model: {type(cause).__name__}: {reason}{remedy}") from error
    if program is None:
        raise ExportError("torch's exporter returned nothing")
    model: ModelProto = program.model_proto
    _strip(model)
    return model


def _strip(model: ModelProto) -> None:
    """Drop the exporter's notes (stack traces, internal names); without them IR version 8 does, which older runtimes read."""
    graph = model.graph
    for item in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, model]:
        del item.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    model.ir_version = min(model.ir_version, IR_VERSION)


def _name_dimensions(model: ModelProto, dynamic: Mapping[int, str]) -> None:
    """Give the open dimensions the names that were asked for; dimensions that may differ get different names."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in dynamic.items():
            dims = value.type.tensor_type.shape.dim
            if axis < len(dims) and dims[axis].dim_param and dims[axis].dim_param not in names:
                taken = name in names.values()
                names[dims[axis].dim_param] = f"{name}_{value.name}" if taken else name
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _need_repeatable(module: nn.Module, arguments: Mapping[str, torch.Tensor], outputs: Sequence[npt.NDArray[Any]]) -> None:
    """Raise where a second run gives something else."""
    again = _outputs(module, arguments)
    if len(again) != len(outputs):
        raise ExportError(
            f"the model returned {len(outputs)} tensors, and {len(again)} when it ran again: it has no one graph to export"
        )
    apart = [compare(second, first) for second, first in zip(again, outputs, strict=True)]
    worst = max(apart, key=lambda difference: difference.relative, default=None)
    if worst is not None and not worst.accepted:
        raise ExportError(
            f"two runs of the model differ by {worst.absolute:.3g} (largest value {worst.scale:.3g}): it is random in "
            "evaluation mode, too, by a dropout that is always on or the like, and no export can be held against it"
        )


def run_module(module: nn.Module, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The outputs of a module, in evaluation mode, for arrays by the names of its forward's parameters, or in their order."""
    names, _ = forward_inputs(module)
    by_name = feed if set(feed) <= set(names) else dict(zip(names, feed.values(), strict=False))
    module, dtype = _computing(module)
    arguments = {name: torch.from_numpy(array) for name, array in by_name.items()}
    arguments = {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}
    return _outputs(module, arguments)


def _computing(module: nn.Module) -> tuple[nn.Module, torch.dtype]:
    """The module as it is exported, and the type it computes in: float32 where it is stored in bfloat16.

    It is put in evaluation mode, and Hugging Face's parts of it give no caches and write their attention out.
    """
    module = module.eval()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.bfloat16:
        module, dtype = module.float(), torch.float32
    without_caches(module)
    for part in module.modules():
        # One call for each expert's tokens is none that can be exported; products of all tokens with theirs can.
        choose: Any = getattr(part, "set_experts_implementation", None)
        if choose is not None:
            choose("batched_mm")
        # Written out, attention is a product, a sum and a softmax. What torch makes of the fused one scales twice and looks for
        # NaN, which is a fifth of a sparse MiniLM's time; and with a bias, as in T5 and Swin, it cannot be exported at all.
        write_out: Any = getattr(part, "set_attn_implementation", None)
        if write_out is not None:
            write_out("eager")
    return module, dtype


def _output_names(module: nn.Module, arguments: Mapping[str, torch.Tensor]) -> list[str] | None:
    """The keys of the outputs, where the module returns tensors by name: what reads the file finds them by these."""
    with torch.no_grad():
        outputs = module(**arguments)
    named = {k: v for k, v in outputs.items() if v is not None} if hasattr(outputs, "items") else {}
    return list(named) if named and all(isinstance(value, torch.Tensor) for value in named.values()) else None


def _outputs(module: nn.Module, arguments: Mapping[str, torch.Tensor]) -> list[npt.NDArray[Any]]:
    try:
        with torch.no_grad():
            return _flatten(module(**arguments))
    except Exception as error:  # a module's code may raise anything
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arguments.items())
        reason = first_line(error)
        hint = "; is --input right? Ids are --input 1,16:int64" if "Long, Int" in reason else "; is --input right?"
        raise ExportError(f"the model fails on {shapes}: {type(error).__name__}: {reason}{hint}") from error


def _flatten(outputs: Any) -> list[npt.NDArray[Any]]:
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress messages and warnings off the screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
