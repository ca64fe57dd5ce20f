"""Several examples of a fit computed at once, so that layers get batches of them.

A graph may be for a single sample, and what its first dimension means further in only its author knows, so nothing is put
together along a dimension of its own: ``torch.vmap`` computes every operator for several examples, each as if it were alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_SAME = 1e-3  # relative difference of a loss: rounding is far below, an operator that mixes examples far above
_PLAIN = (bool, int, float, str, type(None))

Loss = Callable[[Any], Tensor]
"""A scalar for an example, any nest of tensors."""


class Together:
    """``loss`` of many examples, of which so many are computed at once as hold ``limit`` bytes for their gradients.

    One after another where that is 0, where examples differ in shape, where ``loss`` cannot be computed for several at once
    (values decide what it does, or onnxruntime computes a part of it), and where it would be something else.
    """

    def __init__(self, loss: Loss, limit: int) -> None:
        self.loss, self.limit = loss, limit
        self._most: dict[Any, int] = {}  # at once, by the kind of example

    def __call__(self, examples: Sequence[Any]) -> Iterator[Tensor]:
        """Sums of ``loss`` over parts of ``examples``: what one part holds is free when the next is asked for."""
        groups: dict[Any, list[Any]] = {}
        for example in examples:
            groups.setdefault(_kind(example), []).append(example)
        for kind, group in groups.items():
            if len(group) > 1 and self.limit and kind not in self._most:
                self._most[kind] = self._tried(group[:2])
            size = self._most.get(kind, 1)
            for low in range(0, len(group), size):
                part = group[low : low + size]
                yield self._alone(part[0]) if len(part) == 1 else self._at_once(part).sum()

    def _alone(self, example: Any) -> Tensor:
        return self.loss(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example))  # it may work in place

    def _at_once(self, examples: Sequence[Any]) -> Tensor:
        """[examples]."""
        rows = [tree_leaves(example) for example in examples]
        first, spec = tree_flatten(examples[0])
        places = [place for place, leaf in enumerate(first) if isinstance(leaf, Tensor)]
        stacked = [torch.stack([row[place] for row in rows]) for place in places]

        def one(*tensors: Tensor) -> Tensor:
            leaves = [*first]
            for place, tensor in zip(places, tensors, strict=True):
                leaves[place] = tensor
            return self.loss(tree_unflatten(leaves, spec))

        result: Tensor = torch.vmap(one)(*stacked)
        return result

    def _tried(self, examples: Sequence[Any]) -> int:
        """How many examples like these can be computed at once."""
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not tensor.is_leaf:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alone = [self._alone(examples[0])]
        most = self.limit // max(1, sum(held.values()))
        if most < 2:
            return 1
        alone += [self._alone(example) for example in examples[1:]]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop")  # an operator that vmap calls one by one
            try:
                both = self._at_once(examples)
            except Exception:  # whatever a function raises that was fine with each of them: it does not take several
                return 1
        return most if torch.allclose(both, torch.stack(alone), rtol=_SAME, atol=0.0) else 1


def _kind(example: Any) -> Any:
    """Equal for examples that can be stacked."""
    leaves, spec = tree_flatten(example)
    shown = (
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, _PLAIN) else id(leaf)
        for leaf in leaves
    )
    return str(spec), tuple(shown)
