"""What a whole model is judged by: its outputs, or what its last layers say where the model itself chooses among that.

A detector returns the best of its points, sorted, with their labels. Where a pruned one ranks two of them the other way
round, row after row is compared with another object's, and fitting that pulls all boxes towards their mean. What it chooses
from are maps, in which every point keeps its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmconvert.calibrate.replay import Batch, Reached, call_model

Answer = Callable[..., Any]
"""Called as the model is; gives what is compared."""


def answer_of(model: nn.Module, batch: Batch) -> Answer:
    """``model`` itself; where integers (labels, places) are among its outputs for ``batch``, what its last layers say."""
    with torch.no_grad():
        outputs = call_model(model, batch)
    chosen = any(not leaf.is_floating_point() for leaf in _tensors(outputs))
    found = heads(model, batch) if chosen else {}
    return _Heads(model, found) if found else model


class _Heads:
    """What the modules ``calls`` answer when ``model`` is called, each as often as it says; then the model is left."""

    def __init__(self, model: nn.Module, calls: Mapping[str, int]) -> None:
        self.model, self.calls = model, calls

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        said: list[Any] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            said.append(tree_map(_copy, output))  # what follows may work in place
            if len(said) == sum(self.calls.values()):
                raise Reached

        handles = [self.model.get_submodule(name).register_forward_hook(note) for name in self.calls]
        try:
            with suppress(Reached):
                self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return said


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def heads(model: nn.Module, batch: Batch) -> dict[str, int]:
    """The modules with parameters, and without submodules, whose outputs reach no other such module; how often each is called.

    What reaches what is read off autograd's graph of one pass.
    """
    into: list[Any] = []
    out: dict[str, list[Any]] = {}
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] += 1
            into.extend(leaf.grad_fn for leaf in _tensors((args, kwargs)))
            out.setdefault(name, []).extend(leaf.grad_fn for leaf in _tensors(output) if leaf.grad_fn)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if [*m.parameters()] and not [*m.children()]]
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in layers]
    try:
        with all_trainable(model):
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    passed = _before(into)
    return {name: calls[name] for name, nodes in out.items() if nodes and not any(node in passed for node in nodes)}


@contextmanager
def all_trainable(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within, gradients are computed, of every floating parameter; they are yielded by name, and left as they were."""
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    try:
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for name, parameter in parameters.items():
            trained, parameter.grad = before[name]
            parameter.requires_grad_(trained)


def _before(nodes: list[Any]) -> set[Any]:
    """All nodes of autograd's graph that ``nodes`` come from, themselves included."""
    seen: set[Any] = set()
    pending = [node for node in nodes if node is not None]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions if following is not None)
    return seen


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
