"""Named parts found by looking into a folder: to add one is to add a file.

Each axis (constraints, solvers, selectors, tasks) has a `Registry`. A module in the axis's package calls
`REGISTRY.add(name, part)` when it is imported; the registry imports the package's modules when a name is first asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, TypeVar

from undertow.errors import UndertowError

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind, by name.

    Args:
        kind: what a part is called in messages ("constraint").
        package: the package whose modules add parts.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._parts: dict[str, Part] = {}
        self._loaded = False

    def add(self, name: str, part: Part) -> Part:
        """Register `part` under `name` and return it."""
        self._parts[name] = part
        return part

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._parts)

    def get(self, name: str) -> Part:
        """The part called `name`.

        Raises:
            UndertowError: there is none.
        """
        self._load()
        if name not in self._parts:
            raise UndertowError(f"{self.kind} {name!r} is unknown.", f"Choose from: {', '.join(self.names())}.")
        return self._parts[name]

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
