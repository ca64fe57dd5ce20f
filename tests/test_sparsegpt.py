"""The solvers against brute force and against plain reference code, in float64."""

from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmconvert.errors import UsageError, WeightError
from nmconvert.pattern import Pattern
from nmconvert.solvers.alps import admm, swap
from nmconvert.solvers.quadratic import Problem, best, resolve
from nmconvert.solvers.quadratic import _conjugate_gradients as conjugate_gradients
from nmconvert.solvers.sparsegpt import METHODS, _greedy_choice, diagonal_choice, exact_choice, solve, sweep


def moments(columns, seed, mix=0.5):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4 * columns + 8, columns, generator=generator, dtype=torch.float64)
    blend = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = base @ (mix * blend + torch.eye(columns)) * (0.2 + torch.rand(columns, generator=generator))
    weight = torch.randn(7, columns, generator=generator, dtype=torch.float64)
    return weight, x


def gram(x):
    return x.T @ x / len(x)


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 37),
    numbers=st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 9),
)
def test_every_method_gives_the_pattern_for_any_shape(columns, numbers, method, seed):
    pattern = Pattern(*numbers)
    weight, x = moments(columns, seed)
    solution = solve(weight.float(), gram(x), pattern, method=method)
    assert solution.weight.shape == weight.shape
    assert solution.weight.dtype == torch.float64
    assert not solution.weight[~solution.mask].any()
    for start in range(0, columns, pattern.m):
        group = solution.mask[:, start : start + pattern.m]
        assert (group.sum(1) == min(pattern.n, group.shape[1])).all()
    problem = Problem.of(weight.float(), gram(x))
    torch.testing.assert_close(solution.error, problem.error(solution.weight))


def reference_sparsegpt(weight, hessian, n, m, damping=0.01):
    """Algorithm 1 of the paper, unblocked, one column at a time, as its authors' code does it."""
    w, h = weight.clone(), hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % m == 0:
            saliency = w[:, j : j + m] ** 2 / upper.diagonal()[j : j + m] ** 2
            size = saliency.shape[1]
            pruned[:, j : j + m].scatter_(1, saliency.topk(max(size - n, 0), largest=False).indices, True)
        q = torch.where(pruned[:, j], 0.0, w[:, j])
        w[:, j:] -= ((w[:, j] - q) / upper[j, j])[:, None] * upper[j, j:]
        w[:, j] = q
    return w


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 300), (1, 4, 64), (4, 8, 130), (2, 8, 27), (8, 16, 50)])
def test_sparsegpt_is_the_published_algorithm(n, m, columns):
    weight, x = moments(columns, 1)
    ours = solve(weight, gram(x), Pattern(n, m), method="sparsegpt")
    torch.testing.assert_close(ours.weight, reference_sparsegpt(weight, gram(x), n, m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (1, 3)])
def test_the_exact_choice_is_the_best_subset(n, m):
    weight, x = moments(m, 2)
    problem = Problem.of(weight, gram(x))
    factor = torch.linalg.cholesky(problem.inverse, upper=True)
    chosen = exact_choice(weight, factor, n)
    for row in range(len(weight)):
        costs = {}
        for kept in combinations(range(m), n):
            mask = torch.zeros(m, dtype=torch.bool)
            mask[list(kept)] = True
            v = torch.zeros(m, dtype=torch.float64)
            v[mask] = torch.linalg.solve(problem.hessian[mask][:, mask], (weight[row] @ problem.hessian)[mask])
            gap = v - weight[row]
            costs[kept] = float(gap @ problem.hessian @ gap)
        assert tuple(chosen[row].nonzero()[:, 0].tolist()) == min(costs, key=costs.get)


def test_a_group_with_too_many_subsets_is_chosen_greedily_and_well():
    weight, x = moments(6, 3)
    problem = Problem.of(weight, gram(x))
    factor = torch.linalg.cholesky(problem.inverse, upper=True)
    exact, greedy = exact_choice(weight, factor, 3), _greedy_choice(weight, problem.inverse, 3)
    diagonal = diagonal_choice(weight, factor, 3)
    errors = [resolve(problem, problem.solution(weight, mask)).error.sum() for mask in (exact, greedy, diagonal)]
    assert (greedy.sum(1) == 3).all()
    assert errors[0] <= errors[1] <= errors[2]


