from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns

from nmconvert.errors import PatternError
from nmconvert.pattern import MAX_M, Pattern


@given(patterns())
def test_text_round_trip(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(f"  {pattern.n} : {pattern.m} ") == pattern
    assert Pattern.parse(pattern) is pattern


@given(patterns(), st.integers(0, 200))
def test_kept_counts_the_short_last_group(pattern: Pattern, columns: int) -> None:
    by_group = [min(pattern.n, min(pattern.m, columns - start)) for start in range(0, columns, pattern.m)]
    assert pattern.kept(columns) == sum(by_group)


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2/4", "2:4:8", "a:b", "-1:4", "2.0:4", "99999:4", "２:４x"])
def test_what_is_no_pattern_is_named(text: str) -> None:
    with pytest.raises(PatternError, match="is not an N:M pattern: write how many are kept of how many, for example 2:4"):
        Pattern.parse(text)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, MAX_M + 1), (33, 33), (0, 0)])
def test_out_of_range(n: int, m: int) -> None:
    with pytest.raises(PatternError, match=f"pattern {n}:{m} is out of range"):
        Pattern(n, m)


def test_density_and_dense() -> None:
    assert Pattern(1, 4).density == 0.25
    assert Pattern(4, 4).is_dense
    assert not Pattern(3, 4).is_dense
