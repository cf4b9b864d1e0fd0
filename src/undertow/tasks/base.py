"""What a task is: prompts with their behaviour, split into selection and evaluation, and sensible defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from undertow.behaviours.base import Behaviour
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
