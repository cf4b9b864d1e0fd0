"""The optimiser as published, kept so that the difference can be measured. Not recommended.

The gradient is projected, the iterate is not: Adam's scaling of single coordinates rotates the step out of the null space, so
the constraint does not hold (P1). The objective is raised without end (P12), the last iterate is the answer, and every
budget starts from zero. The norm budget is enforced by scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from undertow.constraints.base import Constraint
from undertow.models.perturbation import clipped
from undertow.solvers.base import Objective, Solver, SolveResult, Status
from undertow.solvers.projected import value_and_gradient


@dataclass(frozen=True)
class Published(Solver):
    """Adam on a projected gradient (arXiv 2606.18322, released code).

    Attributes:
        steps: number of steps; there is no early stop.
        learning_rate: Adam's.
    """

    steps: int = 100
    learning_rate: float = 0.1
    warm_start = False

    @override
    def solve(
        self,
        objective: Objective,
        constraint: Constraint,
        budget: Float[Tensor, " batch"],
        start: Float[Tensor, "batch slot d"],
    ) -> SolveResult:
        """All steps from zero, whatever `start` is; the last iterate is the answer."""
        delta = torch.zeros_like(start)
        rows = torch.arange(len(delta), device=delta.device)
        optimiser = torch.optim.Adam([delta], lr=self.learning_rate, maximize=True)
        for _ in range(self.steps):
            _, gradient = value_and_gradient(objective, delta, rows)
            delta.grad = constraint.tangent(torch.zeros_like(delta), gradient)
            optimiser.step()
            delta.data = clipped(delta.data, budget)
        with torch.no_grad():
            value = objective(delta, rows)
        status = [Status.REACHED if done else Status.EXHAUSTED for done in (value >= objective.target).tolist()]
        return SolveResult(delta.detach(), value, status, torch.full((len(delta),), self.steps))
