"""Better masks from good ones: operator splitting over all groups at once, and exact swaps within a group.

Both start from a solution of :mod:`nmconvert.solvers.sparsegpt` and return one that is at least as good. They are the only
solvers here that go back to a group once it was decided.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nmconvert.masks import nm_mask
from nmconvert.pattern import Pattern
from nmconvert.solvers.quadratic import Problem, Solution, best, resolve

_ADMM_COLUMNS = 2048  # the eigendecomposition takes about 10 s here, and a minute at 4096
_ADMM_FLOPS = 1.5e11  # for all steps of one layer: about 5 s on one core
_ADMM_STEPS = 10  # fewer are worse than none
_MAX_ENTRIES = 1 << 24  # float64 entries of a temporary: 128 MiB
_SWAP_FLOPS = 1e10  # for all rounds of one layer: about 1 s on one core


def admm(problem: Problem, pattern: Pattern, start: Solution, steps: int = 60) -> Solution:
    """ALPS (Meng et al. 2024, section 3.1) from ``start``: row by row no worse than it.

    Minimises the quadratic over V subject to V = D with D in the N:M set, the penalty ρ growing from 0.03 to 30 (in
    units where the Hessian's diagonal is one); D's mask is solved again in closed form at the end. One
    eigendecomposition, then two products [rows, K] × [K, K] a step. There are fewer steps where these would take more
    than about 5 s; layers of more than 2048 columns, and those with time for less than 10 steps, are left alone.
    """
    rows, columns = start.weight.shape
    steps = min(steps, int(_ADMM_FLOPS / (4 * rows * columns**2)))
    if columns > _ADMM_COLUMNS or steps < _ADMM_STEPS or pattern.is_dense:
        return start
    scale = problem.hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(problem.hessian / scale / scale[:, None])
    moment = problem.moment / scale
    split = start.weight * scale
    ratio = 1000 ** (1 / max(steps - 1, 1))
    rho = 0.03
    dual = (moment - ((split @ vectors) * values) @ vectors.T) / rho
    mask = start.mask
    for _ in range(steps):
        weight = ((moment + rho * (split - dual)) @ vectors / (values + rho)) @ vectors.T
        mask = nm_mask((weight + dual).abs(), pattern)
        split = torch.where(mask, weight + dual, 0.0)
        dual = (dual + weight - split) / ratio
        rho *= ratio
    return best(start, resolve(problem, problem.solution(split / scale, mask)))


def swap(problem: Problem, pattern: Pattern, start: Solution, rounds: int = 20) -> Solution:
    """Exchange a kept weight for a pruned one of its group while that lowers the error of the re-solved row.

    The change of the error is exact for one swap (two rank-one updates of (H_SS)⁻¹); many groups swap at once, so each
    round is solved again, and a row that got worse is taken back and tries fewer groups in the next. Rounds stop at
    about 1 s a layer; a layer too wide for one round is left alone.
    """
    rows, columns = start.weight.shape
    rounds = min(rounds, swap_rounds(rows, columns, pattern))
    if rounds < 1 or pattern.is_dense or columns <= pattern.n:
        return start
    step = max(1, _MAX_ENTRIES // (columns * pattern.kept(columns)))
    parts = [_swap_rows(_rows(problem, low, step), pattern, start, low, rounds) for low in range(0, rows, step)]
    weight, mask, error = (torch.cat(tensors) for tensors in zip(*((p.weight, p.mask, p.error) for p in parts), strict=True))
    return Solution(weight, mask, error, start.signal)


def swap_rounds(rows: int, columns: int, pattern: Pattern) -> int:
    """How many rounds of :func:`swap` there is time for on a layer of this size."""
    return int(_SWAP_FLOPS / (rows * columns**2 * pattern.kept(columns) + 1))


def _rows(problem: Problem, low: int, step: int) -> Problem:
    return replace(problem, moment=problem.moment[low : low + step], optimum=problem.optimum[low : low + step])


def _swap_rows(problem: Problem, pattern: Pattern, start: Solution, low: int, rounds: int) -> Solution:
    part = slice(low, low + len(problem.moment))
    current = resolve(problem, Solution(start.weight[part], start.mask[part], start.error[part], start.signal))
    share = torch.full_like(current.error, 0.5)
    for _ in range(rounds):
        change, swapped = _best_swaps(problem, pattern, current)
        promising = change < -1e-9 * current.error[:, None]
        rank = change.argsort(1).argsort(1)
        taken = promising & (rank <= (promising.sum(1) * share)[:, None])
        if not bool(taken.any()):
            break
        mask = current.mask.clone()
        row, group = taken.nonzero(as_tuple=True)
        mask[row, swapped[row, group, 0]] = False
        mask[row, swapped[row, group, 1]] = True
        trial = resolve(problem, problem.solution(current.weight, mask))
        share = torch.where(trial.error < current.error, share, share / 3)
        current = best(current, trial)
    return current


def _best_swaps(problem: Problem, pattern: Pattern, current: Solution) -> tuple[Tensor, Tensor]:
    """For each row and group the best swap: its change of the error [R, G], and the columns (out, in) [R, G, 2]."""
    rows, columns = current.weight.shape
    n, m = pattern.n, pattern.m
    h, kept = problem.hessian, current.mask.nonzero()[:, 1].reshape(rows, -1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[kept[:, :, None], kept[:, None, :]]))
    spread = inverse @ h[kept]  # (H_SS)⁻¹ H_S: [R, s, K]
    schur = h.diagonal() - (h[kept] * spread).sum(1)  # of adding each column
    gradient = problem.moment - current.weight @ h
    if 0 < columns % m <= n:  # a short group that keeps everything
        kept = kept[:, : columns // m * n]
    size = kept.shape[1]
    member = (kept // m * m)[:, :, None] + torch.arange(m, device=h.device)  # [R, s, m]: the group of each kept column
    exists = member < columns
    member = member.clamp_max(columns - 1)
    flat = member.reshape(rows, -1)
    mixed = torch.gather(spread[:, :size], 2, member)
    room = torch.gather(schur, 1, flat).reshape(member.shape).clamp_min(1e-300)
    step = torch.gather(gradient, 1, flat).reshape(member.shape)
    weight = torch.gather(current.weight, 1, kept)[:, :, None]
    own = inverse.diagonal(dim1=1, dim2=2)[:, :size, None]
    change = (weight - step / room * mixed).square() / (own + mixed.square() / room) - step.square() / room
    allowed = exists & ~torch.gather(current.mask, 1, flat).reshape(member.shape)
    change, choice = torch.where(allowed, change, torch.inf).reshape(rows, -1, n * m).min(2)
    out = torch.gather(kept.reshape(rows, -1, n), 2, (choice // m)[:, :, None])
    into = torch.gather(member.reshape(rows, -1, n * m), 2, choice[:, :, None])
    return change, torch.cat([out, into], 2)
