"""What a file format is: the names of its files, and a function that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from undertow.errors import UndertowError
from undertow.registry import Registry
from undertow.saes.files import PICKLED, refuse_pickle
from undertow.saes.stored import Stored


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: its name in messages and run logs.
        weights: file name of the weights, by which a folder is recognised.
        others: files that belong beside them, some perhaps absent.
        read: from the folder to what it holds.
    """

    name: str
    weights: str
    others: tuple[str, ...]
    read: Callable[[Path], Stored]


FORMATS: Registry[Format] = Registry("SAE format", "undertow.saes.formats")


def recognise(folder: Path) -> Format:
    """The format of a folder.

    Raises:
        UndertowError: it holds none that is known; if it holds pickled weights, the message says how to convert them.
    """
    formats = [FORMATS.get(name) for name in FORMATS.names()]
    for known in formats:
        if (folder / known.weights).is_file():
            return known
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.suffix in PICKLED:
            refuse_pickle(path)
    expected = ", ".join(f"{known.weights} ({known.name})" for known in formats)
    raise UndertowError(f"{folder} holds no SAE weights that are known.", f"Known are: {expected}.")


def size(config: dict, key: str, where: Path) -> int:
    """A positive whole number of a configuration.

    Raises:
        UndertowError: it is missing or something else.
    """
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UndertowError(f"{where}: {key} is {found!r}, expected a positive whole number.", "Fetch the file again.")
    return found
