from __future__ import annotations

import contextlib
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAY_TYPES, patterns, sparse_matrix

from nmconvert.errors import WeightError
from nmconvert.packing import coding_for, dequantize, kept_positions, pack, quantize, unpack
from nmconvert.pattern import Pattern


@given(patterns(), st.integers(1, 9), st.integers(1, 100), st.sampled_from(ARRAY_TYPES), st.integers(0, 2**32))
def test_pack_then_unpack_is_the_identity(pattern: Pattern, rows: int, columns: int, dtype: Any, seed: int) -> None:
    matrix = sparse_matrix(rows, columns, pattern, seed, dtype)
    packed = pack(matrix, pattern)
    assert len(packed.values) == rows * pattern.kept(columns)
    assert packed.values.dtype == matrix.dtype
    again = unpack(packed.values, packed.mask, packed.coding.table, packed.coding.parts, rows, columns)
    assert again.dtype == matrix.dtype
    assert again.tobytes() == np.where(matrix == 0, 0, matrix).astype(dtype).tobytes()


@given(patterns(), st.integers(1, 300))
def test_never_more_than_a_bit_for_each_weight(pattern: Pattern, groups: int) -> None:
    columns = groups * pattern.m
    coding = coding_for(pattern, columns)
    bits = 8 * coding.code_count(columns)
    assert bits < columns + 8
    assert coding.parts * 8 / coding.width <= 1
    assert coding.table.max() == 1
    bound = np.log2(comb(pattern.m, pattern.n)) * groups  # no code can take less
    assert bits >= bound - 1e-6


@pytest.mark.parametrize(
    ("pattern", "dtype", "share"),
    [("2:4", np.float32, 0.532), ("1:4", np.float32, 0.282), ("2:4", np.float16, 0.563), ("1:16", np.float32, 0.0706)],
)
def test_sizes(pattern: str, dtype: Any, share: float) -> None:
    matrix = sparse_matrix(64, 144, Pattern.parse(pattern), 0, dtype)
    assert pack(matrix, Pattern.parse(pattern)).nbytes <= share * matrix.nbytes


@pytest.mark.parametrize(
    ("pattern", "columns", "name"),
    [
        ("2:4", 8, "combination"),
        ("2:4", 9, "bitmask"),
        ("1:32", 64, "combination"),
        ("2:32", 64, "position"),
        ("4:8", 64, "bitmask"),
    ],
)
def test_the_coding_that_is_chosen(pattern: str, columns: int, name: str) -> None:
    assert coding_for(Pattern.parse(pattern), columns).name == name


def test_the_format_byte_for_byte() -> None:
    """What the docstring says, on one example a coding: readers in other languages rely on it."""
    two_of_four = pack(np.array([[0, 5, 0, 7, 1, 2, 0, 0]], np.float32), Pattern(2, 4))
    assert two_of_four.values.tolist() == [5, 7, 1, 2]
    # Masks in ascending order of their bits: 0011 0101 0110 1001 1010 1100, three groups a byte. Kept {1,3} is 1010, digit 4;
    # {0,1} is digit 0, and so is the padding.
    assert two_of_four.mask.tolist() == [4 * 36 + 0 * 6 + 0]
    with_tail = pack(np.array([[0, 5, 0, 7, 1]], np.float32), Pattern(2, 4))
    assert with_tail.values.tolist() == [5, 7, 1]
    assert with_tail.mask.tolist() == [0b11010]
    positions = np.zeros((1, 32), np.float32)
    positions[0, [3, 30]] = 1
    assert pack(positions, Pattern(2, 32)).mask.tolist() == [3, 30]


def test_groups_with_too_few_nonzeros_keep_their_first_zeros() -> None:
    keep = kept_positions(np.array([[0, 0, 0, 9, 0, 0]], np.float32), Pattern(2, 4))
    assert keep.astype(int).tolist() == [[1, 0, 0, 1, 1, 1]]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(WeightError, match=r"is not 2:4: group 1 has 3 nonzero weights, more than 2"):
        pack(np.array([[1, 1, 0, 0, 1, 1, 1, 0]], np.float32), Pattern(2, 4))
    for bad in (np.nan, np.inf):
        with pytest.raises(WeightError, match="NaN or infinite"):
            pack(np.array([[bad, 0, 0, 0]], np.float32), Pattern(2, 4))