@settings(max_examples=15, deadline=None)
@given(columns=st.integers(2, 20), seed=st.integers(0, 50))
def test_the_re_solve_has_no_gradient_left(columns, seed):
    weight, x = moments(columns, seed)
    problem = Problem.of(weight, gram(x))
    solution = resolve(problem, solve(weight, gram(x), Pattern(2, 4), method="magnitude"))
    gradient = (solution.weight - problem.optimum) @ problem.hessian
    assert gradient[solution.mask].abs().max() < 1e-9


def test_conjugate_gradients_reach_the_closed_form():
    weight, x = moments(60, 4)
    problem = Problem.of(weight, gram(x))
    start = solve(weight, gram(x), Pattern(2, 4), method="sparsegpt")
    direct, iterated = resolve(problem, start), conjugate_gradients(problem, start, steps=80, tolerance=1e-20)
    torch.testing.assert_close(direct.weight, iterated.weight, rtol=1e-6, atol=1e-8)


def test_the_dense_outputs_are_the_target():
    weight, dense = moments(24, 5)
    x = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian, cross = gram(x), dense.T @ x / len(x)
    target = dense @ weight.T
    aware = solve(weight, hessian, Pattern(2, 4), method="exact", cross=cross, damping=1e-9)
    blind = solve(weight, hessian, Pattern(2, 4), method="exact", damping=1e-9)
    error = [float((x @ s.weight.T - target).square().mean()) for s in (aware, blind)]
    assert error[0] < error[1]
    nothing_pruned = solve(weight, hessian, Pattern(4, 4), method="exact", cross=cross, damping=1e-9)
    expected = torch.linalg.lstsq(x, target).solution.T
    torch.testing.assert_close(nothing_pruned.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(3, 7)], ids=str)
def test_each_step_beyond_sparsegpt_lowers_the_error_of_every_row(pattern):
    weight, x = moments(61, 6)
    problem = Problem.of(weight, gram(x))
    walked = sweep(problem, pattern, exact_choice)
    solved = resolve(problem, walked)
    split = admm(problem, pattern, solved)
    swapped = swap(problem, pattern, split)
    errors = [s.error for s in (walked, solved, split, swapped)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[2].sum() < 0.95 * errors[1].sum()
    plain = solve(weight, gram(x), pattern, method="sparsegpt").error.sum()
    assert solve(weight, gram(x), pattern).error.sum() < 0.85 * plain


def test_swaps_find_the_optimum_of_a_small_row():
    weight, x = moments(8, 7, mix=2.0)
    problem, pattern = Problem.of(weight, gram(x)), Pattern(2, 4)
    found = solve(weight, gram(x), pattern)
    groups = list(combinations(range(4), 2))
    tried = []
    for first, second in product(groups, groups):
        mask = torch.zeros(len(weight), 8, dtype=torch.bool)
        mask[:, [*first, *(4 + s for s in second)]] = True
        tried.append(resolve(problem, problem.solution(weight, mask)))
    optimum = best(*tried)
    assert (found.error <= optimum.error * 1.1 + 1e-12).all()
    assert torch.isclose(found.error, optimum.error).float().mean() > 0.7


def test_dead_and_duplicate_inputs_are_no_special_case():
    weight, x = moments(12, 8)
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    for hessian in (gram(x), torch.zeros(12, 12)):
        for method in METHODS:
            solution = solve(weight, hessian, Pattern(2, 4), method=method, damping=0.0)
            assert solution.weight.isfinite().all()


def test_a_method_that_is_none_is_named():
    weight, x = moments(8, 9)
    with pytest.raises(UsageError, match="method 'sparsgpt' is none of magnitude, wanda, ria, sparsegpt, exact, admm, auto"):
        solve(weight, gram(x), Pattern(2, 4), method="sparsgpt")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["magnitude", "auto"])
def test_what_is_not_finite_is_refused(number, method):
    weight, x = moments(8, 0)
    for one, other in ((weight.index_fill(1, torch.tensor(3), number), x), (weight, x.index_fill(1, torch.tensor(3), number))):
        with pytest.raises(WeightError, match="NaN or infinite"):
            solve(one, gram(other), Pattern(2, 4), method=method)


def test_the_same_call_gives_the_same_bytes():
    weight, x = moments(40, 9)
    assert torch.equal(solve(weight, gram(x), Pattern(2, 4)).weight, solve(weight, gram(x), Pattern(2, 4)).weight)
