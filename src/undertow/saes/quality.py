"""How well an SAE reconstructs the stream of a model on text.

Let "ordinary" positions be the real tokens whose norm is within the SAE's `norm_limit` (massive activations are neither
scored nor replaced; they hold most of the raw variance and would drown everything else). Over them:

- explained variance: `1 - sum |h - h_hat|^2 / sum |h - mean(h)|^2`;
- L0: mean number of active latents;
- dead features: latents that were never active;
- loss recovered: `(loss_zero - loss_sae) / (loss_zero - loss_clean)`, next-token cross-entropy over all tokens with the stream
  replaced, at ordinary positions, by 0, by the reconstruction, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Edit
from undertow.models.suffix import SuffixPass
from undertow.saes.sae import SAE

WINDOW, MIN_WINDOW, BATCH_TOKENS = 128, 12, 2048


@dataclass(frozen=True)
class Quality:
    """Measured reconstruction quality; see the module's docstring for the definitions."""

    tokens: int
    ordinary_share: float
    explained_variance: float
    l0: float
    dead_features: int
    loss_clean: float
    loss_reconstructed: float
    loss_zeroed: float

    @property
    def loss_recovered(self) -> float:
        """Share of the loss between zeroing and the clean model that the reconstruction recovers."""
        return (self.loss_zeroed - self.loss_reconstructed) / (self.loss_zeroed - self.loss_clean)


def text_batches(model: LanguageModel, texts: list[str], tokens: int) -> Iterator[Batch]:
    """Batches of windows of up to 128 tokens, each within one text, until `tokens` have been given."""
    windows, total = [], 0
    for text in texts:
        if total >= tokens:
            break
        ids = model.tokenizer(text)["input_ids"]
        new = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        windows += [window for window in new if len(window) >= MIN_WINDOW]
        total = sum(map(len, windows))
    windows.sort(key=len)
    while windows:
        count = max(1, BATCH_TOKENS // len(windows[-1]))
        yield Batch.of(windows[-count:], model.special_ids, model.device)
        del windows[-count:]


@torch.no_grad()
def measure_quality(model: LanguageModel, sae: SAE, texts: list[str], tokens: int) -> Quality:
    """Reconstruction quality on the first `tokens` tokens of the texts, in the model's own precision."""
    losses = {"clean": 0.0, "reconstructed": 0.0, "zeroed": 0.0}
    error = predicted = scored = real = active = 0.0
    moments = [torch.zeros(sae.d_model, dtype=torch.float64, device=model.device) for _ in range(2)]
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=model.device)
    for batch in text_batches(model, texts, tokens):
        suffix = SuffixPass(model, batch, sae.site, first_offset=None)
        stream, ordinary = suffix.entering, batch.mask & sae.ordinary(suffix.entering)
        latents = sae.encode(stream)
        target = sae.target(stream)
        reconstruction = sae.decode(latents)
        rows = target[ordinary].double()
        error += float((rows - reconstruction[ordinary].double()).square().sum())
        moments[0] += rows.sum(0)
        moments[1] += rows.square().sum(0)
        fired |= (latents[ordinary] > 0).any(0)
        active += float((latents[ordinary] > 0).sum())
        scored, real = scored + len(rows), real + int(batch.mask.sum())
        whole = reconstruction + stream.float() - target
        for name, other in (("clean", stream), ("reconstructed", whole), ("zeroed", torch.zeros_like(stream))):
            mixed = torch.where(ordinary[..., None], other.to(stream.dtype), stream)
            hidden = suffix(before=[Edit(sae.site, lambda stream, where, mixed=mixed: mixed)])
            losses[name] += _loss(model, batch, hidden)
        predicted += int(batch.mask[:, :-1].sum())
    variance = float((moments[1] - moments[0].square() / scored).sum())
    return Quality(
        tokens=int(real), ordinary_share=scored / real, explained_variance=1 - error / variance, l0=active / scored,
        dead_features=int((~fired).sum()), loss_clean=losses["clean"] / predicted,
        loss_reconstructed=losses["reconstructed"] / predicted, loss_zeroed=losses["zeroed"] / predicted,
    )  # fmt: skip


def _loss(model: LanguageModel, batch: Batch, hidden: Tensor) -> float:
    """Summed next-token cross-entropy over the batch's real tokens."""
    keep = batch.mask[:, :-1]
    logits = model.network.get_output_embeddings()(hidden[:, :-1][keep])
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return float(torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][keep], reduction="sum"))
