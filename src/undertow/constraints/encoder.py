"""Encoder orthogonality: `A_S^T delta = 0` with `A_S = W_enc[:, S]` (C1; paper, section on encoder-orthogonal projection).

A perturbation added after the clamp at the clamp's own site then moves no defended pre-activation there, exactly; also for an
SAE that normalises its input (see `constraints.base`).
"""

from __future__ import annotations

from undertow.constraints.base import CONSTRAINTS, Constraint, orthogonal
from undertow.models.perturbation import Slot
from undertow.saes.sae import FeatureSet
from undertow.sites import Site


def encoder(slots: tuple[Slot, ...], defended: dict[Site, FeatureSet]) -> Constraint:
    """Orthogonal to the encoder columns of the features defended at each slot's site."""
    return orthogonal(slots, defended, [defended[slot.site].W_enc if slot.site in defended else None for slot in slots])


CONSTRAINTS.add("encoder", encoder)
