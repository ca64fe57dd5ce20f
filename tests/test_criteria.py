"""wanda and ria against their formulas, written as loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmconvert.masks import magnitude, nm_mask, ria, wanda
from nmconvert.pattern import Pattern


def random_problem(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(columns, generator=generator)
    inputs = torch.randn(50, columns, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_scores_are_what_the_papers_say(rows, columns, seed):
    weight, inputs = random_problem(rows, columns, seed)
    hessian = inputs.T @ inputs / len(inputs)
    norm = inputs.square().mean(0).sqrt()
    w = weight.abs()
    for i in range(rows):
        for j in range(columns):
            torch.testing.assert_close(wanda(weight, hessian)[i, j], w[i, j] * norm[j])
            relative = w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()
            torch.testing.assert_close(ria(weight, hessian)[i, j], relative * norm[j] ** 0.5)


def test_the_inputs_decide_where_magnitudes_are_equal():
    weight, hessian = torch.ones(1, 4), torch.diag(torch.tensor([1.0, 4.0, 9.0, 2.0]))
    for criterion in (wanda, ria):
        assert nm_mask(criterion(weight, hessian), Pattern(2, 4)).tolist() == [[False, True, True, False]]
    assert nm_mask(magnitude(weight), Pattern(2, 4)).tolist() == [[True, True, False, False]]


def test_a_column_of_zeros_scores_zero_and_not_nan():
    weight = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert ria(weight, torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert ria(weight, torch.eye(2))[:, 0].tolist() == [0.0, 0.0]
