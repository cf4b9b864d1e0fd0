"""Constraints on a perturbation: a projection that keeps it inside, and a measure of how far outside it is.

The projection is applied to the perturbation itself after every step, not to the gradient alone: an optimiser that rescales
coordinates leaves the null space however well its gradient was projected (P1).

Where the SAE reads the stream as it is, "no defended pre-activation moves" is a subspace. Where it normalises each position by
itself, a perturbation also moves every pre-activation by changing the size that is divided by; the set is then a sphere
around the stream's own remainder, different for every sample, and just as exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from undertow.models.perturbation import Slot, clipped, joint_norm
from undertow.registry import Registry
from undertow.saes.sae import FeatureSet
from undertow.sites import Site

# Singular values below this share of the largest count as zero, in float64.
RANK_TOLERANCE = 1e-10


class Constraint(ABC):
    """A set of perturbations that an attack may use.

    Attributes:
        forbids_everything: no perturbation but 0 satisfies it.
        after_clamp_only: it holds the features only where the stream that it is bound to is the one that delta is added to,
            that is, with delta behind the clamp.
    """

    forbids_everything: bool = False
    after_clamp_only: bool = False

    def at(self, stream: Float[Tensor, "batch slot d"]) -> Constraint:
        """The constraint for samples whose defended stream at the slots is this; itself where the stream does not matter."""
        return self

    def select(self, rows: Int[Tensor, " active"]) -> Constraint:
        """The constraint for the samples at `rows` of those it was made for."""
        return self

    @abstractmethod
    def project(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
        """The nearest perturbation that satisfies the constraint."""

    def tangent(
        self, delta: Float[Tensor, "batch slot d"], direction: Float[Tensor, "batch slot d"]
    ) -> Float[Tensor, "batch slot d"]:
        """The part of a direction along which a perturbation can move without leaving the constraint, to first order."""
        return self.project(direction)

    def within(self, delta: Float[Tensor, "batch slot d"], budget: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
        """A perturbation of the constraint, drawn back towards none until its joint norm is at most `budget` (C4)."""
        return clipped(delta, budget)

    def sized(self, delta: Float[Tensor, "batch slot d"], norms: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
        """A perturbation of the constraint in the same direction, at the given joint norms (or the largest there are)."""
        return delta * (norms / joint_norm(delta).clamp(min=1e-30))[:, None, None]

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
    """Orthonormal basis of the span of `columns`, in float64, rank-revealing; scales of the columns do not matter."""
    columns = columns.double()
    columns = columns / columns.norm(dim=0).clamp(min=1e-300)
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
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


class Sphere(Constraint):
    """Orthogonal to given directions and, in some slots, without change of the stream's size in what is left (P1).

    An SAE that normalises its input reads `w . u / |u|` (with `u` the stream, or the stream less its mean). With `w` among the
    directions and the norm of the remainder `r = u - Q Q^T u` kept, every such reading stays: `delta = r' - r` with
    `|r'| = |r|` and `r'` orthogonal to the directions. The nearest such perturbation to any `x` is found by scaling the
    remainder of `u + x` to that norm; drawing back towards none goes along the great circle.

    Args:
        subspace: the orthogonality, removed directions of the normalisation included.
        curved: for each slot, whether the norm has to stay as well.
        remainder: `r` of every sample, `[batch, slot, d_model]` in float64; given by `at`.
    """

    after_clamp_only = True

    def __init__(self, subspace: Subspace, curved: list[bool], remainder: Float[Tensor, "batch slot d"] | None = None) -> None:
        self.subspace, self.curved, self._remainder = subspace, curved, remainder
        # A sphere in one dimension is two points, of which one is no perturbation: a curved slot needs two free dimensions.
        bases = zip(subspace.bases, curved, strict=True)
        self.forbids_everything = all(basis is not None and basis.shape[1] >= len(basis) - bent for basis, bent in bases)

    @override
    def at(self, stream: Float[Tensor, "batch slot d"]) -> Sphere:
        return Sphere(self.subspace, self.curved, self.subspace.project(stream.double()))

    @override
    def select(self, rows: Int[Tensor, " active"]) -> Sphere:
        return Sphere(self.subspace, self.curved, self.remainder[rows])

    @property
    def remainder(self) -> Float[Tensor, "batch slot d"]:
        """`r` of every sample.

        Raises:
            ValueError: the constraint was not bound to samples with `at`.
        """
        if self._remainder is None:
            raise ValueError("this constraint depends on the stream: bind it to the samples with at(stream)")
        return self._remainder

    @property
    def _bent(self) -> Tensor:
        """`[1, slot, 1]` true at curved slots."""
        return torch.tensor(self.curved, device=self.remainder.device)[None, :, None]

    @override
    def project(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, "batch slot d"]:
        flat = self.subspace.project(delta.double())
        moved = self.remainder + flat
        size = moved.norm(dim=-1, keepdim=True)
        kept = moved * (self.remainder.norm(dim=-1, keepdim=True) / size.clamp(min=1e-300)) - self.remainder
        return torch.where(self._bent, torch.where(size > 0, kept, 0.0), flat).to(delta.dtype)

    @override
    def tangent(
        self, delta: Float[Tensor, "batch slot d"], direction: Float[Tensor, "batch slot d"]
    ) -> Float[Tensor, "batch slot d"]:
        """The part of `direction` that is orthogonal to the forbidden directions and, in curved slots, to `r + delta`."""
        flat = self.subspace.project(direction.double())
        along = _unit(self.remainder + delta.double())
        bent = flat - along * (along * flat).sum(-1, keepdim=True)
        return torch.where(self._bent, bent, flat).to(direction.dtype)

    @override
    def within(self, delta: Float[Tensor, "batch slot d"], budget: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
        share = self._share(delta, budget.double(), torch.ones_like(budget, dtype=torch.float64))
        return self._part(delta, share)

    @override
    def sized(self, delta: Float[Tensor, "batch slot d"], norms: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
        angle = torch.where(self._bent[..., 0], self._arc(delta)[0], 0.0).amax(-1)
        linear = norms.double() / joint_norm(delta.double()).clamp(min=1e-300)
        furthest = torch.where(angle > 0, math.pi / angle.clamp(min=1e-300), linear)
        return self._part(delta, self._share(delta, norms.double(), furthest))

    @override
    def leak(self, delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
        """The linear leak and the change of norm over `||delta||`, in quadrature."""
        change = (self.remainder + delta.double()).norm(dim=-1) - self.remainder.norm(dim=-1)
        change = torch.where(self._bent[..., 0], change, 0.0).norm(dim=-1) / joint_norm(delta.double()).clamp(min=1e-300)
        return (self.subspace.leak(delta.double()).square() + change.square()).sqrt().to(delta.dtype)

    def _arc(self, delta: Float[Tensor, "batch slot d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Angle `[batch, slot]` of the great circle from `r` to `r + delta`, and the unit vectors that span it."""
        start = _unit(self.remainder)
        end = _unit(self.remainder + delta.double())
        across = _unit(end - start * (start * end).sum(-1, keepdim=True))
        # Twice the half-angle of the chord: exact for small angles too.
        angle = 2 * torch.asin(((end - start).norm(dim=-1) / 2).clamp(max=1))
        return angle, start, across

    def _part(self, delta: Float[Tensor, "batch slot d"], share: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
        """The way from none to `delta`, a share of it (or beyond it) in every slot."""
        angle, start, across = self._arc(delta)
        turn = (share[:, None] * angle)[..., None]
        size = self.remainder.norm(dim=-1, keepdim=True)
        # cos - 1 without cancellation.
        bent = size * (torch.sin(turn) * across - 2 * torch.sin(turn / 2).square() * start)
        return torch.where(self._bent, bent, share[:, None, None] * delta.double()).to(delta.dtype)

    def _share(self, delta: Tensor, norms: Tensor, furthest: Tensor) -> Float[Tensor, " batch"]:
        """Largest share, up to `furthest`, at which the joint norm is at most `norms`; by bisection, as it is monotone."""
        low, high = torch.zeros_like(furthest), furthest
        fits = joint_norm(self._part(delta.double(), high)) <= norms
        for _ in range(60):
            middle = (low + high) / 2
            inside = joint_norm(self._part(delta.double(), middle)) <= norms
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return torch.where(fits, furthest, low)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def orthogonal(
    slots: tuple[Slot, ...], defended: dict[Site, FeatureSet], directions: list[Float[Tensor, "d n"] | None]
) -> Constraint:
    """Orthogonality in each slot to its directions, such that features read along them stay put.

    Args:
        slots: the slots.
        defended: the feature sets, by site.
        directions: for each slot `[d_model, n]`, or `None` where it is free.
    """
    kinds = [defended[slot.site].sae.normaliser if slot.site in defended else None for slot in slots]
    if not any(kinds):
        return Subspace(directions)
    added = [
        columns
        if kind is None or columns is None
        else _unit(torch.cat([columns, kind.removed(len(columns)).to(columns)], 1).T).T
        for kind, columns in zip(kinds, directions, strict=True)
    ]
    return Sphere(Subspace(added), [kind is not None for kind in kinds])


# A constraint is built from the slots of the perturbation and the feature sets defended at each site.
Builder = Callable[[tuple[Slot, ...], dict[Site, FeatureSet]], Constraint]
CONSTRAINTS: Registry[Builder] = Registry("constraint", "undertow.constraints")
CONSTRAINTS.add("none", lambda slots, defended: Unconstrained())
