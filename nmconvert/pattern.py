"""The N:M pattern: *n* weights are **kept** in every group of *m* consecutive ones.

This module is the only one that knows what "2:4" means. Some tools count the weights that are *zeroed* instead (wanda,
sparsegpt, llm-compressor); with 2:4 the two agree, with 1:4 they do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from nmconvert.errors import PatternError

Axis = Literal["channel", "kernel"]
"""The grouped axis: input channels at one kernel position, or the flattened I·kh·kw of each filter."""

AXES: tuple[Axis, ...] = get_args(Axis)
MAX_M = 32


@dataclass(frozen=True, order=True)
class Pattern:
    """N:M sparsity: ``n`` of every ``m`` consecutive weights are kept, 1 ≤ n ≤ m ≤ 32.

    Raises:
        PatternError: the numbers are out of range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= MAX_M:
            raise PatternError(
                f"pattern {self.n}:{self.m} is out of range: N:M keeps N of every M weights, with 1 <= N <= M <= {MAX_M}"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``"2:4"`` (or return a pattern as it is).

        Raises:
            PatternError: ``text`` is not of the form N:M, or out of range.
        """
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text)
        if match is None:
            raise PatternError(f"'{text}' is not an N:M pattern: write how many are kept of how many, for example 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of weights kept in a whole group, n/m."""
        return self.n / self.m

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned (n = m)."""
        return self.n == self.m

    def kept(self, columns: int) -> int:
        """Weights kept in a row of ``columns`` entries; the last, short group keeps min(n, its length)."""
        groups, tail = divmod(columns, self.m)
        return groups * self.n + min(self.n, tail)
