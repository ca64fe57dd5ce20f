"""Running a model block by block: what each block was called with, the blocks before it answered from memory.

A *unit* is a module (a residual block, a transformer layer, or a single layer that stands alone) that is pruned as a
whole. Once a unit is done, its outputs for every batch are kept; to reach the next one the model runs again with each
earlier unit answering at once, and stops there. So only what stands between the units is computed twice, and no
assumption is made about how the model wires them. What does not fit into memory is kept on disk
(:mod:`nmconvert.calibrate.store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmconvert.calibrate.store import Store
from nmconvert.errors import ModelError

Batch = Any
"""A tensor (the model's only input), a tuple or list (its arguments), or a mapping (its keyword arguments)."""


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Reached(Exception):
    """A model has come as far as it was to run."""


def call_model(model: nn.Module, batch: Batch) -> Any:
    """``model`` on one batch."""
    call = as_call(batch)
    return model(*call.args, **call.kwargs)


def as_call(batch: Batch) -> Call:
    """How a model is called with ``batch``."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    return Call(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})


def trace(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[tuple[str, int]]:
    """The calls of the modules ``names`` in one forward pass: (name, identity of its first tensor), in order.

    Equal identities mean the same tensor object: layers that read the same input.
    """
    seen: list[tuple[str, int]] = []
    alive: list[Any] = []  # so that no identity is used twice

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            alive.extend(tensors)
            seen.append((name, id(tensors[0]) if tensors else 0))

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def find_units(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The modules to prune one after the other so that each of ``layers`` (module names) lies in exactly one.

    An element of a ModuleList or Sequential that is no such container itself and holds layers is a unit: the residual
    blocks of a ResNet, the layers of a transformer. Layers outside of any such element are units of their own.
    """
    found: list[str] = []

    def visit(name: str, module: nn.Module, repeated: bool) -> None:
        container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        inside = [n for n in layers if n == name or not name or n.startswith(name + ".")]
        if not inside:
            return
        if name in layers or (repeated and not container):
            found.append(name)
            return
        for child, sub in module.named_children():
            visit(f"{name}.{child}" if name else child, sub, container)

    visit("", model, False)
    return found


class Replay:
    """A model and its batches, with the outputs of the units that are done."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], counts: Mapping[str, int], store: Store | None = None):
        self._model, self._batches, self._counts = model, batches, counts
        self._store = store or Store()
        self._answers: dict[str, list[list[Any]]] = {}

    def calls(self, unit: str) -> list[list[Call]]:
        """What ``unit`` is called with: per batch the calls (one, unless the model uses it several times)."""
        if not unit:
            return [[as_call(batch)] for batch in self._batches]
        with torch.no_grad():
            return [self._reach(unit, number) for number in range(len(self._batches))]

    def answer(self, unit: str, outputs: list[list[Any]]) -> None:
        """From now on ``unit`` answers with ``outputs`` (per batch and call)."""
        self._answers[unit] = outputs

    def _reach(self, unit: str, number: int) -> list[Call]:
        calls: list[Call] = []
        target = self._model.get_submodule(unit)
        original = target.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(*self._store.keep((args, kwargs))))
            if len(calls) == self._counts[unit]:
                raise Reached
            return original(*args, **kwargs)

        replaced = {name: _from_list(outputs[number]) for name, outputs in self._answers.items()}
        with _forwards(self._model, {**replaced, unit: record}):
            try:
                call_model(self._model, self._batches[number])
            except Reached:
                return calls
        raise ModelError(f"'{unit}' was called {len(calls)} times on batch {number} and {self._counts[unit]} on the first")


def outputs_of(module: Callable[..., Any], calls: Sequence[Sequence[Call]], store: Store | None = None) -> list[list[Any]]:
    """The outputs of ``module`` for every call of every batch, without gradients; kept in ``store`` if there is one."""
    keep: Callable[[Any], Any] = store.keep if store else lambda output: output
    with torch.no_grad():
        return [[keep(module(*tree_map(_keep, c.args), **tree_map(_keep, c.kwargs))) for c in batch] for batch in calls]


def _keep(leaf: Any) -> Any:
    """A copy of a tensor, so that in-place operations do not reach what is kept."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _from_list(outputs: Sequence[Any]) -> Callable[..., Any]:
    left: Iterator[Any] = iter(outputs)
    return lambda *args, **kwargs: tree_map(_keep, next(left))


@contextmanager
def _forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Modules answer with other forwards for the time being."""
    modules: list[Any] = [model.get_submodule(name) for name in forwards]
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards.values(), strict=True):
            module.forward = forward
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
