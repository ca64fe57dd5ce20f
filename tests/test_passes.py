"""What a step does to a weight and its mask: the native passes against torch's, bit for bit, and the memory that is lent."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, random_weight
from torch import Tensor, nn

from nmconvert.masks import as_integers, magnitude, native_passes, nm_mask, update_magnitude_mask
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Pattern
from nmconvert.srste import sparsify
from nmconvert.srste.passes import Spare, add_pruned, masked

FLOATS = st.sampled_from([torch.float32, torch.float64])
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-42, -3.5]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, but for the bits of NaN."""
    numbers = ~theirs.isnan()
    return torch.equal(ours.isnan(), ~numbers) and torch.equal(as_integers(ours)[numbers], as_integers(theirs)[numbers])


def special(seed: int, dtype: torch.dtype) -> Tensor:
    """A weight [24, 16, 3, 3] with zeros of both signs, NaN, infinities and a subnormal number in it, channels last."""
    weight = random_weight((24, 16, 3, 3), seed, dtype)
    weight.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)
    return weight.contiguous(memory_format=torch.channels_last)


@given(st.integers(0, 2**32), patterns(), st.integers(1, 40), st.integers(1, 9), st.integers(1, 80), FLOATS, st.booleans())
def test_a_renewed_mask_is_that_of_the_matrix(
    way: str, seed: int, pattern: Pattern, rows: int, groups: int, spacing: int, dtype: torch.dtype, last: bool
) -> None:
    """``spacing`` groups side by side in memory, from one on to more than are compared at once; or consecutive entries."""
    shape = (rows, groups * pattern.m, spacing)
    weight = random_weight(shape, seed, dtype, ties=bool(seed % 2))
    weight = weight.mT.contiguous().mT if last else weight
    view = MatrixView.of("conv", shape, "channel")
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(random_weight(shape, seed + 1) > 0)
    before = mask.clone()
    assert (native_passes(weight, mask) is not None) == (way == "native")
    flips = update_magnitude_mask(mask, weight, view, pattern)
    expected = view.from_matrix(nm_mask(magnitude(view.to_matrix(weight)), pattern))
    assert torch.equal(mask, expected)
    assert int(flips) == int((before ^ expected).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_masked_weight_is_its_product_with_the_mask(way: str, dtype: torch.dtype) -> None:
    weight = special(0, dtype)
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(random_weight(weight.shape, 1) > 0)
    product = masked(weight, mask, Spare())
    assert same(product, weight * mask)
    assert product.stride() == weight.stride()


@pytest.mark.parametrize("factor", [0.1, -3.7e-5, torch.tensor(0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_added_of_pruned_weights(way: str, dtype: torch.dtype, factor: float | Tensor) -> None:
    weight, total = special(0, dtype), special(1, dtype).roll(5, 0)
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(random_weight(weight.shape, 1) > 0)
    expected, shrunk = total + (weight * factor) * ~mask, weight + (weight * factor) * ~mask
    version = weight._version
    add_pruned(total, weight, mask, factor)
    add_pruned(weight, weight, mask, factor)
    assert same(total, expected)
    assert same(weight, shrunk)
    assert weight._version > version  # or autograd would use what is no longer there


def test_tensors_that_lie_differently_are_left_to_torch() -> None:
    weight = special(0, torch.float32)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    assert native_passes(weight, mask) is None
    assert same(masked(weight, mask, Spare()), weight * mask)


def test_memory_is_lent_again_when_nothing_holds_it() -> None:
    spare, weight = Spare(), torch.ones(256, 256)
    first = spare.empty_like(weight)
    second = spare.empty_like(weight)
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2
    kept = second.view(-1)[3:]
    del first, second
    gc.collect()
    third, fourth = spare.empty_like(weight), spare.empty_like(weight)
    assert third.data_ptr() in addresses
    assert kept.data_ptr() - 12 in addresses - {third.data_ptr()}
    assert fourth.data_ptr() not in addresses
    converted = spare.empty_like(weight.double())
    assert converted.dtype == torch.float64
    assert converted.shape == weight.shape
    assert not copy.deepcopy(spare)._free
    assert not pickle.loads(pickle.dumps(spare))._free


def test_a_graph_keeps_the_product_that_it_was_made_of() -> None:
    """Two graphs at once, and a weight that is changed in between: each has its own product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    sparsify(model, "2:4", include=["*"])
    x = torch.randn(3, 256, requires_grad=True)
    before = model[0].weight.detach().clone()
    first = model(x).sum()
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)
    second = model(x).sum()
    (grad,) = torch.autograd.grad(first, x)
    torch.testing.assert_close(grad, before.sum(0).expand(3, 256))
    (grad,) = torch.autograd.grad(second, x)
    torch.testing.assert_close(grad, 2 * before.sum(0).expand(3, 256))
