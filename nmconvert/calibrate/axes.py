"""The dimensions of values as joints of cells, and what operators do to them: the steps of the proof of ``atoms``.

Reshapes make several dimensions out of one, or one of several. A :class:`Joint` says how some dimensions of a value, together,
are cells of one axis: the heads of an attention and the channels within a head, the channels and the pixels of a flattened
image. The rules for the operators of torch are in ``axes_torch``, those of ONNX in ``axes_onnx``; what both need is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from nmconvert.calibrate.atoms import Atoms, Cells, Ints, Proof

_ENTRIES = 1 << 22  # cells of a joint at most: larger ones are frozen
_BLOCKS = "the blocks of a reshape"

Sizes = Mapping[int, int]
"""Of dimensions, by their numbers."""


@dataclass(frozen=True, eq=False)
class Joint(Cells):
    """Dimensions ``dims`` of a value are ``cells`` [their sizes] of ``axis``."""

    dims: tuple[int, ...]

    def renamed(self, names: Mapping[int, int]) -> Joint:
        """The same with other numbers for its dimensions; those that are not named have gone, and are of size 1."""
        places = tuple(slice(None) if d in names else 0 for d in self.dims)
        assert all(n == 1 for d, n in zip(self.dims, self.cells.shape, strict=True) if d not in names)
        return Joint(self.axis, self.cells[places], tuple(names[d] for d in self.dims if d in names))

    def over(self, dims: Sequence[int], sizes: Sizes) -> Joint:
        """Over the dimensions ``dims``, which hold its own: repeated along the others."""
        cells = self.cells.transpose([self.dims.index(d) for d in dims if d in self.dims])
        cells = cells.reshape([sizes[d] if d in self.dims else 1 for d in dims])
        return Joint(self.axis, np.broadcast_to(cells, [sizes[d] for d in dims]), tuple(dims))


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph; each of its dimensions is in exactly one joint."""

    shape: tuple[int, ...]
    joints: tuple[Joint, ...]

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def sizes(self) -> dict[int, int]:
        """Its dimensions' sizes by number."""
        return dict(enumerate(self.shape))

    def among(self, dims: Iterable[int]) -> tuple[Joint, ...]:
        """The joints that hold one of ``dims``."""
        wanted = set(dims)
        return tuple(joint for joint in self.joints if wanted & set(joint.dims))


