"""Does an SAE belong to this site of this model, as it was read?

An SAE that is used one layer too low, before instead of after a block, at another input scale, uncentred, or with another
activation still explains some variance, and a fixed bar would let it pass. So its explained variance is compared with what the
same weights explain if they are used otherwise: at the sites next to it, with the stream multiplied by 1/16 to 16 before
encoding, with the stream centred, and with the largest few latents only (a TopK SAE read as a ReLU one has far too many). Used
as it was trained, an SAE explains the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Recorder, run
from undertow.saes.activations import TopK
from undertow.saes.quality import ExplainedVariance, scored_positions
from undertow.saes.sae import SAE
from undertow.sites import Site

SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0, 4.0, 8.0, 16.0)
LARGEST = (16, 32, 64, 128)
# Another use of the same SAE must not explain this much more variance than the stated one.
MARGIN = 0.02


@torch.no_grad()
def alternatives(model: LanguageModel, sae: SAE, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    """Explained variance as the SAE was read, and of the same weights used otherwise, at the ordinary positions.

    Returns:
        The value as read, and those of the other uses by their descriptions: of every kind of use the best.
    """
    b = sae.site.boundary
    sites = [Site(at) for at in (b - 1, b, b + 1) if 0 <= at <= model.n_layers]
    found: dict[tuple[str, str], ExplainedVariance] = {}
    for batch in batches:
        recorders = [Recorder(site) for site in sites]
        run(model, batch, [recorder.edit for recorder in recorders])
        streams = {site: recorder.states.float().to(sae.W_enc.device) for site, recorder in zip(sites, recorders, strict=True)}
        ordinary = scored_positions(sae, streams[sae.site], batch)
        rows = {site: stream[ordinary] for site, stream in streams.items()}
        for use, (target, reconstruction) in _uses(sae, rows).items():
            found.setdefault(use, ExplainedVariance()).add(target, reconstruction)
    best: dict[str, tuple[float, str]] = {}
    for (kind, use), explained in found.items():
        best[kind] = max(best.get(kind, (-torch.inf, "")), (explained.value, use))
    stated, _ = best.pop("as read")
    return stated, {use: value for value, use in best.values()}


@torch.no_grad()
def estimate_input_scale(model: LanguageModel, sae: SAE, batches: list[Batch]) -> float:
    """`sqrt(d_model) / mean ||h||` over ordinary positions: the factor that "expected average only in" training uses."""
    norms = []
    for batch in batches:
        recorder = Recorder(sae.site)
        run(model, batch, [recorder.edit])
        norms.append(recorder.states[scored_positions(sae, recorder.states, batch)].float().norm(dim=-1))
    return model.d_model**0.5 / float(torch.cat(norms).mean())


def better_uses(stated: float, others: dict[str, float]) -> dict[str, float]:
    """The other uses that explain clearly more than the stated one."""
    return {use: value for use, value in others.items() if value > stated + MARGIN}


def _uses(sae: SAE, rows: dict[Site, Tensor]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Target and reconstruction of every use of the SAE on some rows, by its kind and description."""
    here = rows[sae.site]
    uses = {("as read", ""): (sae.target(here), _reconstructed(sae, here))}
    for site, stream in rows.items():
        if site != sae.site:
            uses[str(site), f"at {site}"] = (sae.target(stream), _reconstructed(sae, stream))
    if sae.activation.elementwise:
        for count in (count for count in LARGEST if count < sae.d_sae):
            latents = TopK(count)(sae.encode(here))
            uses["count", f"with the {count} largest latents only"] = (sae.target(here), sae.decode(latents, here))
    if sae.normaliser is None:
        for scale in SCALES:
            scaled = _reconstructed(sae, here * scale) / scale
            uses["scale", f"with the stream times {scale:g}"] = (sae.target(here), scaled)
        if not sae.centred:
            centred = here - here.mean(-1, keepdim=True)
            uses["centred", "with the stream centred"] = (centred, _reconstructed(sae, centred))
    return uses


def _reconstructed(sae: SAE, stream: Tensor) -> Tensor:
    return sae.decode(sae.encode(stream), stream)
