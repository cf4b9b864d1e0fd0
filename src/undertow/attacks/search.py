"""The searching arms: the projected solver under each constraint, and the published optimiser."""

from __future__ import annotations

from collections.abc import Callable

from undertow.attacks.base import ARMS, Attack, Search
from undertow.config import AttackConfig
from undertow.solvers.projected import Projected
from undertow.solvers.published import Published

Builder = Callable[[AttackConfig], Attack]


def _projected(constraint: str) -> Builder:
    def build(config: AttackConfig) -> Attack:
        return Search(Projected(steps=config.steps), constraint)

    return build


def _published(constraint: str) -> Builder:
    def build(config: AttackConfig) -> Attack:
        return Search(Published(config.published_steps, config.published_learning_rate), constraint)

    return build


for _name in ("none", "encoder", "encoder+decoder"):
    ARMS.add(_name, _projected(_name))
ARMS.add("published", _published("encoder"))
ARMS.add("published-none", _published("none"))