class Walk:
    """What the operators of a graph do: values go in and come out."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self._parameters: dict[str, Value] = {}

    def proof(self) -> Proof:
        """What may change places, once every operator has been told of."""
        rows = {(name, j.dims[0]): j for name, value in self._parameters.items() for j in value.joints}
        return self.atoms.proof(rows)

    # ------------------------------------------------------------------------------------------------------ values

    def fresh(self, shape: Sequence[int], reason: str | None = None) -> Value:
        """A value whose dimensions are new; frozen where there is a ``reason``."""
        axes = [self.atoms.axis(size) for size in shape]
        value = Value(tuple(shape), tuple(Joint(a.axis, a.cells, (dim,)) for dim, a in enumerate(axes)))
        if reason is not None:
            self.freeze(reason, value)
        return value

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        """A parameter: the same value each time."""
        if name not in self._parameters:
            self._parameters[name] = self.fresh(shape)
        return self._parameters[name]

    def freeze(self, reason: str, *values: Value) -> None:
        """Keep all entries where they are."""
        self._freeze(reason, [joint for value in values for joint in value.joints])

    def freeze_dims(self, reason: str, value: Value, dims: Iterable[int]) -> None:
        """Keep the entries of some dimensions where they are, and what is joint with them."""
        self._freeze(reason, value.among(dims))

    def _freeze(self, reason: str, joints: Iterable[Joint]) -> None:
        for joint in joints:
            self.atoms.freeze(joint.atoms, reason)

    def row(self, value: Value, dim: int, reason: str) -> Joint:
        """The joint of one dimension alone; where it is joint with others, all are frozen."""
        joint = value.among([dim])[0]
        if joint.dims == (dim,):
            return joint
        self._freeze(reason, [joint])
        return self.fresh([value.shape[dim]], reason).joints[0].renamed({0: dim})

    def filled(self, shape: Sequence[int], joints: Sequence[Joint], reason: str = _BLOCKS) -> Value:
        """A value of these joints, and of frozen dimensions where there is none."""
        missing = sorted(set(range(len(shape))) - {dim for joint in joints for dim in joint.dims})
        new = self.fresh([shape[dim] for dim in missing], reason)
        return Value(tuple(shape), (*joints, *(joint.renamed(dict(enumerate(missing))) for joint in new.joints)))

    # --------------------------------------------------------------------------------------------- order and shape

    def transposed(self, value: Value, order: Sequence[int]) -> Value:
        """Dimension ``order[i]`` becomes number i."""
        names = {source: dim for dim, source in enumerate(order)}
        return Value(tuple(value.shape[d] for d in order), tuple(joint.renamed(names) for joint in value.joints))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same entries in row-major order under another shape."""
        if 0 in value.shape:
            return self.fresh(shape, "an empty value")
        runs = _factors(value.shape, shape)
        place = {dim: number for number, (sources, _) in enumerate(runs) for dim in sources}
        inner = [joint for joint in (_squeezed(j, place) for j in value.joints) if joint.dims]
        result: list[Joint] = []
        for numbers in _connected(len(runs), [[place[d] for d in joint.dims] for joint in inner]):
            joints = [joint for joint in inner if place[joint.dims[0]] in numbers]
            sources, targets = ([d for number in numbers for d in runs[number][side]] for side in (0, 1))
            if all(len(runs[number][0]) == len(runs[number][1]) == 1 for number in numbers):
                result += [joint.renamed(dict(zip(sources, targets, strict=True))) for joint in joints]
                continue
            movable = any(self.atoms.free(joint.atoms) for joint in joints)
            whole = self._product(joints, value.sizes) if movable else None
            if whole is not None:
                cells = whole.over(sources, value.sizes).cells.reshape([shape[d] for d in targets])
                result.append(self._parted(Joint(whole.axis, cells, tuple(targets))))
        return self.filled(shape, result, "a reshape")

    def _parted(self, joint: Joint) -> Joint:
        """Without the dimensions along which it stays the same: these are no part of it."""
        for dim in joint.dims:
            place = joint.dims.index(dim)
            roots = self.atoms.find(joint.atoms.ravel()).reshape(joint.cells.shape)
            first = joint.cells.take([0], place)
            if len(joint.dims) > 1 and (roots == roots.take([0], place)).all():
                self.atoms.alike(joint, Cells(joint.axis, np.broadcast_to(first, joint.cells.shape)))
                joint = Joint(joint.axis, first.squeeze(place), tuple(d for d in joint.dims if d != dim))
        return joint

    def _product(self, joints: Sequence[Joint], sizes: Sizes) -> Joint | None:
        """One joint for all: what has the most to move keeps that, the rest is frozen. None, all frozen, if it is too large."""
        if len(joints) == 1:
            return joints[0]
        kept = max(joints, key=lambda joint: self.atoms.free(joint.atoms))
        dims = sorted(d for joint in joints for d in joint.dims)
        large = prod(sizes[d] for d in dims) > _ENTRIES
        self._freeze("a reshape", [joint for joint in joints if large or joint is not kept])
        if large:
            return None
        apart = _coordinates(dims, [d for d in dims if d not in kept.dims], sizes)
        new = self.atoms.derived([kept.over(dims, sizes)], apart=apart)
        return Joint(new.axis, new.cells, tuple(dims))

    def taken(self, value: Value, dim: int, index: Ints) -> Value:
        """Some entries of one dimension, in the order of ``index``."""
        joint = value.among([dim])[0]
        place = joint.dims.index(dim)
        cells = joint.cells.take(index, place)
        if np.array_equal(cells, joint.cells):
            return value
        chosen = np.isin(np.arange(value.shape[dim]), index).reshape([-1 if p == place else 1 for p in range(len(joint.dims))])
        self.atoms.tag(joint, np.broadcast_to(chosen, joint.cells.shape).astype(np.int64))
        new = self.atoms.derived([Cells(joint.axis, cells)])
        shape = (*value.shape[:dim], len(index), *value.shape[dim + 1 :])
        return Value(shape, tuple(Joint(new.axis, new.cells, j.dims) if j is joint else j for j in value.joints))

    def picked(self, value: Value, dim: int, place: int) -> Value:
        """One entry of a dimension, which is gone then."""
        one = self.taken(value, dim, np.array([place]))
        return self.reshaped(one, [size for d, size in enumerate(one.shape) if d != dim])

    def joined(self, values: Sequence[Value], dim: int) -> Value:
        """A concatenation along ``dim``."""
        first = values[0]
        along = _closure(dim, values)
        rest = {d: size for d, size in first.sizes.items() if d not in along}
        others = self._met(rest, [value.among(rest) for value in values])
        shape = [sum(v.shape[dim] for v in values) if d == dim else size for d, size in first.sizes.items()]
        wholes = [self._product(value.among(along), value.sizes) for value in values]
        if any(whole is None for whole in wholes):
            self._freeze("a concatenation", [whole for whole in wholes if whole is not None])
            return self.filled(shape, others, "a concatenation")
        dims = sorted(along)
        sources = [whole.over(dims, v.sizes) for whole, v in zip(wholes, values, strict=True) if whole is not None]
        new = self.atoms.derived(sources, dims.index(dim))
        return self.filled(shape, [*others, Joint(new.axis, new.cells, tuple(dims))])

    def padded(self, value: Value, dim: int, low: int, high: int) -> Value:
        """With ``low`` and ``high`` entries of one constant before and after those of ``dim``."""

        def constant(count: int) -> list[Value]:
            return [self.fresh([*value.shape[:dim], count, *value.shape[dim + 1 :]])] if count else []

        return self.joined([*constant(low), value, *constant(high)], dim) if low or high else value

    # ------------------------------------------------------------------------------------------------ computations

    def apart(self, value: Value, dims: Iterable[int]) -> Value:
        """``value``, on which an operator acts along ``dims`` for each entry of the others alone: joints of both are cut up."""
        along = set(dims)
        for joint in value.joints:
            outside = [d for d in joint.dims if d not in along]
            if outside and len(outside) < len(joint.dims):
                self.atoms.tag(joint, _coordinates(joint.dims, outside, value.sizes))
        return value

    def reduced(self, value: Value, dims: Iterable[int], *, keep: bool) -> Value:
        """A sum over ``dims``, or whatever else does not mind their order."""
        gone = set(dims)
        self.apart(value, gone)
        carried = [d for d in range(value.rank) if d not in gone]
        names = {d: d if keep else place for place, d in enumerate(carried)}
        left = [joint.renamed(names) for joint in value.joints if not gone & set(joint.dims)]
        return self.filled([1 if d in gone else n for d, n in value.sizes.items() if keep or d not in gone], left)

    def pointwise(self, shape: Sequence[int], values: Sequence[Value]) -> Value:
        """What is computed entry by entry; dimensions are aligned at the right, and repeated, as operators broadcast."""
        shifts = [len(shape) - value.rank for value in values]
        letters = [{d: d + shift for d in range(v.rank)} for v, shift in zip(values, shifts, strict=True)]
        return self.met(shape, list(zip(values, letters, strict=True)))

    def met(
        self, shape: Sequence[int], operands: Sequence[tuple[Value, Mapping[int, int]]], summed: Sizes | None = None
    ) -> Value:
        """Values that meet entry by entry, summed over some dimensions.

        Each operand comes with what its dimensions are: those of the result, ``shape``, or those that are ``summed`` (numbers
        beyond these → size). A dimension of size 1 is repeated.
        """
        sizes = {**dict(enumerate(shape)), **(summed or {})}
        named = []
        for value, letters in operands:
            wide = {d: letter for d, letter in letters.items() if value.shape[d] == sizes[letter]}
            named.append(tuple(j for j in (joint.renamed(wide) for joint in value.joints) if j.dims))
        return self.filled(shape, self._met(sizes, named, summed or {}))

    def _met(self, sizes: Sizes, operands: Sequence[Sequence[Joint]], summed: Sizes | None = None) -> list[Joint]:
        letters, gone = list(sizes), set(summed or {})
        place = {letter: number for number, letter in enumerate(letters)}
        result = []
        for numbers in _connected(len(letters), [[place[d] for d in j.dims] for joints in operands for j in joints]):
            block = [letters[number] for number in numbers]
            parts = [found for joints in operands if (found := [j for j in joints if j.dims[0] in block])]
            joint = self._block(block, parts, sizes) if parts else None
            if joint is not None and gone & set(block):
                self.atoms.tag(joint, _coordinates(block, [d for d in block if d not in gone], sizes))
            elif joint is not None:
                result.append(joint)
        return result

    def _block(self, block: Sequence[int], parts: Sequence[Sequence[Joint]], sizes: Sizes) -> Joint | None:
        """The joints of all operands over the dimensions ``block``, linked: one that covers them all, if there is one."""
        joints = [self._product(part, sizes) for part in parts]
        first = next((j for j in joints if j is not None and len(j.dims) == len(block)), None)
        if first is None or None in joints:
            self._freeze("operands whose dimensions do not agree", [j for part in parts for j in part])
            return None
        first = first.over(block, sizes)
        for joint in joints:
            assert joint is not None
            repeated = [d for d in block if d not in joint.dims]
            if not repeated:
                self.atoms.link(first, joint.over(block, sizes))
                continue
            own = _coordinates(block, joint.dims, sizes)
            if self.atoms.free(joint.atoms) and not _tells(first.tags, own):
                self.atoms.spread(joint.over(block, sizes), first, _coordinates(block, repeated, sizes))
            else:  # nothing of the first may move from one of its entries to another
                self._freeze("an operand of a reshape's blocks", [joint])
                self.atoms.tag(first, own)
        return first

    # ----------------------------------------------------------------------------------------- operators with weights

    def product(self, shape: Sequence[int], a: Value, b: Value) -> Value:
        """A product of matrices, or of stacks of them: [.., i, k] and [.., k, j]."""
        rank = len(shape)
        left = {d: d + rank - a.rank for d in range(a.rank - 1)} | {a.rank - 1: rank}
        right = {d: d + rank - b.rank for d in range(b.rank)} | {b.rank - 2: rank}
        return self.met(shape, [(a, left), (b, right)], {rank: a.shape[-1]})

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Value:
        """x Wᵀ + b: [.., I], [O, I] and [O]."""
        last = x.rank - 1
        operands = [(x, {d: d for d in range(last)} | {last: x.rank}), (weight, {0: last, 1: x.rank})]
        if bias is not None:
            operands.append((bias, {0: last}))
        return self.met((*x.shape[:-1], weight.shape[0]), operands, {x.rank: x.shape[-1]})

    def normalized(self, value: Value, dims: Sequence[int], parameters: Sequence[Value], first: int) -> Value:
        """A norm over ``dims``, with parameters for the dimensions from ``first`` on."""
        self.apart(value, dims)
        operands = [(p, {d: first + d for d in range(p.rank)}) for p in parameters]
        return self.met(value.shape, [(value, {d: d for d in range(value.rank)}), *operands])

    def grouped(self, value: Value, groups: int) -> None:
        """The channels [B, C, ..] are read in ``groups`` runs, each by itself."""
        self._runs(self.row(value, 1, "groups of channels"), groups)

    def _runs(self, cells: Cells, count: int) -> Cells:
        """``cells`` in ``count`` runs [count, n] that stay apart."""
        runs = Cells(cells.axis, cells.cells.reshape(count, -1))
        self.atoms.tag(runs, np.broadcast_to(np.arange(count)[:, None], runs.cells.shape))
        return runs

    def windowed(self, value: Value, shape: Sequence[int], reason: str, first: int) -> Value:
        """Pooling and resizing: what stands before dimension ``first`` is carried on, space is not."""
        self.freeze_dims(reason, value, range(first, value.rank))
        rows = [self.row(value, d, reason) for d in range(first) if shape[d] == value.shape[d]]
        return self.filled(shape, rows, reason)

    def convolution(
        self, shape: Sequence[int], x: Value, weight: Value, bias: Value | None, groups: int, *, transposed: bool = False
    ) -> Value:
        """[B, I, *space] with [O, I / groups, *kernel], transposed [I, O / groups, *kernel]; without a batch, too."""
        place = x.rank - weight.rank + 1
        self.freeze_dims("a convolution over it", x, range(place + 1, x.rank))
        self.freeze_dims("a kernel's window", weight, range(2, weight.rank))
        inputs = self.row(x, place, "a convolution over it")
        first, second = (weight.among([d])[0] for d in (0, 1))
        if groups == 1:
            self.atoms.link(inputs, first if transposed else second)
            outputs: Cells = second if transposed else first
        elif weight.shape[0 if transposed else 1] == 1 or (transposed and groups == x.shape[place]):
            outputs = self._depthwise(inputs, first, second, shape[place], transposed=transposed)
        else:
            outputs = self._grouped(inputs, first, second, groups, transposed=transposed)
        if bias is not None:
            self.atoms.link(outputs, bias.joints[0])
        batch = [self.row(x, 0, "a convolution over it")] if place else []
        channels = Joint(outputs.axis, outputs.cells, (place,))
        return self.filled(shape, [*batch, channels], "a convolution over it")

    def _depthwise(self, inputs: Joint, first: Joint, second: Joint, count: int, *, transposed: bool) -> Cells:
        """One input channel for each group; its outputs move with it as a block."""
        size = len(inputs.cells)
        self.atoms.freeze(second.atoms, "a group of one channel")
        outputs = self.atoms.axis(count) if transposed else first
        if transposed:
            self.atoms.link(inputs, first)
        cells = Cells(outputs.axis, outputs.cells.reshape(size, -1))
        few = Cells(inputs.axis, np.broadcast_to(inputs.cells[:, None], cells.cells.shape))
        self.atoms.spread(few, cells, np.broadcast_to(np.arange(count // size), cells.cells.shape))
        return outputs

    def _grouped(self, inputs: Joint, first: Joint, second: Joint, groups: int, *, transposed: bool) -> Cells:
        """The groups share the columns of the weight: their inputs move alike in all, and outputs within a group."""
        if transposed:
            self.atoms.link(inputs, first)
            self._runs(inputs, groups)
            outputs: Cells = self.atoms.axis(groups * len(second.cells))
            shared = Cells(outputs.axis, outputs.cells.reshape(groups, -1))
        else:
            self._runs(first, groups)
            outputs, shared = first, Cells(inputs.axis, inputs.cells.reshape(groups, -1))
        few = Cells(second.axis, np.broadcast_to(second.cells, shared.cells.shape))
        self.atoms.spread(few, shared, np.broadcast_to(np.arange(groups)[:, None], shared.cells.shape))
        return outputs

    def embedding(self, shape: Sequence[int], table: Value, index: Value, axis: int = 0) -> Value:
        """Entries of ``table`` along ``axis`` by a computed ``index``, whose dimensions stand in its place."""
        self.freeze_dims("an index", table, [axis])
        table = self.reduced(table, [axis], keep=False)
        names = {d: d if d < axis else d + index.rank for d in range(table.rank)}
        return self.met(shape, [(table, names), (index, {d: axis + d for d in range(index.rank)})])


def _coordinates(dims: Sequence[int], some: Iterable[int], sizes: Sizes) -> Ints:
    """A number for each place along the dimensions ``some``, as an array over ``dims``."""
    result = np.zeros([1] * len(dims), np.int64)
    for place, dim in enumerate(dims):
        if dim in some:
            result = result * sizes[dim] + np.arange(sizes[dim]).reshape([-1 if p == place else 1 for p in range(len(dims))])
    return np.broadcast_to(result, [sizes[d] for d in dims])


def _tells(tags: Ints, coordinates: Ints) -> bool:
    """Whether what has the same tag has the same coordinates."""
    pairs = tags * (int(coordinates.max(initial=0)) + 1) + coordinates
    return len(np.unique(pairs)) == len(np.unique(tags))


def _squeezed(joint: Joint, kept: Mapping[int, Any]) -> Joint:
    """Without the dimensions (of size 1) that are not in ``kept``."""
    return joint.renamed({d: d for d in joint.dims if d in kept})


def _closure(dim: int, values: Sequence[Value]) -> set[int]:
    """``dim``, and all that is joint with it in any of ``values``."""
    found = {dim}
    while more := {d for value in values for joint in value.among(found) for d in joint.dims} - found:
        found |= more
    return found


def _connected(count: int, edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers below ``count`` in groups, those of an edge together."""
    group = list(range(count))
    for edge in edges:
        for number in edge[1:]:
            old, new = group[number], group[edge[0]]
            group = [new if g == old else g for g in group]
    return [[n for n in range(count) if group[n] == g] for g in dict.fromkeys(group)]


def _factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions (those of size 1 left out) that a reshape turns into one another."""
    left = [d for d, size in enumerate(before) if size != 1]
    right = [d for d, size in enumerate(after) if size != 1]
    runs = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (one := prod(before[d] for d in a)) != (two := prod(after[d] for d in b)):
            if one < two:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        runs.append((a, b))
    return runs
