"""How far what a pruned graph says is from what the dense one says, where its outputs are probabilities.

A detector's map says at every place whether there is something, and where and what it is. A squared error counts all of it
alike, though boxes and classes mean nothing at the many places where there is nothing. So probabilities are compared by their
Kullback-Leibler divergence, and all else where the dense graph sees something. That alone is soon learnt by heart from few
images: so every number is compared everywhere, too, each channel by its own variance, the rare class as much as the common one.
Each part is relative to what the best constant would lose: 0 is the dense graph, 1 is one that no longer looks at its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 0.01  # of the mean variance: a channel that hardly varies is not to decide all
_TINY = 1e-12

Kind = Literal["value", "chance", "choice"]


@dataclass(frozen=True)
class Said:
    """A compared output [B, …], how its numbers are meant, and the dimension ``axis`` of its channels.

    ``chance``: each becomes a probability by a sigmoid; ``choice``: the channels of a place do together, by a softmax.
    """

    name: str
    kind: Kind = "value"
    axis: int = 1


@dataclass(frozen=True)
class _Part:
    """One comparison: numbers or logits [places, channels] of both models, and what each place counts [places, 1]."""

    kind: Kind
    output: Tensor
    target: Tensor
    weight: Tensor


class Distance:
    """Called with the outputs that ``said`` describes and the dense model's: a scalar, through which gradients go.

    Args:
        said: of each output, what it is.
        answers: the dense model's outputs for some batches, which tell the scale of each.
    """

    def __init__(self, said: Sequence[Said], answers: Iterable[Sequence[Tensor]]) -> None:
        self.said = said
        kinds: list[Kind] = []
        batches: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        for targets in answers:
            parts = self._parts(targets, targets)
            kinds = [part.kind for part in parts]
            batches.append([_moments(part) for part in parts])
        means = [[torch.stack(moment).mean(0) for moment in zip(*part, strict=True)] for part in zip(*batches, strict=True)]
        self.scales = [_scale(kind, *part) for kind, part in zip(kinds, means, strict=True)]

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean over all comparisons of what is lost at a place, relative to what the best constant would lose there."""
        parts = self._parts(outputs, targets)
        lost = [((p.weight * _lost(p)).mean(0) / scale).mean() for p, scale in zip(parts, self.scales, strict=True)]
        return torch.stack(lost).mean()

    def _parts(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[_Part]:
        """Each output as numbers, everywhere; and as what it means, where that counts.

        A map of a single chance says whether there is anything at all, and weighs what else is said of the same places;
        else the largest chance of a place weighs the values there.
        """
        floating = [number for number, target in enumerate(targets) if target.is_floating_point()]
        wanted = {number: _rows(self.said[number], targets[number]) for number in floating}
        spaces = {number: _places(self.said[number], targets[number]) for number in floating}
        chances = [number for number in floating if self.said[number].kind == "chance"]
        parts = []
        for number, target in wanted.items():
            one = self.said[number]
            output, everywhere = _rows(one, outputs[number]), torch.ones_like(target[:, :1])
            gates = [wanted[n] for n in chances if n != number and spaces[n] == spaces[number]]
            gates = [gate for gate in gates if gate.shape[1] == 1] or (gates if one.kind == "value" else [])
            parts.append(_Part("value", _centred(one, output), _centred(one, target), everywhere))
            if gates or one.kind != "value":
                weight = gates[0].sigmoid().amax(1, keepdim=True) if gates else everywhere
                parts.append(_Part(one.kind, output, target, weight))
        return parts


def _centred(one: Said, logits: Tensor) -> Tensor:
    """Logits of a choice without what is added to all of them, which a softmax does not see; all others as they are."""
    return logits - logits.mean(1, keepdim=True) if one.kind == "choice" else logits


def _rows(one: Said, output: Tensor) -> Tensor:
    """[places, channels]; numbers without dimensions to tell apart are one channel."""
    return output.reshape(-1, 1) if output.dim() < 2 else output.movedim(one.axis, -1).reshape(-1, output.shape[one.axis])


def _places(one: Said, output: Tensor) -> tuple[int, ...]:
    return tuple(output.shape if output.dim() < 2 else output.movedim(one.axis, -1).shape[:-1])


def _lost(part: _Part) -> Tensor:
    """What is lost at each place: of each value [places, channels], or of all chances [places, 1]."""
    output, target = part.output, part.target
    if part.kind == "value":
        return (output - target).square()
    if part.kind == "choice":
        return (target.softmax(1) * (target.log_softmax(1) - output.log_softmax(1))).sum(1, keepdim=True)
    yes, no = target.sigmoid(), (-target).sigmoid()
    lost = yes * (F.logsigmoid(target) - F.logsigmoid(output)) + no * (F.logsigmoid(-target) - F.logsigmoid(-output))
    return lost.sum(1, keepdim=True)


def _moments(part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Means over places of the weight, of the weighted values or probabilities, and of their squares or entropy."""
    weight, told = part.weight, part.target
    if part.kind == "value":
        return weight.mean(0), (weight * told).mean(0), (weight * told.square()).mean(0)
    told = told.sigmoid() if part.kind == "chance" else told.softmax(1)
    return weight.mean(0), (weight * told).mean(0), (weight * _entropy(part.kind, told)).mean(0)


def _entropy(kind: Kind, chances: Tensor) -> Tensor:
    """Of each row of ``chances``, in nats: [places, 1]."""
    entropy = -torch.xlogy(chances, chances)
    entropy = entropy - torch.xlogy(1 - chances, 1 - chances) if kind == "chance" else entropy
    return entropy.sum(-1, keepdim=True)


def _scale(kind: Kind, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What the best constant loses at a place on average: the weighted variance, or by how much its entropy is too high."""
    usual = first / weight.clamp_min(_TINY)
    if kind != "value":
        return (weight * _entropy(kind, usual) - second).clamp_min(_TINY)
    variance = second - weight * usual.square()
    return variance.clamp_min(_LEAST * float(variance.mean())).clamp_min(_TINY)
