"""The inputs of a layer as the columns that its weight matrix is multiplied with.

For a layer whose matrix view (:mod:`nmconvert.matrix`) is W [rows, K], :func:`columns` gives, for each block of rows
that shares its inputs (a group of a convolution, one of the three projections of an attention), X [tokens, K] such that
the layer computes X Wᵀ, one token an output position. Convolutions are unfolded with their real padding, stride,
dilation and groups; K is in the order of the view's axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmconvert.errors import ModelError
from nmconvert.pattern import Axis

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def columns(
    module: nn.Module,
    parameter: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    axis: Axis,
    limit: int | None = None,
) -> list[Tensor]:
    """The inputs of one call ``module(*args, **kwargs)`` for its weight ``parameter``: [tokens, K] per block of rows.

    Of more than ``limit`` tokens a random choice is taken, the same one for inputs of the same shape.

    Raises:
        ModelError: the module is of a type whose inputs are not understood.
    """
    if isinstance(module, nn.MultiheadAttention):
        return [_some(x, limit) for x in _attention_columns(module, parameter, args, kwargs)]
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, _CONVOLUTIONS):
        padded = F.pad(x.unsqueeze(0) if x.dim() == len(module.kernel_size) + 1 else x, *_padding(module))
        return conv_columns(padded, module.kernel_size, module.stride, module.dilation, module.groups, axis, limit)
    if isinstance(module, _TRANSPOSED):
        x = x.unsqueeze(0) if x.dim() == len(module.kernel_size) + 1 else x
        return _transposed(module, x, axis, limit)
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # Hugging Face's Conv1D is x @ [I, O]
        return [_some(x.reshape(-1, x.shape[-1]), limit)]
    raise ModelError(f"a {type(module).__name__} cannot be calibrated: exclude '{parameter}', or use magnitude")


def conv_columns(
    padded: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    axis: Axis,
    limit: int | None = None,
) -> list[Tensor]:
    """Unfold ``padded`` [B, C, *space] for a convolution of ``groups``: per group [min(B · outputs, limit), K]."""
    rank = len(kernel)
    x = padded
    for dim, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, spread * (size - 1) + 1, step)[..., ::spread]
    batch, channels, *_ = x.shape
    x = x.reshape(batch, groups, channels // groups, *x.shape[2:])
    space, window = tuple(range(3, 3 + rank)), tuple(range(3 + rank, 3 + 2 * rank))
    order = (*window, 2) if axis == "channel" else (2, *window)
    x = x.permute(1, 0, *space, *order)  # a view: only the chosen tokens are copied
    size, total = channels // groups * prod(kernel), batch * prod(x.shape[2 : 2 + rank])
    if limit is not None and total > limit:
        chosen: tuple[Any, ...] = torch.unravel_index(_choice(total, limit), x.shape[1 : 2 + rank])
        x = x[(slice(None), *chosen)]
    return list(x.reshape(groups, -1, size))


def _some(tokens: Tensor, limit: int | None) -> Tensor:
    return tokens if limit is None or len(tokens) <= limit else tokens[_choice(len(tokens), limit)]


def _choice(total: int, limit: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(total))[:limit]


def _padding(module: Any) -> tuple[list[int], str]:
    """What F.pad needs (last dimension first) and its mode, for a convolution."""
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same":
        pairs = [(t // 2, t - t // 2) for t in total]
    elif module.padding == "valid":
        pairs = [(0, 0) for _ in total]
    else:
        pairs = [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return [p for pair in reversed(pairs) for p in pair], mode


def _transposed(module: Any, x: Tensor, axis: Axis, limit: int | None) -> list[Tensor]:
    crops = [(p, p - extra) for p, extra in zip(module.padding, module.output_padding, strict=True)]
    return transposed_columns(x, module.kernel_size, module.stride, crops, module.dilation, module.groups, axis, limit)


def transposed_columns(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    axis: Axis,
    limit: int | None = None,
) -> list[Tensor]:
    """As :func:`conv_columns` for a transposed convolution of ``x`` [B, C, *space]; ``padding`` is what it crops.

    It is a convolution of its zero-stuffed input with the mirrored kernel; output padding is a negative crop at the end.
    """
    rank = len(kernel)
    stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    places: tuple[Any, ...] = tuple(slice(None, None, s) for s in stride)
    stuffed[(..., *places)] = x
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    pads = [(r - low, r - high) for r, (low, high) in zip(reach, padding, strict=True)]
    padded = F.pad(stuffed, [p for pair in reversed(pads) for p in pair])
    blocks = conv_columns(padded, kernel, (1,) * rank, dilation, groups, axis, limit)
    inputs = x.shape[1] // groups
    shape = (-1, *kernel, inputs) if axis == "channel" else (-1, inputs, *kernel)
    spatial = [d + (1 if axis == "channel" else 2) for d in range(rank)]
    return [block.reshape(shape).flip(spatial).reshape(len(block), -1) for block in blocks]


def _attention_columns(
    module: nn.MultiheadAttention, parameter: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    query, key, value = (named[part].reshape(-1, named[part].shape[-1]) for part in ("query", "key", "value"))
    if parameter == "out_proj.weight":
        return [_attended(module, args, kwargs)]
    if parameter != "in_proj_weight":
        return [{"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}[parameter]]
    if named["query"] is named["key"] and named["key"] is named["value"]:
        return [query]
    return [query, key, value]


def _attended(module: nn.MultiheadAttention, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The heads' outputs before ``out_proj``: what the module computes with the identity in its place."""
    projection: Any = module.out_proj
    weight, bias = projection.weight, projection.bias
    try:
        projection.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device))
        projection.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
        output: Tensor = module.forward(*args, **kwargs)[0]
    finally:
        projection.weight, projection.bias = weight, bias
    return output.reshape(-1, output.shape[-1])
