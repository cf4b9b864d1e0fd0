"""What a perturbation moved, measured on the defended features (method.md section 3; paper, Table 1).

Everything is computed from two passes of the defended model, without and with the perturbation, over the monitored
positions: all columns from the first perturbed one on, at every defended site, in float64. "def" marks the pass without,
"rec" the pass with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undertow.constraints.base import Leak, orthonormal_basis
from undertow.models.perturbation import Slot, joint_norm
from undertow.saes.sae import FeatureSet, Latents
from undertow.sites import Site

EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Reading:
    """The defended features of one site in one pass.

    Attributes:
        features: the feature set.
        latents: `[batch, pos, feature]` readings at the monitored positions.
        mask: `[batch, pos]` true at real tokens.
    """

    features: FeatureSet
    latents: Latents
    mask: Bool[Tensor, "batch pos"]


def feature_metrics(defended: list[Reading], recovered: list[Reading]) -> dict[str, Float[Tensor, " batch"]]:
    """Movement of the defended features, one number for each sample.

    Returns:
        drift: `||z_rec - z_def||_2`.
        relative_drift: the same over `||z_def||_2`.
        preactivation_drift, relative_preactivation_drift: the same on pre-activations, which move even where an inactive
            ReLU or JumpReLU hides it (P4).
        decode_drift: `||(z_rec - z_def) W_dec[S]||_F`, in the stream's units.
        floor_violation: `||[z_def - z_rec]_+||_2 / ||z_def||_2`.
        defended_norm: `||z_def||_2`; where it is 0, drift measures reactivation only.
        eligible: number of (position, feature) pairs that are inactive in the defended pass.
        reactivated: how many of these are active in the recovered pass.
        margin: smallest distance of an eligible pre-activation below its threshold in the recovered pass, negative when
            reactivated; NaN where nothing is eligible.
    """
    totals: dict[str, Tensor] = {}
    margin = None
    for before, after in zip(defended, recovered, strict=True):
        real = before.mask[..., None]
        z_def, z_rec = before.latents.post.double() * real, after.latents.post.double() * real
        a_def, a_rec = before.latents.pre.double() * real, after.latents.pre.double() * real
        eligible = (z_def <= 0) & real
        below = after.latents.threshold.double() - after.latents.pre.double()
        closest = torch.where(eligible, below, torch.inf).flatten(1).amin(-1).cpu()
        margin = closest if margin is None else torch.minimum(margin, closest)
        written = (z_rec - z_def) @ before.features.W_dec.double() * before.latents.factor.double()
        parts = {
            "drift": z_rec - z_def, "pre": a_rec - a_def, "decode": written,
            "floor": (z_def - z_rec).clamp(min=0), "z_def": z_def, "a_def": a_def,
            "eligible": eligible.double(), "reactivated": (eligible & (z_rec > 0)).double(),
        }  # fmt: skip
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.square().flatten(1).sum(-1).cpu()
    root = {name: total.sqrt() for name, total in totals.items()}
    assert margin is not None
    return {
        "drift": root["drift"], "relative_drift": root["drift"] / (root["z_def"] + EPS),
        "preactivation_drift": root["pre"], "relative_preactivation_drift": root["pre"] / (root["a_def"] + EPS),
        "decode_drift": root["decode"], "floor_violation": root["floor"] / (root["z_def"] + EPS),
        "defended_norm": root["z_def"], "eligible": totals["eligible"], "reactivated": totals["reactivated"],
        "margin": torch.where(torch.isinf(margin), torch.nan, margin),
    }  # fmt: skip


def perturbation_metrics(
    delta: Float[Tensor, "batch slot d"],
    stream: Float[Tensor, "batch slot d"],
    slots: tuple[Slot, ...],
    defended: dict[Site, FeatureSet],
) -> dict[str, Float[Tensor, " batch"]]:
    """Size and direction of a perturbation, one number for each sample.

    Args:
        delta: the perturbation as it was added.
        stream: `h_def` at the same slots.
        slots: where.
        defended: the feature sets, by site.

    Returns:
        delta_norm: `||delta||_F`, joint over slots (P6).
        relative_norm: the same over `||h_def||_F` of the slots that carry it.
        leak: `||A^T delta|| / (||A||_2 ||delta||)` with `A = W_enc[:, S]` (C1), whatever constraint the attack had.
        decoder_share: `||Q Q^T delta|| / ||delta||`, `Q` an orthonormal basis of span(W_dec[S]): the share that could undo the
            clamp's edit (P5).
    """
    encoders = [defended[slot.site].W_enc if slot.site in defended else None for slot in slots]
    norm = joint_norm(delta.double())
    along = torch.zeros_like(norm)
    for index, slot in enumerate(slots):
        if slot.site in defended:
            basis = orthonormal_basis(defended[slot.site].W_dec.T)
            along = along + (delta[:, index].double() @ basis.to(delta.device)).square().sum(-1)
    return {
        "delta_norm": norm,
        "relative_norm": norm / (joint_norm(stream.double()) + EPS),
        "leak": Leak(encoders)(delta),
        "decoder_share": torch.where(norm > 0, along.sqrt() / norm.clamp(min=1e-300), 0.0),
    }
