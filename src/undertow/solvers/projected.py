"""Projected ascent with rotation-equivariant steps: the perturbation itself never leaves the constraint (P1).

For the samples still searching, at step `t` of `T`:

1. value and gradient at `delta`; a sample at or above its target is finished (P12, E4): its last step is halved back
   a few times towards the point where the target was crossed, so that the answer does not overshoot by a whole step;
2. `g = tangent(gradient)`, the part along which delta may move, scaled to unit joint norm;
3. `m = momentum * tangent(m) + g`;
4. `delta = project(delta + length(t) * m / ||m||)`, then drawn back to the budget; `length` falls from `first` to `last`
   times the budget along a half cosine;
5. the leak of the result is checked against `LEAK_LIMIT`.

A sample's answer is its best iterate. Steps depend on directions and norms alone, never on single coordinates, so the
path would be the same in any rotated basis; a per-coordinate method (Adam) has no such path and cannot stay in a subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from undertow.constraints.base import Constraint
from undertow.models.perturbation import joint_norm
from undertow.solvers.base import Objective, Solver, SolveResult, Status

LEAK_LIMIT = 1e-5


@dataclass(frozen=True)
class Projected(Solver):
    """Normalised projected gradient ascent with momentum.

    Attributes:
        steps: most steps for each budget.
        momentum: share of the running direction that is kept.
        first: length of the first step, as a share of the budget.
        last: length of the last.
        retreats: bisections of the step that crossed the target.
    """

    steps: int = 40
    momentum: float = 0.8
    first: float = 0.25
    last: float = 0.02
    retreats: int = 4
    warm_start = True

    @override
    def solve(
        self,
        objective: Objective,
        constraint: Constraint,
        budget: Float[Tensor, " batch"],
        start: Float[Tensor, "batch slot d"],
    ) -> SolveResult:
        """Search as the module's docstring says; the best iterate of each sample is its answer.

        Raises:
            RuntimeError: an iterate left the constraint by more than `LEAK_LIMIT`.
        """
        delta = constraint.within(constraint.project(start), budget)
        previous = delta.clone()
        direction = torch.zeros_like(delta)
        best, best_value = delta.clone(), torch.full_like(budget, -torch.inf)
        steps = torch.zeros(len(delta), dtype=torch.long)
        status = [Status.EXHAUSTED] * len(delta)
        active = torch.arange(len(delta), device=delta.device)
        for step in range(self.steps + 1):
            value, gradient = value_and_gradient(objective, delta[active], active)
            improved = value > best_value[active]
            best_value[active[improved]] = value[improved]
            best[active[improved]] = delta[active[improved]]

            ascent = _unit(constraint.select(active).tangent(delta[active], gradient))
            reached = value >= objective.target[active]
            failed = ~reached & ~(joint_norm(ascent) > 0.5)
            for row in active[failed].tolist():
                status[row] = Status.FAILED
            if reached.any():
                rows = active[reached]
                best[rows], best_value[rows] = self._retreat(
                    objective, constraint.select(rows), budget[rows], previous[rows], delta[rows], value[reached], rows
                )
                for row in rows.tolist():
                    status[row] = Status.REACHED
            going = ~reached & ~failed
            active, ascent = active[going], ascent[going]
            if step == self.steps or not len(active):
                break

            steps[active.cpu()] += 1
            previous[active] = delta[active]
            here = constraint.select(active)
            direction[active] = self.momentum * here.tangent(delta[active], direction[active]) + ascent
            length = (self._length(step) * budget[active])[:, None, None]
            moved = here.project(delta[active] + length * _unit(direction[active]))
            delta[active] = here.within(moved, budget[active])
            _check_leak(here, delta[active])
        return SolveResult(best, best_value, status, steps)

    @torch.no_grad()
    def _retreat(
        self, objective: Objective, constraint: Constraint, budget: Tensor, below: Tensor, above: Tensor, value: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Bisect the way from `below` the target to `above` it, within constraint and budget."""
        for _ in range(self.retreats):
            middle = constraint.within(constraint.project((below + above) / 2), budget)
            found = objective(middle, rows)
            enough = found >= objective.target[rows]
            keep = enough[:, None, None]
            above, below = torch.where(keep, middle, above), torch.where(keep, below, middle)
            value = torch.where(enough, found, value)
        return above, value

    def _length(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.last + (self.first - self.last) * cosine


def value_and_gradient(objective: Objective, delta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[active]` and their gradients `[active, slot, d_model]`; each sample's value depends on its own delta only."""
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(delta, rows)
        (gradient,) = torch.autograd.grad(value.sum(), delta)
    return value.detach(), gradient


def _unit(x: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
    """`x` at unit joint norm; 0 where it is 0 or not finite."""
    norm = joint_norm(x)[:, None, None]
    return torch.where(torch.isfinite(norm) & (norm > 0), x / norm, torch.zeros_like(x))


def _check_leak(constraint: Constraint, delta: Tensor) -> None:
    worst = float(constraint.leak(delta).max())
    if worst > LEAK_LIMIT:
        raise RuntimeError(f"the perturbation left its constraint: leak {worst:.1e} exceeds {LEAK_LIMIT:.0e}")
