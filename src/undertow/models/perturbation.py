"""Perturbations of the residual stream: what is added, where.

A perturbation has *slots*, each a site and an offset from the end of the prompt, and for every sample one vector in each slot:
`delta` is `[batch, slot, d_model]`. Its norm is the joint (Frobenius) norm over all slots of a sample, so a budget covers
everything that is added (P6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.models.batch import Where
from undertow.models.residual import Edit
from undertow.sites import Site


@dataclass(frozen=True, order=True)
class Slot:
    """A place that carries a perturbation.

    Attributes:
        site: where in the model.
        offset: position from the end of the prompt: -1 is its last token, 0 the first generated one.
    """

    site: Site
    offset: int


def joint_norm(delta: Float[Tensor, "batch slot d"]) -> Float[Tensor, " batch"]:
    """Norm of each sample's perturbation over all its slots."""
    return delta.flatten(1).norm(dim=-1)


def clipped(delta: Float[Tensor, "batch slot d"], budget: Float[Tensor, " batch"]) -> Float[Tensor, "batch slot d"]:
    """`delta` scaled down, where needed, to a joint norm of at most `budget` (C4)."""
    factor = (budget / joint_norm(delta).clamp(min=1e-30)).clamp(max=1.0)
    return delta * factor[:, None, None]


def perturbation_edits(slots: tuple[Slot, ...], delta: Float[Tensor, "batch slot d"]) -> list[Edit]:
    """Edits that add `delta` at its slots, one edit for each site."""
    sites = sorted({slot.site for slot in slots})
    return [_adding(site, slots, delta) for site in sites]


def _adding(site: Site, slots: tuple[Slot, ...], delta: Float[Tensor, "batch slot d"]) -> Edit:
    """The edit that adds the slots of one site, whichever of them lie in the slice that a pass is computing (P7)."""
    chosen = [index for index, slot in enumerate(slots) if slot.site == site]
    offsets = torch.tensor([slots[index].offset for index in chosen])

    def apply(stream: Tensor, where: Where) -> Tensor:
        columns = offsets - where.start
        here = (columns >= 0) & (columns < stream.shape[1])
        if not here.any():
            return stream
        values = delta[:, torch.tensor(chosen)[here]].to(stream.device, stream.dtype)
        return stream.index_add(1, columns[here].to(stream.device), values)

    return Edit(site, apply)
