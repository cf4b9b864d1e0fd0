"""Controls that run in every audit, on the same samples and budgets as the attacks, without any search (C-a, C-d).

- `control:zero`: no perturbation at all. Whatever "recovers" here was never suppressed (P10, P18).
- `control:random`: for every searching arm, a random direction in that arm's subspace at the norm that the arm itself used on
  that sample at that budget. The reference arm's goes by this name, those of the others have the arm's name added.
- `control:undo`: the closed-form undo `P (h_base - h_def)`, the clamp's own edit as far as the constraint lets it be added
  back, scaled down to the budget where it is larger (P5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.attacks.base import Problem
from undertow.constraints.base import Constraint

ZERO, UNDO, RANDOM = "control:zero", "control:undo", "control:random"


def random_arm(arm: str, reference: str) -> str:
    """Name of the random control that belongs to a searching arm."""
    return RANDOM if arm == reference else f"{RANDOM}:{arm}"


def zero(problem: Problem) -> Float[Tensor, "batch slot d"]:
    """The perturbation that is none."""
    return torch.zeros_like(problem.stream)


def undo(problem: Problem, constraint: Constraint, budget: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
    """`P (h_base - h_def)` within the budget (P5, C-d)."""
    constraint = constraint.at(problem.stream)
    return constraint.within(constraint.project(problem.base_stream - problem.stream), budget)


def random_direction(
    constraint: Constraint, stream: Float[Tensor, "batch slot d"], norms: Float[Tensor, " batch"], seeds: Sequence[int]
) -> Float[Tensor, "batch slot d"]:
    """A random direction in the constraint's subspace for each sample, at the given norms (C-a).

    Args:
        constraint: whose subspace.
        stream: the defended stream at the slots.
        norms: `[batch]` joint norm of each.
        seeds: one for each sample, so that a sample's direction does not depend on its batch.
    """
    drawn = [torch.randn(stream.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    constraint = constraint.at(stream)
    return constraint.sized(constraint.project(torch.stack(drawn).to(stream)), norms)
