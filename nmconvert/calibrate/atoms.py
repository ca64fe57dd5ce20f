"""Which channels of a model can change places without changing what it computes: the proof.

Every entry of every dimension of every value is an *atom*. An operator that carries entries on gives its result the same
atoms, in their new places (a slice some, a concatenation those of all its inputs, a channel shuffle all in another order), and
one that lets entries meet joins their atoms: those of a sum, those of a convolution's input with the columns of its weight.
An operator that needs the order of a dimension freezes its atoms, and so do the model's inputs and outputs and **every
operator that no rule describes**.

Two atoms that are not frozen, and that stand in the same axes, may change places everywhere at once: every operator on the
way commutes with that. Where an operator treats parts of an axis apart (the heads of an attention, the groups of a
convolution), its positions get *tags*, and atoms change places only with atoms of the same tags. An atom may stand in an axis
more than once if tags tell which is which; :class:`Atoms` keeps how such places belong together across axes.

The dimensions of values, and what operators do to them, are in ``axes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(eq=False)
class AxisAtoms:
    """A row of positions: the atom that stands at each, and its tag; both [n]."""

    atoms: Ints
    tags: Ints


@dataclass(frozen=True, eq=False)
class Cells:
    """Positions ``cells`` in ``axis``, in any shape."""

    axis: AxisAtoms
    cells: Ints

    @property
    def atoms(self) -> Ints:
        """The atom of each."""
        return self.axis.atoms[self.cells]

    @property
    def tags(self) -> Ints:
        """The tag of each."""
        return self.axis.tags[self.cells]


@dataclass(frozen=True)
class Member:
    """Positions of dimension ``dim`` of the parameter ``name``: those of one class of atoms, in the class's order."""

    name: str
    dim: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """Atoms that may change places: what is done to one member, in the order of its positions, is done to all."""

    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.members[0].positions)


@dataclass(frozen=True)
class Proof:
    """What a walk over a graph has found.

    Attributes:
        channels: the classes of atoms that may change places, of two atoms or more.
        reasons: why the others may not, by parameter and dimension: for each position a text, '' where it may.
    """

    channels: list[Channels]
    reasons: Mapping[tuple[str, int], tuple[str, ...]]


