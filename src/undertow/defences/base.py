"""What a defence is: edits of the residual stream that stay active, and a reading of what it defends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from undertow.models.batch import Where
from undertow.models.residual import Edit
from undertow.saes.sae import FeatureSet
from undertow.sites import Site


@dataclass
class FiringCount:
    """How often a defence acted: on how many samples by offset, and on how many positions of each sample (P8)."""

    by_offset: dict[int, int] = field(default_factory=dict)
    by_sample: Int[Tensor, " batch"] | None = None

    def add(self, acted: Bool[Tensor, "batch slice"], where: Where) -> None:
        """Count the positions at which the defence was applied in this pass."""
        for offset, count in zip(where.offsets.tolist(), acted.sum(0).tolist(), strict=True):
            self.by_offset[offset] = self.by_offset.get(offset, 0) + count
        fired = acted.sum(1)
        self.by_sample = fired if self.by_sample is None else self.by_sample + fired.to(self.by_sample.device)


class Defence(ABC):
    """An intervention that is meant to remove a behaviour, at one site or several."""

    @abstractmethod
    def edits(self, count: FiringCount | None = None) -> list[Edit]:
        """The edits, in order; they are active in the prompt and at every decode step (P8). `count` tallies where they act."""

    @property
    @abstractmethod
    def defended(self) -> dict[Site, FeatureSet]:
        """The feature set defended at each site, from which drift is measured and constraints are built."""

    @abstractmethod
    def describe(self) -> list[dict[str, Any]]:
        """The defence in full, as data for the run log."""
