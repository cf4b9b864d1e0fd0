"""Features by attribution to the behaviour: gradient times activation (paper, IOI experiment).

For a behaviour score `B`, the stream `h` at the SAE's site and its latents `z`:

1. one pass and one backward pass give `g = dB/dh` at every position of every selection prompt;
2. the attribution of latent `f` is `sum over positions of z_f * (W_dec[f] . g)`: the first-order share of `B` that it carries;
3. scores are averaged over prompts; the features with the largest positive means are taken.

Special tokens and massive activations are left out, as in the clamp. The prompts are selection prompts: no prompt that is
attacked later takes part (P15).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.behaviours.base import Behaviour
from undertow.errors import UndertowError
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Edit
from undertow.models.suffix import SuffixPass
from undertow.saes.sae import SAE


@dataclass(frozen=True)
class Selection:
    """Chosen features, best first.

    Attributes:
        indices: latent indices.
        scores: the attribution of each, in units of the behaviour's score.
    """

    indices: list[int]
    scores: list[float]


def attribution_scores(
    model: LanguageModel, batch: Batch, behaviour: Behaviour, sae: SAE, positions: Literal["all", "last"] = "all"
) -> Float[Tensor, " latent"]:
    """Mean attribution of every latent over the batch, `[d_sae]`."""
    suffix = SuffixPass(model, batch, sae.site, first_offset=-1 if positions == "last" else None)
    leaf = torch.zeros_like(suffix.entering).requires_grad_()
    with torch.enable_grad():
        hidden = suffix(before=[Edit(sae.site, lambda stream, where: stream + leaf)])
        value = behaviour.value(model, hidden, torch.arange(batch.size, device=batch.ids.device))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    plain = (batch.mask & ~batch.special)[:, suffix.first :]
    counted = plain.to(suffix.entering.device) & sae.ordinary(suffix.entering)
    latents = sae.encode(suffix.entering) * counted[..., None]
    worth = (gradient.float() @ sae.W_dec.T) * sae.factor(suffix.entering)
    return (latents * worth).sum((0, 1)) / batch.size


def select_by_attribution(
    model: LanguageModel,
    batches: list[tuple[Batch, Behaviour]],
    sae: SAE,
    count: int,
    positions: Literal["all", "last"] = "all",
) -> Selection:
    """The `count` features of largest positive attribution over several batches.

    Raises:
        UndertowError: fewer than `count` features have a positive attribution.
    """
    total = sum(batch.size for batch, _ in batches)
    scores = sum(
        attribution_scores(model, batch, behaviour, sae, positions) * (batch.size / total) for batch, behaviour in batches
    )
    positive = int((torch.as_tensor(scores) > 0).sum())
    if positive < count:
        raise UndertowError(
            f"only {positive} features have a positive attribution, {count} were asked for.", "Lower --features."
        )
    best = torch.as_tensor(scores).topk(count)
    return Selection(best.indices.tolist(), best.values.tolist())
