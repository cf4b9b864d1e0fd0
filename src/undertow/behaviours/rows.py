"""A behaviour seen through a choice of its rows: sample `i` of a batch is row `rows[i]` of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from undertow.behaviours.base import Behaviour
from undertow.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Rows(Behaviour):
    """`whole`, re-numbered: row `i` here is row `rows[i]` there."""

    whole: Behaviour
    rows: Int[Tensor, " sample"]

    @override
    def value(
        self, model: LanguageModel, hidden: Float[Tensor, "active slice d"], rows: Int[Tensor, " active"]
    ) -> Float[Tensor, " active"]:
        return self.whole.value(model, hidden, self.rows[rows])
