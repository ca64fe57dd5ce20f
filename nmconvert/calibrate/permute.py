"""An order of the input channels that lets N:M keep more, free at run time: the layers before produce it.

Which channels may change places, and what moves with them, is proved in :mod:`nmconvert.calibrate.atoms`. The search here
works on the layers that read them, all that share channels together, for any N:M. A permuted model computes the same
function as before, up to rounding. (Pool and Yu 2021 do this for 2:4 on GPUs.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nmconvert.calibrate.atoms import Ints, Proof
from nmconvert.calibrate.axes_torch import chooses, exported, find_channels
from nmconvert.calibrate.correct import AGREES, AGREES_IN_HALF, disagreement, disagreement_of_most
from nmconvert.calibrate.replay import Batch, as_call, outputs_of
from nmconvert.errors import ModelError
from nmconvert.matrix import Kind, MatrixView
from nmconvert.model import layers
from nmconvert.pattern import Axis, Pattern

_ENTRIES = 1 << 22  # of the pairs tried at once: 32 MiB
_ROUNDS = 200
_PATIENCE = 6  # rounds without a gain after which the search ends

Orders = Mapping[tuple[str, int], Tensor]
"""A parameter and its dimension → where each new entry stood [size]."""


@dataclass(frozen=True)
class Permutation:
    """What was done for the layers ``names`` that read the same channels.

    ``before`` and ``after`` are the shares of their scores that the pattern keeps; ``reason`` says why nothing was permuted.
    """

    names: tuple[str, ...]
    before: float
    after: float
    reason: str | None = None


@dataclass(frozen=True)
class Reader:
    """A planned weight, whose dimension ``dim`` are the channels that it reads; ``scores`` [rows, C] are |w|, ≥ 0.

    ``obstacle`` says why its groups do not follow the channels.
    """

    name: str
    dim: int
    pattern: Pattern
    scores: Tensor
    obstacle: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        weight: Tensor,
        kind: Kind,
        groups: int,
        pattern: Pattern,
        axis: Axis,
        order: Sequence[int] | None = None,
    ) -> Reader:
        """Of a stored weight, which its operator takes transposed by ``order``."""
        order = order or range(weight.dim())
        used = weight.detach().permute(*order)
        dim = {"conv": 1, "conv_transpose": 0, "linear": used.dim() - 1, "matmul": used.dim() - 2}[kind]
        channels = used.shape[dim] // (groups if kind == "conv_transpose" else 1)
        obstacle = None
        if axis == "kernel" and kind.startswith("conv") and used[0, 0].numel() > 1:
            obstacle = "groups along the kernel do not follow the channels"
        elif kind == "conv_transpose" and groups > 1:
            obstacle = "a transposed convolution with groups"
        elif channels % pattern.m and kind.startswith("conv") and used[0, 0].numel() > 1:
            obstacle = f"its {channels} channels are no multiple of {pattern.m}"
        scores = MatrixView.of(kind, used.shape, "channel", groups).to_matrix(used.abs()).reshape(-1, channels).float()
        return cls(name, order[dim], pattern, scores, obstacle)


def permute_model(
    model: nn.Module, batch: Batch, plan: Mapping[str, tuple[Pattern, Axis]], *, seed: int = 0
) -> list[Permutation]:
    """Permute the channels of ``model`` in place for the parameters of ``plan``, wherever that is proved safe.

    ``batch`` is an example for ``torch.export``, and for a run that shows that the outputs are what they were.

    Raises:
        ModelError: the model cannot be exported, or computes something else when permuted; it is then as it was before.
    """
    program = exported(model, batch)
    found = [layer for layer in layers(model) if layer.tensor in plan]
    readers = [Reader.of(layer.tensor, layer.weight, layer.kind, layer.groups, *plan[layer.tensor]) for layer in found]
    orders, done = reorder(find_channels(program), readers, seed=seed)
    if orders:
        _apply_checked(model, orders, batch, disagreement_of_most if chooses(program) else disagreement)
    return done


def _apply_checked(model: nn.Module, orders: Orders, batch: Batch, measure: Callable[[Any, Any], float]) -> None:
    """:func:`apply`, which is taken back where the outputs for ``batch`` show that the proof was wrong."""
    calls = [[as_call(batch)]]
    before = outputs_of(model, calls)
    apply(model, orders)
    apart = measure(outputs_of(model, calls), before)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if not apart <= (AGREES_IN_HALF if half else AGREES):
        apply(model, {place: order.argsort() for place, order in orders.items()})
        raise ModelError(f"the permuted model gives something else (relative error {apart:.1e}): leave --permute out")


def apply(model: nn.Module, orders: Orders) -> None:
    """Put the parameters and buffers of ``model`` into the new ``orders``, in place."""
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for (name, dim), order in orders.items():
            state[name].copy_(state[name].index_select(dim, order))


def orders_of(proof: Proof, moved: Mapping[int, Sequence[int]]) -> dict[tuple[str, int], Tensor]:
    """What becomes of the parameters where the channels of class number c stand in the order ``moved[c]``."""
    sizes = {place: len(reasons) for place, reasons in proof.reasons.items()}
    orders: dict[tuple[str, int], Tensor] = {}
    for number, order in moved.items():
        for member in proof.channels[number].members:
            place = member.name, member.dim
            positions = torch.tensor(member.positions)
            orders.setdefault(place, torch.arange(sizes[place]))[positions] = positions[torch.as_tensor(order)]
    return orders


def reorder(
    proof: Proof, readers: Sequence[Reader], *, seed: int = 0
) -> tuple[dict[tuple[str, int], Tensor], list[Permutation]]:
    """The orders of all dimensions that are to be permuted for ``readers``, and what they keep."""
    channels = _Movable(proof, readers)
    groups = channels.groups(readers)
    for together in _connected(groups):
        _improve([line for group in together for line in group.lines], channels.kinds, channels.content, seed)
    moved = {
        number: (channels.content[first : first + size] - first).tolist()
        for number, (first, size) in enumerate(zip(channels.first, channels.sizes, strict=True))
        if (channels.content[first : first + size] != np.arange(first, first + size)).any()
    }
    return orders_of(proof, moved), [*channels.refused, *(group.report(channels) for group in groups)]


# ── who reads which channels ──────────────────────────────────────────────────────────────────────────────────────────


class _Movable:
    """The channels of all classes under running numbers.

    Attributes:
        first, sizes: of each class, the number of its first channel, and how many they are.
        kinds: the class of each channel [channels].
        content: which channel stands now where each stood [channels].
        refused: the readers for which nothing is done.
    """

    def __init__(self, proof: Proof, readers: Sequence[Reader]) -> None:
        self.sizes = [channels.size for channels in proof.channels]
        self.first = np.cumsum([0, *self.sizes])[:-1].tolist()
        self.kinds = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.content = np.arange(len(self.kinds))
        self._reasons = proof.reasons
        self._rows = self._find_rows(proof)
        self.refused: list[Permutation] = []
        self._banned: dict[int, str] = {}
        for reader in readers:
            rows = self._rows.get((reader.name, reader.dim), [])
            if rows and (why := reader.obstacle or self._crossed(reader)) is not None:
                self.refused.append(Permutation((reader.name,), 0.0, 0.0, why))
                for row in rows:
                    self._banned |= dict.fromkeys(self.kinds[row[row >= 0]].tolist(), f"'{reader.name}' reads them: {why}")

    def _find_rows(self, proof: Proof) -> dict[tuple[str, int], list[Ints]]:
        """For each dimension, the channel at each position (−1: none); those that a class has there again in further rows."""
        rows: dict[tuple[str, int], list[Ints]] = {}
        for number, channels in enumerate(proof.channels):
            seen: Counter[tuple[str, int]] = Counter()
            for member in channels.members:
                place = member.name, member.dim
                found = rows.setdefault(place, [])
                if len(found) == seen[place]:
                    found.append(np.full(len(proof.reasons[place]), -1))
                found[seen[place]][list(member.positions)] = self.first[number] + np.arange(channels.size)
                seen[place] += 1
        return rows

    def _crossed(self, reader: Reader) -> str | None:
        """Why the groups of a reader cannot be judged one by one: channels of one class stand in one twice."""
        groups = (np.arange(reader.scores.shape[1]) // reader.pattern.m).tolist()
        seen: set[tuple[int, int]] = set()
        for row in self._rows.get((reader.name, reader.dim), []):
            pairs = {
                (group, kind)
                for group, kind, channel in zip(groups, self.kinds[row].tolist(), row, strict=True)
                if channel >= 0
            }
            if pairs & seen:
                return "its groups hold channels that move with one another"
            seen |= pairs
        return None

    def groups(self, readers: Sequence[Reader]) -> list[_Group]:
        """Those that read the same channels in the same order, with the same pattern, as one."""
        refused = {name for done in self.refused for name in done.names}
        found: dict[Any, list[Reader]] = {}
        for reader in readers:
            if reader.name not in refused:
                rows = self.rows(reader)
                same = tuple(row.tobytes() for row in rows) if rows else self.why(reader)
                found.setdefault((reader.pattern, reader.scores.shape[1], same), []).append(reader)
        return [_Group(same, self.rows(same[0])) for same in found.values()]

    def rows(self, reader: Reader) -> list[Ints]:
        """The channels that it reads, as far as they may move; none if there are none."""
        rows = [row.copy() for row in self._rows.get((reader.name, reader.dim), [])]
        for row in rows:
            row[np.isin(self.kinds[row], list(self._banned))] = -1
        return [row for row in rows if (row >= 0).any()]

    def why(self, reader: Reader) -> str:
        """Why none of its channels may move."""
        banned = [self._banned.get(kind) for row in self._rows.get((reader.name, reader.dim), []) for kind in self.kinds[row]]
        reasons = [why for why in (*banned, *self._reasons.get((reader.name, reader.dim), ())) if why]
        return Counter(reasons).most_common(1)[0][0] if reasons else "the graph does not use it"


class _Group:
    """Readers of the same channels, and their scores in the order as it is now."""

    def __init__(self, readers: Sequence[Reader], rows: Sequence[Ints]) -> None:
        self.readers, self.pattern = readers, readers[0].pattern
        scores = torch.cat([reader.scores for reader in readers])
        m = self.pattern.m
        self.scores = torch.nn.functional.pad(scores, (0, -scores.shape[1] % m))
        self.now = np.arange(self.scores.shape[1])
        step = max(1, self.scores.numel() * m // _ENTRIES)
        self.sample = self.scores[::step]
        padded = [np.pad(row, (0, len(self.now) - len(row)), constant_values=-1) for row in rows]
        self.lines = [_Line(self, row) for row in padded]

    def report(self, channels: _Movable) -> Permutation:
        """What the order of now keeps."""
        names = tuple(reader.name for reader in self.readers)
        if not self.lines:
            reason = f"its channels have to keep their order: {channels.why(self.readers[0])}"
            return Permutation(names, 0.0, 0.0, reason)
        total = self.scores.sum().clamp_min(1e-30)
        ordered = self.scores[:, torch.from_numpy(self.now)]
        before, after = (float(kept_score(scores, self.pattern) / total) for scores in (self.scores, ordered))
        return Permutation(names, before, after, None if after != before else "no order was found that keeps more")


@dataclass(eq=False)
class _Line:
    """A group of readers as one row of channels sees it: ``row`` [columns] is the channel at each column, or −1."""

    group: _Group
    row: Ints

    def __post_init__(self) -> None:
        there = np.flatnonzero(self.row >= 0)
        self._place = np.full(int(self.row.max(initial=-1)) + 2, -1)
        self._place[self.row[there]] = there

    def places(self, channels: Ints) -> Ints:
        """The column of each, −1 where it is in none."""
        return self._place[np.minimum(channels, len(self._place) - 1)]

    def columns(self, groups: Ints) -> Tensor:
        """The scores of some groups as they stand now [rows, groups, m]."""
        m = self.group.pattern.m
        return self.group.sample[:, torch.from_numpy(self.group.now.reshape(-1, m)[groups])]

    def gains(self, out: Ints, into: Ints) -> Tensor:
        """What is kept more when the channels ``out`` and ``into`` [pairs] change places."""
        m = self.group.pattern.m
        a, b = self.places(out), self.places(into)
        apart = np.flatnonzero((a >= 0) & (b >= 0) & (a // m != b // m))
        gains = torch.zeros(len(out))
        if len(apart):
            a, b = a[apart], b[apart]
            gained = _gain(self.columns(a // m), self.columns(b // m), a % m, b % m, self.group.pattern.n)
            gains[torch.from_numpy(apart)] = gained
        return gains

    def exchange(self, out: int, into: int) -> None:
        """Let two channels change places."""
        a, b = self.places(np.array([out, into])).tolist()
        if a >= 0 and b >= 0:
            now = self.group.now
            now[a], now[b] = now[b], now[a]


def _connected(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """The groups that share channels."""
    left = list(groups)
    while left:
        found, channels = [left.pop(0)], set[int]()
        channels.update(*(line.row[line.row >= 0].tolist() for group in found for line in group.lines))
        while more := [g for g in left if any(channels & set(line.row.tolist()) for line in g.lines)]:
            found += more
            left = [g for g in left if g not in more]
            channels.update(*(line.row[line.row >= 0].tolist() for group in more for line in group.lines))
        yield found


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_score(scores: Tensor, pattern: Pattern) -> Tensor:
    """The score that N:M keeps of ``scores`` [rows, C], C a multiple of m: a scalar."""
    return scores.reshape(len(scores), -1, pattern.m).topk(min(pattern.n, pattern.m), dim=2).values.sum()


def search(scores: Tensor, pattern: Pattern, *, seed: int = 0) -> Tensor:
    """An order [C] of the columns of ``scores`` [rows, C] (≥ 0) that keeps more than the given, all free to move."""
    group = _Group([Reader("", 0, pattern, scores.float())], [np.arange(scores.shape[1])])
    _improve(group.lines, np.zeros(scores.shape[1], np.int64), np.arange(scores.shape[1]), seed)
    return torch.from_numpy(group.now[: scores.shape[1]])


def _improve(lines: Sequence[_Line], kinds: Ints, content: Ints, seed: int) -> None:
    """Exchange channels of a class while that lets ``lines`` keep more; ``content`` [channels] follows.

    Each round takes one line, pairs its groups at random, tries all m² exchanges of one channel between the two groups of each
    pair, and makes the best one of every pair that gains. Rows beyond what is quick are sampled for the search, evenly.
    """
    generator, idle = torch.Generator().manual_seed(seed), 0
    lines = [line for line in lines if not line.group.pattern.is_dense]
    for number in range(_ROUNDS * len(lines)):
        line = lines[number % len(lines)]
        count = len(line.row) // line.group.pattern.m
        first, second = torch.randperm(count, generator=generator)[: count // 2 * 2].reshape(2, -1).numpy()
        others = [other for other in lines if other is not line]
        made = _made(lines, *_best_exchanges(line, others, first, second, kinds))
        for out, into in made:
            for other in lines:
                other.exchange(out, into)
            content[out], content[into] = content[into], content[out]
        idle = 0 if made else idle + 1
        if idle == _PATIENCE * len(lines):
            break


def _best_exchanges(line: _Line, others: Sequence[_Line], first: Ints, second: Ints, kinds: Ints) -> tuple[Tensor, Ints, Ints]:
    """For each pair of groups [pairs] of ``line`` the best exchange: its gain in all lines, and the two channels."""
    m, n = line.group.pattern.m, line.group.pattern.n
    a, b = _apart(line.columns(first)), _apart(line.columns(second))
    rows = line.row.reshape(-1, m)
    best = torch.full((len(first),), -torch.inf)
    out, into = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
    now = _kept(a, n) + _kept(b, n)
    for i in range(m):
        for j in range(m):
            x, y = rows[first, i], rows[second, j]
            allowed = (x >= 0) & (y >= 0) & (kinds[x] == kinds[y])
            if not allowed.any():
                continue
            gain = _kept([*a[:i], b[j], *a[i + 1 :]], n) + _kept([*b[:j], a[i], *b[j + 1 :]], n) - now
            for other in others:
                gain = gain + other.gains(x, y)
            better = allowed & (gain > best).numpy()
            best = torch.where(torch.from_numpy(better), gain, best)
            out, into = np.where(better, x, out), np.where(better, y, into)
    return best, out, into


def _gain(a: Tensor, b: Tensor, i: Ints, j: Ints, n: int) -> Tensor:
    """What pairs of groups [rows, pairs, m] keep more when column i of the one and j of the other [pairs] change places."""
    x, y = a.clone(), b.clone()
    pairs, first, second = torch.arange(a.shape[1]), torch.from_numpy(i), torch.from_numpy(j)
    x[:, pairs, first], y[:, pairs, second] = b[:, pairs, second], a[:, pairs, first]
    return _kept(_apart(x), n) + _kept(_apart(y), n) - _kept(_apart(a), n) - _kept(_apart(b), n)


def _apart(groups: Tensor) -> list[Tensor]:
    """[rows, pairs, m] → m columns [rows, pairs]."""
    return list(groups.movedim(2, 0).contiguous())


def _kept(columns: Sequence[Tensor], n: int) -> Tensor:
    """The sum [pairs] over rows of the n < m largest of every group: ``topk`` takes five times as long for so few."""
    m, left = len(columns), list(columns)
    if n > m // 2:  # all but the smallest
        return torch.stack(left).sum((0, 1)) + _kept([-column for column in left], m - n)
    for last in range(m - 1, m - 1 - n, -1):
        for column in range(last):
            low, high = left[column : column + 2]
            left[column], left[column + 1] = torch.minimum(low, high), torch.maximum(low, high)
    return torch.stack(left[m - n :]).sum((0, 1))


def _made(lines: Sequence[_Line], gain: Tensor, out: Ints, into: Ints) -> list[tuple[int, int]]:
    """The exchanges that gain, the best first, each group touched once."""
    least = 1e-6 * sum(float(line.group.sample.mean()) for line in lines)
    used: set[tuple[int, int]] = set()
    made = []
    for number in gain.argsort(descending=True, stable=True).tolist():
        if not gain[number] > least:
            break
        pair = np.array([out[number], into[number]])
        touched = {
            (id(line.group), place // line.group.pattern.m)
            for line in lines
            for place in line.places(pair).tolist()
            if place >= 0
        }
        if not touched & used:
            used |= touched
            made.append((int(pair[0]), int(pair[1])))
    return made