@given(patterns(dense=False), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32), st.data())
def test_damage_is_an_error_or_another_matrix(
    pattern: Pattern, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    matrix = sparse_matrix(rows, columns, pattern, seed)
    packed = pack(matrix, pattern)
    mask = packed.mask.copy()
    position, bit = data.draw(st.integers(0, len(mask) - 1)), data.draw(st.integers(0, 7))
    mask[position] ^= 1 << bit
    table, parts = packed.coding.table, packed.coding.parts
    with contextlib.suppress(WeightError):  # where it unpacks, it is another matrix, or the bit was padding
        found = unpack(packed.values, mask, table, parts, rows, columns)
        assert sorted(found[found != 0]) == sorted(matrix[matrix != 0])
    for wrong in (packed.values[:-1], np.append(packed.values, np.float32(1))):
        with pytest.raises(WeightError, match="damaged"):
            unpack(wrong, packed.mask, table, parts, rows, columns)
    for short in (packed.mask[:-1], np.append(packed.mask, packed.mask[:1])):
        with pytest.raises(WeightError, match="damaged"):
            unpack(packed.values, short, table, parts, rows, columns)


@pytest.mark.parametrize("table", [np.zeros((0, 4), np.uint8), np.full((2, 4), 2, np.uint8), np.zeros(8, np.uint8)])
def test_a_damaged_table(table: Any) -> None:
    with pytest.raises(WeightError, match="mask table"):
        unpack(np.ones(2, np.float32), np.zeros(1, np.uint8), table, 1, 1, 4)


@given(
    st.integers(1, 6), st.integers(1, 40), st.sampled_from([1e-44, 1e-41, 1e-38, 1e-36, 1e-3, 1.0, 1e38]), st.integers(0, 2**32)
)
def test_int8_with_a_scale_is_the_nearest_and_exact(rows: int, columns: int, size: float, seed: int) -> None:
    matrix = (np.random.default_rng(seed).standard_normal((rows, columns)).clip(-3, 3) * size).astype(np.float32)
    integers, scale = quantize(matrix)
    rounded = dequantize(integers, scale)
    exact = integers.astype(np.float64) * scale[:, None].astype(np.float64)
    np.testing.assert_array_equal(rounded, exact)  # the product in float32 rounds nothing
    assert (np.abs(exact - matrix) <= 0.5 * scale[:, None].astype(np.float64) * (1 + 1e-12)).all()
    largest = np.abs(matrix).max(axis=1).astype(np.float64)
    assert (scale <= np.where(largest > 2.0**-127, np.maximum(largest / 127 * (1 + 2.0**-16), 2.0**-126), 1)).all()
    again, same = quantize(rounded)
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_array_equal(same, scale)


def test_rows_of_zeros_and_of_one_huge_value() -> None:
    integers, scale = quantize(np.array([[0, -0.0, 0], [1, 3e38, -1]], np.float32))
    assert integers.tolist() == [[0, 0, 0], [0, 127, 0]]
    assert scale[0] == 1
    np.testing.assert_allclose(dequantize(integers, scale)[1], [0, 3e38, 0], rtol=1e-5)


def test_packed_as_int8_takes_a_quarter() -> None:
    matrix = sparse_matrix(64, 1152, Pattern(2, 4), 0)
    rounded = dequantize(*quantize(matrix))
    packed = pack(rounded, Pattern(2, 4)).quantized()
    assert packed.scale is not None
    assert packed.nbytes <= 0.15 * matrix.nbytes  # half of the values in a quarter of their bytes, and the mask
    again = unpack(packed.values, packed.mask, packed.coding.table, packed.coding.parts, 64, 1152, packed.scale)
    assert again.tobytes() == rounded.tobytes()


@pytest.mark.parametrize(
    ("scale", "says"),
    [(np.ones(3), r"2 rows have a scale of shape \[3\]"), (np.ones((2, 1)), "2 rows have"), (np.array(1.0), "2 rows have")]
    + [(np.array([1.0, bad]), "a row's scale is not a positive number") for bad in (0.0, -1.0, np.nan, np.inf)],
)
def test_a_scale_that_is_none(scale: Any, says: str) -> None:
    packed = pack(sparse_matrix(2, 8, Pattern(2, 4), 0), Pattern(2, 4)).quantized()
    with pytest.raises(WeightError, match=says):
        unpack(packed.values, packed.mask, packed.coding.table, packed.coding.parts, 2, 8, scale.astype(np.float32))
