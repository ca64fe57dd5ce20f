"""An ONNX file that is called like an ``nn.Module``: tensors in, tensors out, in onnxruntime."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmconvert.errors import CheckpointError, ModelError, first_line
from nmconvert.runtime import session as kernel_session

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8,
}
_BFLOAT16 = 16  # TensorProto.BFLOAT16, a type that NumPy does not have


class OnnxModel:
    """Call it with tensors in the order of the graph's inputs, or by their names.

    Floating inputs are converted to the graph's type, and floating outputs to float32. A graph made for a fixed batch
    size takes any: the batch is cut, and the last piece filled up by repeating its last row.

    Args:
        file: the ONNX file.
        threads: of the session; 0 for what onnxruntime takes by default.
        kernels: run on nmconvert's kernels, and not on what stock onnxruntime makes of the file.

    Raises:
        CheckpointError: onnxruntime cannot load it.
    """

    def __init__(self, file: Path, *, threads: int = 0, kernels: bool = False) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # its errors are raised as well
        try:
            opened = kernel_session if kernels else ort.InferenceSession
            self.session = opened(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes share no base but this one
            raise CheckpointError(f"{file}: onnxruntime cannot load it: {first_line(error)}") from error
        self.file = file
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        for value in self.inputs.values():
            if value.type not in _DTYPES:
                raise CheckpointError(f"{file}: input '{value.name}' is a {value.type}, which no task gives")

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """Run the graph: one output as a tensor, several as a dict by name."""
        feeds = self._bind(args, {name: value for name, value in kwargs.items() if value is not None})
        size = len(next(iter(feeds.values())))
        step = self._fixed_batch() or size
        pieces = [self._run({k: v[i : i + step] for k, v in feeds.items()}, step) for i in range(0, size, step)]
        whole = pieces[0] if step == size else {name: self._joined(name, pieces, step, size) for name in self.outputs}
        return whole[self.outputs[0]] if len(whole) == 1 else whole

    def _joined(self, name: str, pieces: Sequence[Mapping[str, Tensor]], step: int, size: int) -> Tensor:
        """One output of all pieces, without what filled up the last."""
        rows = {tuple(piece[name].shape[:1]) for piece in pieces}
        if rows != {(step,)}:
            shape = [*pieces[0][name].shape]
            raise ModelError(
                f"{self.file}: made for {step} samples at a time, {size} were given, and the output '{name}' {shape} "
                f"has no row for each; give {step} (--batch-size {step})"
            )
        return torch.cat([piece[name] for piece in pieces])[:size]

    def _bind(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.inputs) or set(feeds) != set(self.inputs):
            given = [*[f"#{i}" for i in range(len(args))], *kwargs]
            raise ModelError(f"{self.file}: the graph has the inputs {', '.join(self.inputs)}; given {', '.join(given)}")
        return feeds

    def _fixed_batch(self) -> int | None:
        first = next(iter(self.inputs.values())).shape
        return first[0] if first and isinstance(first[0], int) else None

    def _run(self, feeds: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        values = {}
        for name, tensor in feeds.items():
            if len(tensor) < rows:
                tensor = torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
            values[name] = _to_ort(tensor, _DTYPES[self.inputs[name].type])
        try:
            found = self.session.run_with_ort_values(self.outputs, values)
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in feeds.items())
            raise ModelError(f"{self.file}: onnxruntime fails on {shapes}: {first_line(error)}") from error
        return {name: _from_ort(value) for name, value in zip(self.outputs, found, strict=True)}


def _to_ort(tensor: Tensor, dtype: torch.dtype) -> Any:
    import onnxruntime as ort

    tensor = tensor.detach().cpu().to(dtype).contiguous()
    if dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        size = value.tensor_size_in_bytes()
        if not size:
            return torch.zeros(value.shape())
        content = bytearray(ctypes.string_at(value.data_ptr(), size))
        return torch.frombuffer(content, dtype=torch.bfloat16).reshape(value.shape()).float()
    tensor = torch.from_numpy(value.numpy())
    return tensor.float() if tensor.is_floating_point() else tensor
