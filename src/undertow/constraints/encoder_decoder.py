"""Encoder and decoder orthogonality: neither read by the defended encoder columns nor written along their decoder rows (P5).

Encoder orthogonality alone leaves room to undo the clamp: its edit lies along `W_dec[S]`, and the part of that which is
orthogonal to `W_enc[:, S]` can be added back unseen. This constraint forbids it.
"""

from __future__ import annotations

import torch

from undertow.constraints.base import CONSTRAINTS, Constraint, orthogonal
from undertow.models.perturbation import Slot
from undertow.saes.sae import FeatureSet
from undertow.sites import Site


def encoder_decoder(slots: tuple[Slot, ...], defended: dict[Site, FeatureSet]) -> Constraint:
    """Orthogonal to encoder columns and decoder rows of the features defended at each slot's site.

    Both are scaled to unit length first, so that the rank decision does not depend on their different scales.
    """
    directions = []
    for slot in slots:
        features = defended.get(slot.site)
        if features is None:
            directions.append(None)
            continue
        columns = torch.cat([features.W_enc, features.W_dec.T], 1)
        directions.append(columns / columns.norm(dim=0).clamp(min=1e-30))
    return orthogonal(slots, defended, directions)


CONSTRAINTS.add("encoder+decoder", encoder_decoder)
