"""Example inputs: what ``--input`` says, and arrays that fit a model's inputs.

``--input 1,3,224,224`` is one float32 input; ``--input input_ids=1,16:int64`` names it and gives its type, and may be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, ValueInfoProto, helper

from nmconvert.errors import UsageError

MOST_NUMBERS = 1 << 32  # of an example: 16 GiB
INTEGER_LIMIT = 8  # example integers are indices into something that is at least this long
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool", "uint8", "int8")


@dataclass(frozen=True)
class InputSpec:
    """One input: its name (None: by position), shape and NumPy dtype name."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read ``[name=]shape[:dtype]``, the shape as numbers with commas.

        Raises:
            UsageError: it is not of that form.
        """
        match = re.fullmatch(r"\s*(?:([^=:,]+)=)?\s*(\d{1,12}(?:\s*[,x]\s*\d{1,12})*)\s*(?::\s*(\w+))?\s*", text)
        if match is None:
            raise UsageError(
                f"--input '{text[:80]}' is not [NAME=]SHAPE[:DTYPE], for example 1,3,224,224 or input_ids=1,16:int64"
            )
        dtype = match[3] or "float32"
        if dtype not in DTYPES:
            raise UsageError(f"--input '{text}': the type '{dtype}' is none of {', '.join(DTYPES)}")
        shape = tuple(int(size) for size in re.split(r"\s*[,x]\s*", match[2]))
        if 0 in shape:
            raise UsageError(f"--input '{text}' has a dimension of size 0")
        return cls(match[1], shape, dtype)

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}="
        return f"{name}{','.join(map(str, self.shape))}:{self.dtype}"


def example_array(shape: Sequence[int], dtype: np.dtype[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Random values of a type: normal floats, small integers that any table has, and masks (bool) of which every second entry
    is set, from the first on: something is left to look at, whether that means kept or left out.

    Raises:
        UsageError: there are more than `MOST_NUMBERS`.
    """
    if prod(shape) > MOST_NUMBERS:
        raise UsageError(
            f"an input of shape {[*shape]} has more than {MOST_NUMBERS:,} numbers: give a smaller one with --input"
        )
    if dtype == np.bool_:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1) % 2 == 0, shape or (1,)).reshape(shape).copy()
    if dtype.kind in "iu":
        return rng.integers(0, INTEGER_LIMIT, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def example_feed(
    model: ModelProto, specs: Iterable[InputSpec] = (), *, batch: int = 1, seed: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """Arrays for every input of an ONNX model: of the shapes in ``specs`` where given, else the model's own with dynamic
    dimensions set to ``batch`` (the first), 64 (the sides of an image, which networks halve some times) or 16.

    Raises:
        UsageError: a spec names no input of the model, or is not of its shape and type, or there are more specs than inputs.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    given = _by_name([value.name for value in inputs], list(specs))
    rng = np.random.default_rng(seed)
    elsewhere = {dim.dim_param for value in inputs for dim in value.type.tensor_type.shape.dim if not _is_image(value)}
    feed = {}
    for value in inputs:
        tensor = value.type.tensor_type
        dims = []
        for position, dim in enumerate(tensor.shape.dim):
            side = _is_image(value) and position >= 2 and dim.dim_param not in elsewhere - {""}
            dims.append(dim.dim_value or (batch if position == 0 else 64 if side else 16))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if value.name in given:
            _check_fit(given[value.name], value, dtype)
            dims = list(given[value.name].shape)
        feed[value.name] = example_array(dims, dtype, rng)
    return feed


def _is_image(value: ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) == 4 and helper.tensor_dtype_to_np_dtype(tensor.elem_type).name.startswith("float")


def _check_fit(spec: InputSpec, value: ValueInfoProto, dtype: np.dtype[Any]) -> None:
    """float32, meant where no type was given, fits any; other floating types fit each other: export computes in float32."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim]
    fixed = [size for size in dims if isinstance(size, int)]
    there = [size for size, dim in zip(spec.shape, dims, strict=False) if isinstance(dim, int)]
    shape_fits = not tensor.HasField("shape") or (len(spec.shape) == len(dims) and there == fixed)
    floating = ("float", "bfloat")
    both_floating = spec.dtype.startswith(floating) and dtype.name.startswith(floating)
    if not shape_fits or not (spec.dtype in (dtype.name, "float32") or both_floating):
        said = f"{','.join(map(str, dims))}:{dtype.name}"
        raise UsageError(f"--input {spec} does not fit the model, whose input '{value.name}' is {said}")


def _by_name(names: Sequence[str], specs: Sequence[InputSpec]) -> Mapping[str, InputSpec]:
    if len(specs) > len(names):
        raise UsageError(f"{len(specs)} inputs were given, the model takes {len(names)}: {', '.join(names)}")
    by_name = {}
    for position, spec in enumerate(specs):
        name = names[position] if spec.name is None else spec.name
        if name not in names:
            raise UsageError(f"the model has no input '{name}': it takes {', '.join(names)}")
        by_name[name] = spec
    return by_name
