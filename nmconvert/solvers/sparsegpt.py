"""Pruning one layer against its inputs: solvers on ``(W [rows, K], H [K, K])``, pure and in float64.

Every solver chooses an N:M mask, and the kept weights, to make the quadratic of :mod:`nmconvert.solvers.quadratic` small:

``sparsegpt``   groups from left to right; what a pruned weight leaves is carried to the columns on its right
                (Frantar and Alistarh 2023, algorithm 1).
``exact``       the same walk, but the set to prune in a group is the best of all C(m, n), by the exact error of pruning
                it jointly (Optimal Brain Compression, Frantar, Singh and Alistarh 2022, equation 5); then all kept weights
                of a row are solved for again in closed form.
``admm``        ``exact``, then the operator splitting of ALPS from there.
``auto``        row by row (rows are independent) the best of ``exact`` in both directions and ``admm``, then swaps
                within groups while they lower the error. Layers that are too large for swaps (384 × 384 at 2:4) do
                without them and without the second direction, which hardly add to ``admm``; those that are too large
                for it (1024 × 3072) do with ``exact``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from nmconvert.errors import check_choice
from nmconvert.masks import CALIBRATED_CRITERIA, magnitude, nm_mask
from nmconvert.pattern import Pattern
from nmconvert.solvers.alps import admm, swap, swap_rounds
from nmconvert.solvers.quadratic import Problem, Solution, best, resolve

Choose = Callable[[Tensor, Tensor, int], Tensor]

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "exact", "admm", "auto")

_MAX_SUBSETS = 2048  # beyond, a group's set is chosen greedily: 8:16 has 12,870 subsets, 16:32 has 601 million
_MAX_ENTRIES = 1 << 24  # float64 entries of a temporary: 128 MiB


def solve(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    *,
    method: str = "auto",
    cross: Tensor | None = None,
    damping: float = 0.01,
) -> Solution:
    """Prune ``weight`` [rows, K] to ``pattern`` by ``method``, one of ``METHODS``; any N:M, any K.

    Args:
        weight: the dense weight, any floating type.
        hessian: [K, K], the mean of x xᵀ over the inputs of the pruned model.
        pattern: what to keep.
        method: see the module docstring; ``magnitude``, ``wanda`` and ``ria`` leave the kept weights as they are.
        cross: [K, K], the mean of x_dense xᵀ; the Hessian where it is left out.
        damping: see :meth:`Problem.of`.

    Raises:
        UsageError: ``method`` is none of ``METHODS``.
    """
    check_choice("method", method, METHODS)
    problem = Problem.of(weight, hessian, cross, damping)
    if method in ("magnitude", *CALIBRATED_CRITERIA):
        dense = weight.detach().double()
        criterion = CALIBRATED_CRITERIA.get(method)
        mask = nm_mask(criterion(dense, problem.hessian) if criterion else magnitude(dense), pattern)
        solution = problem.solution(dense, mask)
    elif method == "sparsegpt":
        solution = sweep(problem, pattern, diagonal_choice)
    else:
        solution = resolve(problem, sweep(problem, pattern, exact_choice))
    if method in ("admm", "auto"):
        solution = best(solution, admm(problem, pattern, solution))
    if method == "auto" and swap_rounds(weight.shape[0], weight.shape[1], pattern):
        solution = best(solution, _backwards(problem, pattern))
        solution = swap(problem, pattern, solution)
    return solution


def sweep(problem: Problem, pattern: Pattern, choose: Choose, block: int = 128) -> Solution:
    """SparseGPT's walk over the groups of ``problem.optimum`` [rows, K], with ``choose`` deciding each group.

    ``choose`` is given a group's weights [rows, m] (the last group may be shorter), its part [m, m] of the upper Cholesky
    factor of the inverse Hessian, and n, and returns which to keep, bool [rows, m]. What a group leaves reaches the columns to
    its right at once within its ``block`` of so many columns, and beyond when that is done.
    """
    factor = torch.linalg.cholesky(problem.inverse, upper=True)
    weight = problem.optimum.clone()
    rows, columns = weight.shape
    mask = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    block = max(block // pattern.m, 1) * pattern.m
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = weight[:, start:stop].T.contiguous()  # transposed: what a step reads and writes is contiguous
        square = factor[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for low in range(0, stop - start, pattern.m):
            high = min(low + pattern.m, stop - start)
            keep = choose(part[low:high].T.contiguous(), square[low:high, low:high], pattern.n)
            mask[:, start + low : start + high] = keep
            for j in range(low, high):
                errors[j] = torch.where(keep[:, j - low], 0.0, part[j] / square[j, j])
                part[j:].addr_(square[j, j:], errors[j], alpha=-1)
        weight[:, start:stop] = part.T
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return problem.solution(weight, mask)


def diagonal_choice(weight: Tensor, factor: Tensor, n: int) -> Tensor:
    """SparseGPT's choice: keep the n highest w²/U_jj² of a group; ``weight`` [rows, m], ``factor`` [m, m] → [rows, m]."""
    return nm_mask((weight / factor.diagonal()).square(), Pattern(min(n, weight.shape[1]), weight.shape[1]))


