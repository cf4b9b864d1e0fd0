"""What a solver is given, and what it gives back.

A solver raises an objective within a constraint and a budget. Its own figures are history: whether the behaviour came back is
measured by the audit, on a full pass of the defended model (design: one verification path).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float, Int
from torch import Tensor

from undertow.constraints.base import Constraint


class Objective(ABC):
    """Something to be raised, one value for each sample.

    Attributes:
        target: `[batch]` value at which a sample is finished: the base model's own (P12).
    """

    target: Float[Tensor, " batch"]

    @abstractmethod
    def __call__(self, delta: Float[Tensor, "active slot d"], rows: Int[Tensor, " active"]) -> Float[Tensor, " active"]:
        """Values of the samples at `rows` under their perturbations; differentiable in `delta`."""


class Status(str, Enum):
    """How the search ended for a sample."""

    REACHED = "reached"
    EXHAUSTED = "exhausted"
    FAILED = "failed"


@dataclass(frozen=True)
class SolveResult:
    """The outcome of a search at one budget.

    Attributes:
        delta: `[batch, slot, d_model]`.
        value: `[batch]` the objective at `delta`, by the solver's own reckoning.
        status: for each sample: target reached, steps exhausted, or a gradient that was zero or not finite.
        steps: `[batch]` steps taken.
    """

    delta: Float[Tensor, "batch slot d"]
    value: Float[Tensor, " batch"]
    status: list[Status]
    steps: Int[Tensor, " batch"]


class Solver(ABC):
    """A search method."""

    warm_start: bool = True
    """Whether a search may begin where the one at the next smaller budget ended."""

    @abstractmethod
    def solve(
        self,
        objective: Objective,
        constraint: Constraint,
        budget: Float[Tensor, " batch"],
        start: Float[Tensor, "batch slot d"],
    ) -> SolveResult:
        """Search from `start` within `budget`, an absolute joint norm for each sample."""
