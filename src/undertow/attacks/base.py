"""What an attack is: a solver, a constraint and an order of clamp and delta, run over budgets from small to large.

An attack proposes perturbations. It does not grade itself: whether they bring the behaviour back is measured by the audit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from undertow.behaviours.base import Behaviour
from undertow.config import AttackConfig
from undertow.constraints.base import CONSTRAINTS, Constraint
from undertow.defences.base import Defence
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.perturbation import Slot, joint_norm, perturbation_edits
from undertow.models.residual import Edit
from undertow.models.suffix import SuffixPass
from undertow.registry import Registry
from undertow.solvers.base import Objective, Solver, SolveResult

Order = Literal["clamp-then-delta", "delta-then-clamp"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Some samples under a defence, and where a perturbation may be added.

    Attributes:
        model: the language model.
        batch: the prompts.
        behaviour: what was suppressed; its rows are the samples of the batch.
        defence: the active defence.
        slots: places that carry the perturbation.
        order: `clamp-then-delta`: added after the clamp of its site, as in the paper; `delta-then-clamp`: the clamp acts
        last (P8). target: `[batch]` the base model's own score, at which a sample is finished (P12).
        stream: `[batch, slot, d_model]` `h_def`, the defended stream at the slots.
        base_stream: `[batch, slot, d_model]` the undefended stream at the slots.
    """

    model: LanguageModel
    batch: Batch
    behaviour: Behaviour
    defence: Defence
    slots: tuple[Slot, ...]
    order: Order
    target: Float[Tensor, " batch"]
    stream: Float[Tensor, "batch slot d"]
    base_stream: Float[Tensor, "batch slot d"]


def ordered(defence: Sequence[Edit], delta: Sequence[Edit], order: Order) -> list[Edit]:
    """Edits of defence and perturbation in the given order at each site."""
    return [*defence, *delta] if order == "clamp-then-delta" else [*delta, *defence]


class BehaviourObjective(Objective):
    """The behaviour's score as a function of the perturbation, by suffix pass; differentiable."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.target = problem, problem.target
        first = min(problem.slots)
        self._whole = SuffixPass(
            problem.model, problem.batch, first.site, problem.defence.edits(), min(s.offset for s in problem.slots)
        )
        self._part, self._rows = self._whole, torch.arange(problem.batch.size, device=problem.batch.ids.device)

    def __call__(self, delta: Float[Tensor, "active slot d"], rows: Int[Tensor, " active"]) -> Float[Tensor, " active"]:
        """Scores of the samples at `rows`. Preparations for a subset are kept until the subset changes."""
        if not torch.equal(rows, self._rows):
            self._part, self._rows = self._whole.select(rows), rows.clone()
        edits = perturbation_edits(self.problem.slots, delta)
        first = self.problem.order == "delta-then-clamp"
        hidden = self._part(before=edits if first else (), after=() if first else edits)
        return self.problem.behaviour.value(self.problem.model, hidden, rows).to(rows.device)


class Attack(ABC):
    """A way to search for a perturbation. Subclasses implement `propose`."""

    constraint_name: str

    def constraint(self, slots: tuple[Slot, ...], defence: Defence) -> Constraint:
        """The constraint, for perturbations at these slots under this defence."""
        return CONSTRAINTS.get(self.constraint_name)(slots, defence.defended)

    @abstractmethod
    def propose(self, problem: Problem, budgets: Sequence[Float[Tensor, " batch"]]) -> list[SolveResult]:
        """A result for each budget, in their order."""

    def __call__(self, problem: Problem, budgets: Sequence[Float[Tensor, " batch"]]) -> list[SolveResult]:
        """Perturbations for each budget, ascending: finite, and within the joint norm budget to rounding.

        Raises:
            RuntimeError: a solver exceeded its budget.
        """
        results = self.propose(problem, budgets)
        for result, budget in zip(results, budgets, strict=True):
            if not (joint_norm(result.delta) <= budget * (1 + 1e-5)).all():
                raise RuntimeError(f"{type(self).__name__} exceeded its budget or is not finite")
        return results


@dataclass(frozen=True)
class Search(Attack):
    """An attack by an iterative solver, warm-started from the next smaller budget where the solver allows it.

    Attributes:
        solver: the search method.
        constraint_name: a registered constraint.
    """

    solver: Solver
    constraint_name: str

    @override
    def propose(self, problem: Problem, budgets: Sequence[Float[Tensor, " batch"]]) -> list[SolveResult]:
        """Solve for each budget in turn, each from the last one's answer if the solver allows it."""
        objective = BehaviourObjective(problem)
        constraint = self.constraint(problem.slots, problem.defence).at(problem.stream)
        start = torch.zeros_like(problem.stream)
        results = []
        for budget in budgets:
            results.append(self.solver.solve(objective, constraint, budget, start))
            if self.solver.warm_start:
                start = results[-1].delta
        return results


# An arm is built from the attack section of the configuration.
ARMS: Registry[Callable[[AttackConfig], Attack]] = Registry("arm", "undertow.attacks")
