"""What a file format is: the names of its files, and a function that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        read: from the folder, and fields that a registry sets in its configuration, to what it holds.
    """

    name: str
    weights: str
    others: tuple[str, ...]
    read: Callable[[Path, dict[str, Any]], Stored]


FORMATS: Registry[Format] = Registry("SAE format", "undertow.saes.formats")


def recognise(folder: Path, file: str | None = None) -> Format:
    """The format of a folder, or of one weights file in it.

    Raises:
        UndertowError: it holds none that is known, or several; if it holds pickled weights, the message says how to convert
            them.
    """
    formats = [FORMATS.get(name) for name in FORMATS.names()]
    found = [known for known in formats if (folder / known.weights).is_file() and file in (None, known.weights)]
    if len(found) > 1:
        names = ", ".join(known.weights for known in found)
        raise UndertowError(f"{folder} holds weights in several formats: {names}.", "Name one of the files.")
    if found:
        return found[0]
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.suffix in PICKLED:
            refuse_pickle(path)
    expected = ", ".join(f"{known.weights} ({known.name})" for known in formats)
    what = f"{folder / file} is no weights file that is known" if file else f"{folder} holds no SAE weights that are known"
    raise UndertowError(f"{what}.", f"Known are: {expected}.")


def flag(config: dict[str, Any], key: str, default: bool, where: Path) -> bool:
    """A truth value of a configuration.

    Raises:
        UndertowError: it is something else.
    """
    found = config.get(key)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise UndertowError(f"{where}: {key} is {found!r}, expected true or false.", "Fetch the file again.")
    return found


def size(config: dict, key: str, where: Path) -> int:
    """A positive whole number of a configuration.

    Raises:
        UndertowError: it is missing or something else.
    """
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UndertowError(f"{where}: {key} is {found!r}, expected a positive whole number.", "Fetch the file again.")
    return found
