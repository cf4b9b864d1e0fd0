"""Difference of two next-token logits at the end of the prompt: the IOI readout (method.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from undertow.behaviours.base import Behaviour
from undertow.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class LogitDifference(Behaviour):
    """`logit(wanted) - logit(other)` after the last prompt token; only these two rows of the unembedding are read (E5).

    Attributes:
        wanted: `[sample]` token ids, in IOI the indirect object's.
        other: `[sample]` token ids, in IOI the subject's.
    """

    wanted: Int[Tensor, " sample"]
    other: Int[Tensor, " sample"]

    @override
    def value(
        self, model: LanguageModel, hidden: Float[Tensor, "active slice d"], rows: Int[Tensor, " active"]
    ) -> Float[Tensor, " active"]:
        pair = torch.stack([self.wanted[rows], self.other[rows]], 1)
        logits = model.logits(hidden[:, -1], pair).float()
        return logits[:, 0] - logits[:, 1]
