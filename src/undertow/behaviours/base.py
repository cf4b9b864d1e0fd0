"""What a behaviour is: a number for each sample that is positive exactly when the behaviour holds.

One behaviour object scores the base model, the defended model and the recovered one, so the same predicate is applied to all
three (P10).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Edit, run


class Behaviour(ABC):
    """A behaviour of some samples, known by their row numbers."""

    @abstractmethod
    def value(
        self, model: LanguageModel, hidden: Float[Tensor, "active slice d"], rows: Int[Tensor, " active"]
    ) -> Float[Tensor, " active"]:
        """The score from final hidden states, differentiable; `slice` ends with the prompt's last token."""

    @torch.no_grad()
    def measure(self, model: LanguageModel, batch: Batch, edits: Sequence[Edit]) -> Float[Tensor, " batch"]:
        """The scores of a batch, whose samples are the behaviour's rows in order, in a full pass under the edits.

        Every reported figure is made of this.
        """
        return self.value(model, run(model, batch, edits), torch.arange(batch.size, device=batch.ids.device))

    def holds(self, values: Float[Tensor, " active"]) -> Bool[Tensor, " active"]:
        """Whether the behaviour holds, from its scores: strictly positive."""
        return values > 0
