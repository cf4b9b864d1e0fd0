"""How well an SAE reconstructs the stream of a model on text.

Let "ordinary" positions be the real tokens, special ones apart, whose norm is within the SAE's `norm_limit` (massive
activations are neither scored nor replaced; they hold most of the raw variance and would drown everything else). Over them:

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
from jaxtyping import Bool, Float
from torch import Tensor

from undertow.errors import UndertowError
from undertow.models.batch import Batch, token_windows
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Edit
from undertow.models.suffix import SuffixPass
from undertow.saes.sae import SAE

WINDOW, MIN_WINDOW, BATCH_TOKENS, MASSIVE, LOGIT_ROWS = 128, 12, 2048, 5.0, 256


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


class ExplainedVariance:
    """`1 - sum |h - h_hat|^2 / sum |h - mean(h)|^2` over rows that come in pieces, in float64."""

    def __init__(self) -> None:
        self.rows, self._error, self._squares = 0, 0.0, 0.0
        self._sum: Tensor | float = 0.0

    def add(self, target: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"]) -> None:
        """Count some rows."""
        target = target.double()
        self.rows += len(target)
        self._error += float((target - reconstruction.double()).square().sum())
        self._squares += float(target.square().sum())
        self._sum = self._sum + target.sum(0)

    @property
    def value(self) -> float:
        """Explained variance of all rows so far.

        Raises:
            UndertowError: there are no rows, or they do not vary.
        """
        if not self.rows:
            raise UndertowError(
                "no position of the text is one that the SAE applies to.",
                "The text is too short, or the SAE's norm_limit belongs to another model, site or scaling.",
            )
        return 1 - self._error / (self._squares - float(torch.as_tensor(self._sum).square().sum()) / self.rows)


def scored_positions(sae: SAE, stream: Float[Tensor, "batch pos d"], batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Ordinary positions; for an SAE without `norm_limit`, those within `MASSIVE` times the batch's median norm."""
    plain = (batch.mask & ~batch.special).to(stream.device)
    if sae.norm_limit is not None:
        return plain & sae.ordinary(stream)
    norms = stream.float().norm(dim=-1)
    return plain & (norms <= MASSIVE * norms[plain].median())


def text_batches(model: LanguageModel, texts: list[str], tokens: int) -> Iterator[Batch]:
    """Batches of windows of up to 128 tokens, each within one text, until `tokens` have been given."""
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW))
    windows, total = [], 0
    for text in texts:
        if total >= tokens:
            break
        (ids,) = model.encode([text])
        kept = [piece for piece in token_windows(ids, window, model.bos_id) if len(piece) >= MIN_WINDOW]
        windows += kept
        total += sum(map(len, kept))
    windows.sort(key=len)
    while windows:
        count = max(1, BATCH_TOKENS // len(windows[-1]))
        yield Batch.of(windows[-count:], model.special_ids, model.device)
        del windows[-count:]


@torch.no_grad()
def measure_quality(model: LanguageModel, sae: SAE, texts: list[str], tokens: int) -> Quality:
    """Reconstruction quality on the first `tokens` tokens of the texts, in the model's own precision."""
    losses = {"clean": 0.0, "reconstructed": 0.0, "zeroed": 0.0}
    predicted = real = active = 0.0
    explained = ExplainedVariance()
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    for batch in text_batches(model, texts, tokens):
        suffix = SuffixPass(model, batch, sae.site, first_offset=None)
        stream = suffix.entering
        ordinary = scored_positions(sae, stream, batch)
        latents = sae.encode(stream)
        target = sae.target(stream)
        reconstruction = sae.decode(latents, stream)
        explained.add(target[ordinary], reconstruction[ordinary])
        fired |= (latents[ordinary] > 0).any(0)
        active += float((latents[ordinary] > 0).sum())
        real += int(batch.mask.sum())
        whole = reconstruction + stream.float() - target
        for name, other in (("clean", stream), ("reconstructed", whole), ("zeroed", torch.zeros_like(stream))):
            mixed = torch.where(ordinary[..., None], other.to(stream.dtype), stream)
            hidden = suffix(before=[Edit(sae.site, lambda stream, where, mixed=mixed: mixed)])
            losses[name] += _loss(model, batch, hidden)
        predicted += int(batch.mask[:, :-1].sum())
    value = explained.value
    return Quality(
        tokens=int(real), ordinary_share=explained.rows / real, explained_variance=value,
        l0=active / explained.rows,
        dead_features=int((~fired).sum()), loss_clean=losses["clean"] / predicted,
        loss_reconstructed=losses["reconstructed"] / predicted, loss_zeroed=losses["zeroed"] / predicted,
    )  # fmt: skip


def _loss(model: LanguageModel, batch: Batch, hidden: Tensor) -> float:
    """Summed next-token cross-entropy over the batch's real tokens; a vocabulary of 262,144 asks for small pieces."""
    keep = batch.mask[:, :-1]
    rows, targets = hidden[:, :-1][keep.to(hidden.device)], batch.ids[:, 1:][keep]
    total = 0.0
    for piece, wanted in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = model.all_logits(piece).float()
        total += float(torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
    return total
