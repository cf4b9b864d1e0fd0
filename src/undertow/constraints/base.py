"""Constraints on a perturbation: a projection that keeps it inside, and a measure of how far outside it is.

The projection is applied to the perturbation itself after every step, not to the gradient alone: an optimiser that rescales
coordinates leaves the null space however well its gradient was projected (P1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from undertow.models.perturbation import Slot
from undertow.registry import Registry
from undertow.saes.sae import FeatureSet
from undertow.sites import Site

# Singular values below this share of the largest count as zero, in float64.
RANK_TOLERANCE = 1e-10


class Constraint(ABC):
    """A set of perturbations that an attack may use.

    Attributes:
        forbids_everything: no perturbation but 0 satisfies it.
    """

    forbids_everything: bool = False

    @abstractmethod
    def project(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
        """The nearest perturbation that satisfies the constraint."""

    @abstractmethod
    def leak(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
        """Share of each perturbation that violates the constraint, 0 to 1; 0 where `delta` is 0."""


class Unconstrained(Constraint):
    """Everything is allowed; only the norm budget, which every attack has, limits the perturbation."""

    @override
    def project(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
        return delta

    @override
    def leak(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
        return torch.zeros(delta.shape[0], device=delta.device)


class Subspace(Constraint):
    """Each slot's vector must be orthogonal to given directions (C1).

    The span of the directions is found once, by a singular value decomposition in float64 that drops the null directions,
    without any ridge term; the projection `x - Q Q^T x` is therefore exact to rounding (P1).

    Args:
        directions: for each slot `[d_model, n]`, or `None` where the slot is free.
    """

    def __init__(self, directions: list[Float[Tensor, "d n"] | None]) -> None:
        self.bases = [None if columns is None else orthonormal_basis(columns) for columns in directions]
        self.forbids_everything = all(basis is not None and basis.shape[1] == len(basis) for basis in self.bases)
        self._leak = Leak(directions)

    @override
    def project(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
        kept = [_off(x, q) for x, q in zip(delta.double().unbind(1), self.bases, strict=True)]
        return torch.stack(kept, 1).to(delta.dtype)

    @override
    def leak(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
        return self._leak(delta)


def _off(x: Float[Tensor, "batch d"], basis: Float[Tensor, "d rank"] | None) -> Float[Tensor, "batch d"]:
    """`x - Q Q^T x`, with a remainder that is nothing but rounding set to 0."""
    if basis is None:
        return x
    basis = basis.to(x.device)
    kept = x - (x @ basis) @ basis.T
    return torch.where(kept.norm(dim=-1, keepdim=True) > 1e-12 * x.norm(dim=-1, keepdim=True), kept, 0.0)


def orthonormal_basis(columns: Float[Tensor, "d n"]) -> Float[Tensor, "d rank"]:
    """Orthonormal basis of the span of `columns`, in float64, rank-revealing."""
    left, singular, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return left[:, singular > RANK_TOLERANCE * singular.max().clamp(min=1e-300)]


class Leak:
    """`||A^T delta|| / (||A||_2 ||delta||)` over all slots (method.md, Table of metrics), computed in float64.

    `||A||_2` is the largest singular value over the slots, so the figure is 1 for a perturbation along the direction that
    the constraint sees best, and 0 inside the null space and for `delta = 0`.

    Args:
        directions: for each slot `A`, `[d_model, n]`, or `None`.
    """

    def __init__(self, directions: list[Float[Tensor, "d n"] | None]) -> None:
        self._columns = [None if columns is None else columns.double() for columns in directions]
        norms = [float(torch.linalg.matrix_norm(columns, 2)) for columns in self._columns if columns is not None]
        self._largest = max(norms, default=0.0)

    def __call__(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
        """The leak of each sample's perturbation."""
        moved = torch.zeros(delta.shape[0], dtype=torch.float64, device=delta.device)
        for vectors, columns in zip(delta.double().unbind(1), self._columns, strict=True):
            if columns is not None:
                moved = moved + (vectors @ columns.to(delta.device)).square().sum(-1)
        size = delta.double().flatten(1).norm(dim=-1) * self._largest
        return torch.where(size > 0, moved.sqrt() / size.clamp(min=1e-300), torch.zeros_like(size)).to(delta.dtype)


# A constraint is built from the slots of the perturbation and the feature sets defended at each site.
Builder = Callable[[tuple[Slot, ...], dict[Site, FeatureSet]], Constraint]
CONSTRAINTS: Registry[Builder] = Registry("constraint", "undertow.constraints")
CONSTRAINTS.add("none", lambda slots, defended: Unconstrained())
