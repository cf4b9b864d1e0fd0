"""What a task is: prompts with their behaviour, split into selection and evaluation, and sensible defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from undertow.behaviours.base import Behaviour
from undertow.behaviours.rows import Rows
from undertow.config import Section
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.registry import Registry


@dataclass(frozen=True, eq=False)
class Split:
    """Some samples of a task.

    Attributes:
        names: an identifier for each sample.
        clusters: what each sample was made from; samples that share it are not independent (P16).
        batch: the prompts.
        behaviour: the predicate, for rows in the order of `names`.
    """

    names: list[str]
    clusters: list[str]
    batch: Batch
    behaviour: Behaviour

    def rows(self, rows: Sequence[int]) -> tuple[Batch, Behaviour]:
        """Some samples as a batch of their own, with their behaviour numbered from 0."""
        index = torch.tensor(rows, device=self.batch.ids.device)
        return self.batch.select(index).trimmed(), Rows(self.behaviour, index)

    def pieces(self, size: int) -> Iterator[tuple[Batch, Behaviour]]:
        """All samples, at most `size` at a time."""
        for start in range(0, self.batch.size, size):
            yield self.rows(range(start, min(start + size, self.batch.size)))


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task on a model: features are chosen on `selection`, everything that is reported is measured on `evaluation` (P15)."""

    selection: Split
    evaluation: Split


class Task(ABC):
    """A kind of audit. A subclass provides data and defaults, nothing else."""

    name: str
    describes: str
    """The behaviour in a few words, for the verdict's sentence."""
    data: type[Section]
    """The `data` section of the configuration."""

    @abstractmethod
    def build(self, model: LanguageModel, settings: Any, seed: int) -> TaskData:
        """Make the data for a model from the `data` section of the configuration.

        Raises:
            UndertowError: the settings do not fit the model, such as a name that is not a single token.
        """


TASKS: Registry[Task] = Registry("task", "undertow.tasks")