class Atoms:
    """The atoms of a graph, in its axes."""

    def __init__(self) -> None:
        self._count = 0
        self._parent, self._why = np.arange(0), np.zeros(0, np.int64)
        self._reasons: list[str] = [""]
        self._axes: list[AxisAtoms] = []
        self._relations: list[tuple[Cells, Cells]] = []

    # -------------------------------------------------------------------------------------------------- union-find

    def _new(self, count: int) -> Ints:
        first, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            size = 2 * self._count
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), size)])
            self._why = np.concatenate([self._why, np.zeros(size - len(self._why), np.int64)])
        return np.arange(first, self._count)

    def find(self, atoms: Ints) -> Ints:
        """For each atom the one that stands for all that it was joined with."""
        roots = atoms
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[atoms] = roots
        return roots

    def join(self, first: Ints, second: Ints) -> None:
        """Make the atoms of two arrays one, entry by entry; frozen if either is."""
        a, b = first.ravel(), second.ravel()
        why = np.maximum(self._why[self.find(a)], self._why[self.find(b)])
        while not np.array_equal(x := self.find(a), y := self.find(b)):
            np.minimum.at(self._parent, np.maximum(x, y), np.minimum(x, y))
        np.maximum.at(self._why, x, why)

    def freeze(self, atoms: Ints, reason: str) -> None:
        """Keep them where they are."""
        if reason not in self._reasons:
            self._reasons.append(reason)
        roots = self.find(atoms.ravel())
        self._why[roots] = np.where(self._why[roots], self._why[roots], self._reasons.index(reason))

    def free(self, atoms: Ints) -> int:
        """How many of them may move, as far as is known."""
        return int((self._why[self.find(atoms.ravel())] == 0).sum())

    # -------------------------------------------------------------------------------------------------------- axes

    def axis(self, size: int) -> Cells:
        """A new axis of new atoms."""
        return self._axis(self._new(size), np.zeros(size, np.int64))

    def _axis(self, atoms: Ints, tags: Ints) -> Cells:
        axis = AxisAtoms(atoms.ravel(), tags.ravel())
        self._axes.append(axis)
        return Cells(axis, np.arange(atoms.size).reshape(atoms.shape))

    def derived(self, sources: Sequence[Cells], place: int = 0, apart: Ints | None = None) -> Cells:
        """A new axis that holds what stands in ``sources``, put together along their dimension ``place``, each kept apart.

        ``apart`` [as the only source] adds tags of its own.
        """
        number = len(sources)
        atoms = np.concatenate([source.atoms for source in sources], place)
        tags = np.concatenate([source.tags * number + part for part, source in enumerate(sources)], place)
        new = self._axis(atoms, tags if apart is None else tags * (int(apart.max(initial=0)) + 1) + apart)
        cuts = np.cumsum([s.cells.shape[place] for s in sources])[:-1]
        for source, cells in zip(sources, np.split(new.cells, cuts, place), strict=True):
            self._relations.append((source, Cells(new.axis, cells)))
        return new

    def tag(self, cells: Cells, by: Ints) -> bool:
        """Keep them apart where ``by`` [as they are] differs; whether that is new."""
        if not by.size or (by == by.flat[0]).all():
            return False
        tags, old = cells.axis.tags, cells.tags
        pairs, fresh = np.unique(old * (int(by.max()) + 1) + by, return_inverse=True)
        if len(pairs) == len(np.unique(old)):
            return False
        tags[cells.cells] = fresh.reshape(by.shape) + int(tags.max()) + 1
        return True

    def link(self, one: Cells, other: Cells) -> None:
        """They meet one by one; what keeps those of one apart keeps those of the other apart."""
        if one.axis is other.axis and np.array_equal(one.cells, other.cells):
            return
        self.join(one.atoms, other.atoms)
        tags, others = one.tags, other.tags
        self.tag(one, others)
        self.tag(other, tags)
        self._relations.append((one, other))

    def spread(self, few: Cells, many: Cells, apart: Ints) -> None:
        """Cells of ``few``, repeated, meet those of ``many``, which move in blocks; ``apart`` tells the cells of a block."""
        self.join(few.atoms, many.atoms)
        self.tag(many, few.tags)
        self.tag(many, apart)
        self._relations.append((few, many))

    def alike(self, one: Cells, other: Cells) -> None:
        """They hold the same atoms, and move alike."""
        self._relations.append((one, other))

    # ------------------------------------------------------------------------------------------------------ results

    def proof(self, parameters: Mapping[tuple[str, int], Cells]) -> Proof:
        """The classes of atoms, by the dimensions of ``parameters`` (name and dimension → its row of cells)."""
        self._pass_on_tags()
        for axis in self._axes:
            if (repeated := self._repeated(axis)).size:
                self.freeze(repeated, "entries that meet others of their own dimension")
        kinds = self._kinds([*self._axes, *self._tagged_relations()])
        sizes = np.bincount(kinds[kinds >= 0], minlength=1)
        members: dict[int, list[Member]] = {}
        reasons = {}
        for (name, dim), row in parameters.items():
            roots = self.find(row.atoms)
            reasons[name, dim] = tuple(self._reason(root, kinds, sizes) for root in roots.tolist())
            for kind, positions in _positions(roots, row.tags, kinds):
                if sizes[kind] > 1:
                    members.setdefault(kind, []).append(Member(name, dim, positions))
        return Proof([Channels(tuple(found)) for _, found in sorted(members.items())], reasons)

    def _repeated(self, axis: AxisAtoms) -> Ints:
        """The atoms that stand twice in an axis, where no tag says which is which."""
        width = int(axis.tags.max(initial=0)) + 1
        pairs, count = np.unique(self.find(axis.atoms) * width + axis.tags, return_counts=True)
        found: Ints = pairs[count > 1] // width
        return found

    def _pass_on_tags(self) -> None:
        """Tags that came later tell the cells of related axes apart, too; needed where atoms stand twice in these."""
        repeated = {id(axis) for axis in self._axes if self._repeated(axis).size}
        pairs = [
            pair for one, other in self._relations for pair in ((one, other), (other, one)) if id(pair[0].axis) in repeated
        ]
        pairs = [(to, by) for to, by in pairs if len(np.unique(to.cells)) == to.cells.size]
        changed = True
        while changed:
            changed = sum(self.tag(to, by.tags) for to, by in pairs) > 0

    def _tagged_relations(self) -> Iterator[AxisAtoms]:
        """Each relation in which tags matter as an axis of its own: atoms of a class have the same pairs of tags there."""
        for one, other in self._relations:
            tags, others = one.tags, other.tags
            if tags.any() or others.any():
                yield AxisAtoms(one.atoms.ravel(), (tags * (int(others.max(initial=0)) + 1) + others).ravel())

    def _kinds(self, axes: Sequence[AxisAtoms]) -> Ints:
        """For each root the number of its class: equal for those that are in the same axes at the same tags; −1: frozen."""
        kinds = np.where(self._why[: self._count] > 0, -1, 0)
        following = 1
        for axis in axes:
            order = np.argsort(axis.tags, kind="stable")
            cuts = np.flatnonzero(np.diff(axis.tags[order])) + 1
            for part in np.split(self.find(axis.atoms)[order], cuts):
                roots = part[kinds[part] >= 0]
                old, new = np.unique(kinds[roots], return_inverse=True)
                kinds[roots] = following + new
                following += len(old)
        every = np.arange(self._count)
        kinds[self.find(every) != every] = -1
        return kinds

    def _reason(self, root: int, kinds: Ints, sizes: Ints) -> str:
        if kinds[root] < 0:
            return self._reasons[int(self._why[root])]
        return "" if sizes[kinds[root]] > 1 else "no other channel is used as each is"


def _positions(roots: Ints, tags: Ints, kinds: Ints) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The positions of each class that is not frozen in one row, for each of its tags, in the order of the roots."""
    keys = kinds[roots], tags
    order = np.lexsort((roots, keys[1], keys[0]))
    cuts = np.flatnonzero(np.diff(keys[0][order]) | np.diff(keys[1][order])) + 1
    for part in np.split(order, cuts):
        if part.size and kinds[roots[part[0]]] >= 0:
            yield int(kinds[roots[part[0]]]), tuple(part.tolist())