def exact_choice(weight: Tensor, factor: Tensor, n: int) -> Tensor:
    """The n to keep for which pruning the others, jointly, costs least: w_P (A_PP)⁻¹ w_Pᵀ with A = UᵀU.

    ``weight`` [rows, m], ``factor`` U [m, m] → [rows, m]. All subsets are tried where there are at most 2048;
    else weights are pruned one at a time, each time the cheapest.
    """
    m = weight.shape[1]
    if n >= m:
        return torch.ones_like(weight, dtype=torch.bool)
    inverse = factor.T @ factor
    if comb(m, n) > _MAX_SUBSETS:
        return _greedy_choice(weight, inverse, n)
    pruned = _subsets(m, m - n).to(weight.device)  # [S, p]
    blocks = inverse[pruned[:, :, None], pruned[:, None, :]]  # [S, p, p]
    lower = torch.linalg.cholesky(torch.linalg.inv(blocks))
    step = max(1, _MAX_ENTRIES // pruned.numel())
    choice = [torch.einsum("rsp,spq->rsq", part[:, pruned], lower).square().sum(2).argmin(1) for part in weight.split(step)]
    mask = torch.ones_like(weight, dtype=torch.bool)
    return mask.scatter_(1, pruned[torch.cat(choice)], False)


@lru_cache
def _subsets(m: int, size: int) -> Tensor:
    return torch.tensor(list(combinations(range(m), size)), dtype=torch.long)


def _greedy_choice(weight: Tensor, inverse: Tensor, n: int) -> Tensor:
    rows, m = weight.shape
    w, a = weight.clone(), inverse.expand(rows, m, m).clone()
    mask = torch.ones(rows, m, dtype=torch.bool, device=weight.device)
    row = torch.arange(rows, device=weight.device)
    for _ in range(m - n):
        diagonal = a.diagonal(dim1=1, dim2=2)
        j = torch.where(mask, w.square() / diagonal, torch.inf).argmin(1)
        mask[row, j] = False
        column = a[row, :, j]
        w -= column * (w[row, j] / diagonal[row, j])[:, None]
        a -= column[:, :, None] * (column / diagonal[row, j][:, None])[:, None, :]
        a.diagonal(dim1=1, dim2=2).masked_fill_(~mask, 1.0)
    return mask


def _backwards(problem: Problem, pattern: Pattern) -> Solution:
    """``exact`` with the last group first; the columns of a group stay together."""
    columns = problem.hessian.shape[0]
    groups = torch.arange(columns, device=problem.hessian.device).split(pattern.m)
    tail = [groups[-1]] if columns % pattern.m else []  # a short group must stay at the end
    order = torch.cat([*reversed(groups[: len(groups) - len(tail)]), *tail])
    there = problem.reordered(order)
    back = order.argsort()
    solution = resolve(there, sweep(there, pattern, exact_choice))
    return Solution(solution.weight[:, back], solution.mask[:, back], solution.error, problem.signal())
