"""The quadratic that pruning one layer minimises, and the kept weights that minimise it for a given mask.

The layer computes W x. With H = E[x xᵀ] over the inputs that the layer will really get, and C = E[x_dense xᵀ] where
x_dense is what it got in the dense model (C = H where the two agree), the squared error E‖V x − W x_dense‖² of new
weights V is, up to a constant, (V − V*) H (V − V*)ᵀ around V* = W C H⁻¹. Everything is [rows, K] and float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmconvert.errors import WeightError

_MAX_ENTRIES = 1 << 24  # float64 entries of a temporary: 128 MiB
_DIRECT_FLOPS = 2e9  # a closed-form solve up to here (under 1 s on one core); conjugate gradients beyond
_CONJUGATE_FLOPS = 5e11  # for all steps of one layer: about 10 s on one core


@dataclass(frozen=True)
class Solution:
    """A pruned layer: ``weight`` [rows, K] (float64, zero where not kept), ``mask`` [rows, K] bool, ``error`` [rows].

    ``error`` is the quadratic of the module docstring, per row; ``signal`` what it would be for all-zero weights, summed.
    """

    weight: Tensor
    mask: Tensor
    error: Tensor
    signal: float


@dataclass(frozen=True)
class Problem:
    """The quadratic (V − optimum) hessian (V − optimum)ᵀ, with ``moment`` = optimum · hessian; all float64."""

    hessian: Tensor  # [K, K], positive definite
    moment: Tensor  # [rows, K]
    optimum: Tensor  # [rows, K]
    inverse: Tensor  # [K, K], of the Hessian

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, cross: Tensor | None = None, damping: float = 0.01) -> Problem:
        """The problem of ``weight`` [rows, K] with input moments ``hessian`` and ``cross`` (default: the Hessian) [K, K].

        ``damping`` times the mean of the Hessian's diagonal pulls towards the dense weight; it grows tenfold until the
        Cholesky decomposition succeeds, so that dead and duplicate inputs need no special case.

        Raises:
            WeightError: the weight or a moment is NaN or infinite: no ridge would make that positive definite.
        """
        dense, h = weight.detach().double(), hessian.double()
        moment = dense @ (h if cross is None else cross.double())
        if not (h.isfinite().all() and moment.isfinite().all()):
            raise WeightError("the weight or its inputs hold NaN or infinite values: it cannot be solved")
        scale = float(h.diagonal().mean())
        ridge = max(damping, 1e-12) * (scale if scale > 0 else 1.0)
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        while True:
            factor, failed = torch.linalg.cholesky_ex(h + ridge * eye)
            if not failed:
                break
            ridge *= 10
        moment = moment + ridge * dense
        return cls(h + ridge * eye, moment, torch.cholesky_solve(moment.T, factor).T, torch.cholesky_inverse(factor))

    def error(self, weight: Tensor) -> Tensor:
        """The quadratic for ``weight`` [rows, K]: [rows]."""
        gap = weight - self.optimum
        return ((gap @ self.hessian) * gap).sum(1).clamp_min(0)

    def signal(self) -> float:
        """The quadratic of an all-zero weight, summed: what errors are measured against."""
        return float((self.moment * self.optimum).sum().clamp_min(torch.finfo(torch.float64).tiny))

    def reordered(self, order: Tensor) -> Problem:
        """The same problem with its columns in another ``order`` [K]."""
        square = self.hessian[order][:, order], self.inverse[order][:, order]
        return Problem(square[0], self.moment[:, order], self.optimum[:, order], square[1])

    def solution(self, weight: Tensor, mask: Tensor) -> Solution:
        """``weight`` with what the mask prunes set to zero, and its error."""
        kept = torch.where(mask, weight, 0.0)
        return Solution(kept, mask, self.error(kept), self.signal())


def best(*solutions: Solution) -> Solution:
    """Row by row the solution with the least error; the first one where they are equal."""
    choice = torch.stack([s.error for s in solutions]).argmin(0)
    rows = torch.arange(len(choice), device=choice.device)
    return Solution(
        torch.stack([s.weight for s in solutions])[choice, rows],
        torch.stack([s.mask for s in solutions])[choice, rows],
        torch.stack([s.error for s in solutions])[choice, rows],
        solutions[0].signal,
    )


def resolve(problem: Problem, solution: Solution) -> Solution:
    """Solve again for all kept weights of each row, the mask as it is: H_SS v = g_S, the least error for that mask.

    In closed form where that takes under a second; else by conjugate gradients from the given weight (ALPS, section 3.2).
    """
    kept = solution.mask.sum(1)
    size = int(kept.max())
    if len(kept) * size**3 / 3 > _DIRECT_FLOPS or int(kept.min()) != size:
        return _conjugate_gradients(problem, solution)
    index = solution.mask.nonzero()[:, 1].reshape(len(kept), size)
    values = torch.gather(problem.moment, 1, index)
    step = max(1, _MAX_ENTRIES // max(size * size, 1))
    for low in range(0, len(kept), step):
        part = index[low : low + step]
        factor = torch.linalg.cholesky(problem.hessian[part[:, :, None], part[:, None, :]])
        values[low : low + step] = torch.cholesky_solve(values[low : low + step, :, None], factor)[:, :, 0]
    weight = torch.zeros_like(problem.moment).scatter_(1, index, values)
    return problem.solution(weight, solution.mask)


def _conjugate_gradients(problem: Problem, solution: Solution, steps: int = 40, tolerance: float = 1e-8) -> Solution:
    """Conjugate gradients on the kept weights, preconditioned with the Hessian's diagonal, all rows at once."""
    mask, diagonal = solution.mask, problem.hessian.diagonal()
    steps = max(4, min(steps, int(_CONJUGATE_FLOPS / (2 * mask.numel() * len(diagonal)))))
    weight = solution.weight.clone()
    residual = torch.where(mask, problem.moment - weight @ problem.hessian, 0.0)
    direction = z = residual / diagonal
    energy = first = (residual * z).sum(1, keepdim=True)
    for _ in range(steps):
        curved = torch.where(mask, direction @ problem.hessian, 0.0)
        length = energy / (direction * curved).sum(1, keepdim=True).clamp_min(1e-300)
        weight += length * direction
        residual = residual - length * curved
        z = residual / diagonal
        previous, energy = energy, (residual * z).sum(1, keepdim=True)
        if bool((energy <= tolerance * first).all()):
            break
        direction = z + energy / previous.clamp_min(1e-300) * direction
    return problem.solution(weight, mask)
