"""Where downloads and derived files live, and how they get there whole.

`UNDERTOW_CACHE` names the folder (default `~/.cache/undertow`). Everything is written under a temporary name and renamed
when complete, under a file lock, so that a killed process leaves nothing half-written and two processes do the work once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from undertow.errors import UndertowError


def cache_root() -> Path:
    """The cache folder, created on first use.

    Raises:
        UndertowError: the folder cannot be created or written.
    """
    root = Path(os.environ.get("UNDERTOW_CACHE") or Path.home() / ".cache" / "undertow").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UndertowError(
            f"The cache folder {root} cannot be written ({error.strerror}).",
            "Set UNDERTOW_CACHE to a folder that you can write.",
        ) from error
    return root


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold the cache's lock `name`; yields the cache root."""
    root = cache_root()
    (root / "locks").mkdir(exist_ok=True)
    with FileLock(root / "locks" / f"{name}.lock"):
        yield root


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` that replaces it when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees a part of it."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
