"""An order of the input channels that lets N:M keep more, free at run time: the layers before produce it.

The search (:func:`search`) is on one matrix of scores and works for any N:M; where it may be applied, and to what else, is
what :mod:`nmconvert.calibrate.axes` proves. A permuted model computes the same function as before, up to rounding.
(Pool and Yu 2021 do this for 2:4 on GPUs.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmconvert.calibrate.axes import Channels, find_channels
from nmconvert.calibrate.replay import Batch
from nmconvert.matrix import MatrixView
from nmconvert.model import Layer, layers
from nmconvert.pattern import Axis, Pattern

_ENTRIES = 1 << 22  # of the pairs tried at once: 32 MiB
_PATIENCE = 6  # rounds without a gain after which the search ends


@dataclass(frozen=True)
class Permutation:
    """What was done for the layers ``names`` that read the same channels.

    ``before`` and ``after`` are the shares of their scores that the pattern keeps; ``reason`` says why nothing was permuted.
    """

    names: tuple[str, ...]
    before: float
    after: float
    reason: str | None = None


def kept_score(scores: Tensor, pattern: Pattern) -> Tensor:
    """The score that N:M keeps of ``scores`` [rows, C], C a multiple of m: a scalar."""
    return scores.reshape(len(scores), -1, pattern.m).topk(min(pattern.n, pattern.m), dim=2).values.sum()


def search(scores: Tensor, pattern: Pattern, *, rounds: int = 200, seed: int = 0) -> Tensor:
    """An order [C] of the columns of ``scores`` [rows, C] (C a multiple of m, scores ≥ 0) that keeps more than the given.

    Each round pairs the groups at random, tries all m² exchanges of one column between the two groups of each pair, and makes
    the best one of every pair that gains. Rows beyond what is quick are sampled for the search, evenly.
    """
    columns, m = scores.shape[1], pattern.m
    order = torch.arange(columns)
    if pattern.is_dense or columns < 2 * m:
        return order
    scores = scores[:: max(1, len(scores) * columns * m // _ENTRIES)].float()
    generator = torch.Generator().manual_seed(seed)
    groups, idle = columns // m, 0
    for _ in range(rounds):
        shuffled = torch.randperm(groups, generator=generator)[: groups // 2 * 2].reshape(2, -1)
        first, second = (order.reshape(groups, m)[half] for half in shuffled)  # [pairs, m] each
        gain, out, into = _best_exchanges(scores, first, second, pattern.n)
        better = (gain > 1e-6 * scores.mean()).nonzero()[:, 0]
        idle = 0 if len(better) else idle + 1
        if idle == _PATIENCE:
            break
        a, b = shuffled[0][better] * m + out[better], shuffled[1][better] * m + into[better]
        order[a], order[b] = order[b], order[a]
    return order


def _best_exchanges(scores: Tensor, first: Tensor, second: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair of groups [pairs, m] the best exchange: its gain [pairs], and the positions in both groups."""
    pairs, m = first.shape
    a, b = scores[:, first], scores[:, second]  # [rows, pairs, m]
    now = a.topk(n, dim=2).values.sum((0, 2)) + b.topk(n, dim=2).values.sum((0, 2))
    best = torch.full((pairs,), -torch.inf)
    out, into = torch.zeros(pairs, dtype=torch.long), torch.zeros(pairs, dtype=torch.long)
    for i in range(m):
        for j in range(m):
            x, y = a.clone(), b.clone()
            x[:, :, i], y[:, :, j] = b[:, :, j], a[:, :, i]
            then = x.topk(n, dim=2).values.sum((0, 2)) + y.topk(n, dim=2).values.sum((0, 2))
            better = then - now > best
            best = torch.where(better, then - now, best)
            out, into = torch.where(better, i, out), torch.where(better, j, into)
    return best, out, into


def permute_model(
    model: nn.Module, batch: Batch, plan: Mapping[str, tuple[Pattern, Axis]], *, seed: int = 0
) -> list[Permutation]:
    """Permute the channels of ``model`` in place for the parameters of ``plan``, wherever that is proved safe.

    Only layers that group along the channels, whose number is a multiple of m, gain from it; those that share their channels
    are searched together. ``batch`` is an example for ``torch.export``.

    Raises:
        ModelError: the model cannot be exported.
    """
    found = {layer.tensor: layer for layer in layers(model) if layer.tensor in plan}
    classes = {member: channels for channels in find_channels(model, batch) for member in channels.members}
    readers: dict[Channels | None, list[Layer]] = {}
    for name, layer in found.items():
        readers.setdefault(classes.get((name, _input_dim(layer))), []).append(layer)
    return [_permute(model, channels, group, plan, seed) for channels, group in readers.items()]


def _input_dim(layer: Layer) -> int:
    return {"conv": 1, "conv_transpose": 0, "linear": 1, "matmul": 0}[layer.kind]


def _permute(
    model: nn.Module,
    channels: Channels | None,
    group: Sequence[Layer],
    plan: Mapping[str, tuple[Pattern, Axis]],
    seed: int,
) -> Permutation:
    names = tuple(layer.tensor for layer in group)
    pattern, _ = plan[names[0]]
    reason = _obstacle(channels, group, plan)
    if reason is not None or channels is None:
        return Permutation(names, 0.0, 0.0, reason or "its input is not in the exported graph")
    scores = torch.cat([_scores(layer) for layer in group])
    order = torch.cat(
        [
            low + search(scores[:, low : low + channels.block], pattern, seed=seed)
            for low in range(0, channels.size, channels.block)
        ]
    )
    total = scores.sum().clamp_min(1e-30)
    before, after = (float(kept_score(s, pattern) / total) for s in (scores, scores[:, order]))
    if after <= before:
        return Permutation(names, before, before, "no order was found that keeps more")
    apply(model, channels, order)
    return Permutation(names, before, after)


def _obstacle(channels: Channels | None, group: Sequence[Layer], plan: Mapping[str, tuple[Pattern, Axis]]) -> str | None:
    patterns = {plan[layer.tensor][0] for layer in group}
    if channels is None:
        return "its input is not in the exported graph"
    if channels.frozen:
        return f"its channels have to keep their order: {channels.frozen}"
    if len(patterns) > 1:
        return "layers that read the same channels have different patterns"
    m = next(iter(patterns)).m
    if channels.block % m:
        return f"its {channels.block} channels are no multiple of {m}"
    if any(plan[layer.tensor][1] == "kernel" and layer.weight.dim() > 2 for layer in group):
        return "groups along the kernel do not follow the channels"
    return None


def _scores(layer: Layer) -> Tensor:
    """|w| with the channels last: [rows, C]."""
    view = MatrixView.of(layer.kind, layer.weight.shape, "channel", layer.groups)
    return view.to_matrix(layer.weight.detach().abs()).reshape(-1, layer.weight.shape[_input_dim(layer)])


def apply(model: nn.Module, channels: Channels, order: Tensor) -> None:
    """Put every member of ``channels`` into the new ``order`` [size], in place."""
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, dim in channels.members:
            state[name].copy_(state[name].index_select(dim, order))
