"""Solvers stay inside constraint and budget, stop where they should, and the published one does not (P1, P6, P12)."""

import pytest
import torch
from conftest import D, tiny_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.constraints.base import CONSTRAINTS, Subspace, Unconstrained
from undertow.models.perturbation import Slot, joint_norm
from undertow.solvers.base import Objective, Status
from undertow.solvers.projected import LEAK_LIMIT, Projected
from undertow.solvers.published import Published

N = 5


class Linear(Objective):
    """`value = offset + w . delta`: the optimum in a ball is known."""

    def __init__(self, seed: int, target: float = float("inf"), rotation: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(N, 1, D, generator=generator)
        self.offset = -torch.rand(N, generator=generator)
        self.target = torch.full((N,), target)
        if rotation is not None:
            self.weight = self.weight @ rotation
        self.calls = 0

    def __call__(self, delta, rows):
        self.calls += len(rows)
        return self.offset[rows] + (self.weight[rows] * delta).sum((1, 2))


class Curved(Linear):
    """A rough landscape, so that the path matters."""

    def __call__(self, delta, rows):
        return super().__call__(delta, rows) + torch.sin(3 * delta).sum((1, 2)) * 0.5


def encoder_constraint(seed: int = 0) -> Subspace:
    sae = tiny_sae(seed)
    return CONSTRAINTS.get("encoder")((Slot(sae.site, -1),), {sae.site: sae.features([1, 5, 7, 20])})


def zeros() -> torch.Tensor:
    return torch.zeros(N, 1, D)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.01, 100))
def test_projected_keeps_the_iterate_inside(seed, budget):
    """P1: not the gradient alone; P6: within the joint norm."""
    constraint, limit = encoder_constraint(seed % 5), torch.full((N,), budget)
    result = Projected(steps=15).solve(Curved(seed), constraint, limit, zeros())
    assert float(constraint.leak(result.delta).max()) <= LEAK_LIMIT
    assert (joint_norm(result.delta) <= limit * (1 + 1e-5)).all()


def test_published_leaves_its_constraint():
    """P1: 19-37 % of |delta| in toys."""
    constraint = encoder_constraint()
    result = Published(60, 0.1).solve(Linear(0), constraint, torch.full((N,), 5.0), zeros())
    basis = constraint.bases[0]
    assert basis is not None
    outside = (result.delta[:, 0].double() @ basis).norm(dim=-1) / joint_norm(result.delta)
    assert float(outside.min()) > 0.05


@pytest.mark.parametrize("constraint", [Unconstrained(), encoder_constraint()])
def test_projected_reaches_the_closed_form_of_a_linear_objective(constraint):
    """delta* = B P w / ||P w||."""
    objective, budget = Linear(3), torch.linspace(0.5, 4, N)
    result = Projected(steps=40).solve(objective, constraint, budget, zeros())
    best = objective.offset + budget * joint_norm(constraint.project(objective.weight))
    assert torch.allclose(result.value, best, rtol=1e-3)


def test_stops_at_the_target_and_not_far_beyond():
    """P12, E4: a finished sample takes no further steps."""
    objective = Linear(1, target=0.5)
    result = Projected(steps=40).solve(objective, Unconstrained(), torch.full((N,), 10.0), zeros())
    assert result.status == [Status.REACHED] * N
    assert (result.value >= 0.5).all()
    assert (result.value < 2).all(), "the crossing step is halved back, so the overshoot is a fraction of a step"
    assert objective.calls < N * 10
    unbounded = Published(40, 0.1).solve(Linear(1, target=0.5), Unconstrained(), torch.full((N,), 10.0), zeros())
    assert (unbounded.value > 5 * result.value).all()


def test_path_is_rotation_equivariant():
    """The same problem in a rotated basis gives the rotated answer; Adam's does not (P1)."""
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9)))
    budget = torch.full((N,), 2.0)
    answers = {}
    for name, solver in (("projected", Projected(steps=10)), ("published", Published(10, 0.1))):
        plain = solver.solve(Linear(4), Unconstrained(), budget, zeros()).delta
        turned = solver.solve(Linear(4, rotation=rotation), Unconstrained(), budget, zeros()).delta
        answers[name] = float((turned - plain @ rotation).norm() / plain.norm())
    assert answers["projected"] < 1e-5
    assert answers["published"] > 0.05


def test_more_budget_is_never_worse_with_a_warm_start():
    constraint, objective, start, last = encoder_constraint(), Curved(2), zeros(), torch.full((N,), -torch.inf)
    for budget in (0.1, 0.5, 2.0):
        result = Projected(steps=10).solve(objective, constraint, torch.full((N,), budget), start)
        assert (result.value >= last - 1e-6).all()
        start, last = result.delta, result.value


def test_samples_do_not_influence_each_other():
    """P11: per-sample perturbations, not one that is shared."""
    together = Projected(steps=10).solve(Curved(7), Unconstrained(), torch.full((N,), 1.0), zeros())

    class Alone(Curved):
        def __call__(self, delta, rows):
            return super().__call__(delta, rows + 3)

    objective = Alone(7)
    objective.target = objective.target[:1]
    alone = Projected(steps=10).solve(objective, Unconstrained(), torch.ones(1), torch.zeros(1, 1, D))
    assert torch.allclose(alone.delta[0], together.delta[3], atol=1e-6)


def test_flat_or_broken_objectives_are_reported_as_failed():
    class Flat(Linear):
        def __call__(self, delta, rows):
            values = super().__call__(delta, rows) * 0 - 1
            return torch.where(rows == 2, values * torch.nan, values)

    result = Projected(steps=5).solve(Flat(0), Unconstrained(), torch.ones(N), zeros())
    assert result.status == [Status.FAILED] * N
    assert torch.isfinite(result.delta).all()
