from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAY_TYPES, naive_mask, patterns, sparse_matrix

from nmconvert.arrays import as_array, digest
from nmconvert.detect import most_in_a_group, satisfies, tightest
from nmconvert.pattern import Pattern


@given(patterns(), st.integers(1, 6), st.integers(1, 70), st.integers(0, 2**16))
def test_most_in_a_group_is_a_count(pattern: Pattern, rows: int, columns: int, seed: int) -> None:
    nonzero = sparse_matrix(rows, columns, pattern, seed) != 0
    naive = max(int(nonzero[r, c : c + pattern.m].sum()) for r in range(rows) for c in range(0, columns, pattern.m))
    assert most_in_a_group(nonzero, pattern.m) == naive
    assert satisfies(nonzero, pattern)
    if naive > 1:
        assert not satisfies(nonzero, Pattern(naive - 1, pattern.m))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "1:16", "2:16", "1:32", "5:7"])
def test_the_tightest_is_the_one_it_was_pruned_to(pattern: str) -> None:

    matrix = naive_mask(np.random.default_rng(0).random((64, 224)), Pattern.parse(pattern))
    assert str(tightest(matrix)) == pattern


def test_dense_and_empty_matrices_have_none() -> None:
    assert tightest(np.ones((4, 8))) is None
    assert tightest(np.zeros((0, 8))) is None
    assert tightest(np.ones((8, 1))) is None
    assert tightest(np.zeros((8, 64))) == Pattern(1, 32)
    assert tightest(np.zeros((8, 4))) == Pattern(1, 4)  # never more than there is


@given(patterns(dense=False), st.integers(2, 6), st.integers(2, 70), st.integers(0, 2**16))
def test_what_is_found_holds_and_nothing_is_sparser(pattern: Pattern, rows: int, columns: int, seed: int) -> None:
    matrix = sparse_matrix(rows, columns, pattern, seed)
    found = tightest(matrix)
    if found is None:
        assert (
            (matrix != 0).mean() > 31 / 32
            or columns < 2
            or not any(satisfies(matrix, Pattern(m - 1, m)) for m in range(2, min(32, columns) + 1))
        )
        return
    assert satisfies(matrix, found)
    assert found.density <= pattern.density or columns < pattern.m


@pytest.mark.parametrize("dtype", ARRAY_TYPES)
def test_digest_is_sha256_of_the_little_endian_bytes(dtype: Any) -> None:
    weight = np.array([[1.5, -2], [0, 3]]).astype(dtype)
    assert digest(weight) == hashlib.sha256(weight.tobytes()).hexdigest()
    assert digest(weight.T) == hashlib.sha256(np.ascontiguousarray(weight.T).tobytes()).hexdigest()
    negative = weight.copy()
    negative[1, 0] = -0.0
    assert digest(negative) == digest(weight)
    negative[1, 0] = 1
    assert digest(negative) != digest(weight)


def test_digest_of_big_endian_arrays() -> None:
    weight = np.array([[1.5, -2, 0]], np.float32)
    assert digest(weight.astype(">f4")) == digest(weight)


def test_bfloat16_tensors_become_arrays() -> None:
    tensor = torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.bfloat16)
    assert as_array(tensor.T).tolist() == tensor.T.float().tolist()
    assert as_array(tensor).dtype.name == "bfloat16"
