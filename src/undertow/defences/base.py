"""What a defence is: edits of the residual stream that stay active, and a reading of what it defends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from undertow.models.residual import Edit
from undertow.saes.sae import FeatureSet
from undertow.sites import Site


class Defence(ABC):
    """An intervention that is meant to remove a behaviour, at one site or several."""

    @abstractmethod
    def edits(self) -> Sequence[Edit]:
        """The edits, in order; they are active in the prompt and at every decode step (P8)."""

    @property
    @abstractmethod
    def defended(self) -> dict[Site, FeatureSet]:
        """The feature set defended at each site, from which drift is measured and constraints are built."""

    @abstractmethod
    def describe(self) -> list[dict[str, Any]]:
        """The defence in full, as data for the run log."""
