"""Where training broke: the layer that first gave a number that is none, and what to do when memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmconvert.errors import NmconvertError


def first_bad_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Which layer of ``model`` first holds or returns NaN or infinity when ``forward`` runs again, in words."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return f"the weight '{name.replace('parametrizations.', '').removesuffix('.original')}' holds NaN or infinity"
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, bad))
        for name, module in model.named_modules()
        if not any(module.children()) and "parametrizations" not in name
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if bad:
        return f"'{bad[0]}' is the first layer whose output holds NaN or infinity"
    return "no layer's output holds NaN or infinity, only the loss does"


def not_finite(inputs: Any) -> bool:
    """Whether what a model is given holds NaN or infinity."""
    return any(tensor.is_floating_point() and not torch.isfinite(tensor).all() for tensor in _tensors(inputs))


def slow_in(precision: str, device: torch.device) -> str | None:
    """Why a precision costs time on this device rather than saving it, with the remedy; or None."""
    able = torch.backends.cpu.get_cpu_capability()
    if precision == "fp32" or device.type != "cpu" or able not in ("AVX2", "NO AVX"):
        return None
    return f"{precision} takes several times as long as fp32 on this CPU, which has {able}: leave out --precision"


def _watch(name: str, bad: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not bad and not_finite(output):
            bad.append(name)

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextmanager
def out_of_memory_named(batch: int, accumulate: int) -> Iterator[None]:
    """Turn an allocation that failed into a line that says what to try.

    Raises:
        NmconvertError: there was too little memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise NmconvertError(
            f"out of memory at batches of {batch}: --accumulate {2 * accumulate} takes each in twice as many parts and gives "
            "the same result, a smaller --batch another one; --precision bf16 needs less as well"
        ) from error
