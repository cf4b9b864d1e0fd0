"""The run folder: a versioned, resumable record from which every table can be made again without a model (E6).

    run.json             format, command, config, model, sae, clamp, task, versions, seeds, machine, counts, arms,
    controls, verdict,
                         warnings, seconds
    samples.jsonl        one row for each sample x arm x budget, appended as results come
    deltas.safetensors   every perturbation, keyed by the rows' `delta`; slots in the metadata

While a run goes on, perturbations lie in `parts/`, one file for each unit of work, written before that unit's rows. A unit
whose rows are not all there when a run is resumed is dropped and done again, so a killed run ends with the same rows as
one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from undertow.cache import cache_root, write_atomically
from undertow.errors import UndertowError

FORMAT = 1
RUN, SAMPLES, DELTAS, PARTS = "run.json", "samples.jsonl", "deltas.safetensors", "parts"


class RunLog:
    """A run folder that is being written.

    Args:
        folder: where; created when missing.
        header: the fields of `run.json` that are known at the start, `config` among them.

    Raises:
        UndertowError: the folder cannot be written, holds files that are not of a run, or a run of another configuration,
            model, SAE or format.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        existing = _existing(folder)
        if existing is not None:
            _check_same(folder, existing, header)
        elif foreign := [name for name in (SAMPLES, DELTAS, PARTS) if (folder / name).exists()]:
            raise UndertowError(
                f"{folder} holds {', '.join(foreign)} but no {RUN}: it is not a run folder.", "Choose another --out."
            )
        self.finished = existing is not None and existing.get("status") == "complete"
        self.run: dict[str, Any] = existing if existing is not None else {"format": FORMAT, "status": "running", **header}
        if self.finished:
            return
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            self._write_run()
        except OSError as error:
            raise UndertowError(
                f"the run folder {folder} cannot be written ({error.strerror}).", "Choose another folder with --out."
            ) from error

    def keep_complete(self, units: dict[str, set[tuple[str, str, float]]]) -> set[str]:
        """Drop rows of unfinished units and return the names of the finished ones.

        Args:
            units: for each unit its rows, as (sample, arm, budget).
        """
        rows = _rows(self.folder)
        present = {(row["sample"], row["arm"], row["budget"]) for row in rows}
        finished = {name for name, keys in units.items() if keys <= present and (self.folder / PARTS / _part(name)).exists()}
        wanted = set().union(*(units[name] for name in finished)) if finished else set()
        kept = [row for row in rows if (row["sample"], row["arm"], row["budget"]) in wanted]
        write_atomically(self.folder / SAMPLES, "".join(_line(row) for row in kept))
        return finished

    def append(self, unit: str, rows: Iterable[dict[str, Any]], deltas: dict[str, Tensor]) -> None:
        """Record a unit of work: its perturbations first, then its rows in one write."""
        target = self.folder / PARTS / _part(unit)
        staging = target.with_suffix(".tmp")
        save_file({key: delta.contiguous() for key, delta in deltas.items()}, staging)
        os.replace(staging, target)
        with (self.folder / SAMPLES).open("a") as file:
            file.write("".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def delta(self, unit: str, key: str) -> Tensor:
        """A perturbation of a finished unit."""
        with safe_open(self.folder / PARTS / _part(unit), framework="pt") as file:
            return file.get_tensor(key)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return _rows(self.folder)

    def abandon(self) -> None:
        """Take back a run in which nothing was recorded; whatever else lies in the folder stays."""
        if self.finished or self.rows():
            return
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        for name in (RUN, SAMPLES):
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def finish(self, facts: dict[str, Any], slots: list[dict[str, Any]]) -> None:
        """Write the results into `run.json` and all perturbations into one file; the run is then complete."""
        tensors: dict[str, Tensor] = {}
        for part in sorted((self.folder / PARTS).glob("*.safetensors")):
            tensors.update(load_file(part))
        # One entry of metadata only: the format does not order several, and equal runs should give equal files.
        staging = self.folder / f".{DELTAS}"
        save_file(tensors, staging, metadata={"slots": json.dumps(slots)})
        os.replace(staging, self.folder / DELTAS)
        self.run.update(facts, status="complete", finished=_now())
        self._write_run()
        shutil.rmtree(self.folder / PARTS)
        self.finished = True

    def _write_run(self) -> None:
        text = json.dumps(self.run, indent=2, allow_nan=False) + "\n"
        write_atomically(self.folder / RUN, text)
        # What is in memory is what a reader of the file gets.
        self.run = json.loads(text)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`run.json` and the rows of a run folder.

    Raises:
        UndertowError: it is not a run folder, or of a newer format.
    """
    run = _existing(folder)
    if run is None:
        raise UndertowError(f"{folder} is not a run folder (it has no {RUN}).", "Pass a folder made by `undertow run`.")
    return run, _rows(folder)


def environment() -> dict[str, Any]:
    """Versions and machine, for the run log."""
    packages = ("undertow", "torch", "transformers", "safetensors", "numpy", "scipy", "statsmodels")
    return {
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "started": _now(),
        "command": shlex.join(["undertow", *sys.argv[1:]]),
    }


def _check_same(folder: Path, existing: dict[str, Any], header: dict[str, Any]) -> None:
    """Refuse to mix results: of another configuration, of other weights under the same name, or of other versions."""
    fields = {"config": "another configuration", "inputs": "other model or SAE weights"}
    if existing.get("status") != "complete":
        fields["versions"] = "other versions of its libraries, not finished"
    for field, what in fields.items():
        if existing.get(field) != header.get(field):
            raise UndertowError(f"{folder} holds a run of {what}.", "Choose another --out, or remove that folder.")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that no second process of this user writes into it. The lock lies in the cache.

    Raises:
        UndertowError: another process holds it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    locks = cache_root() / "locks"
    locks.mkdir(exist_ok=True)
    try:
        with FileLock(locks / f"run-{digest}.lock", timeout=0):
            yield
    except Timeout as error:
        raise UndertowError(f"another process is writing {folder}.", "Wait for it, or choose another --out.") from error


def _existing(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN
    try:
        run = json.loads(path.read_text())
        version = run["format"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UndertowError(f"{path} is not a run log: {error}.", "Remove that folder or choose another.") from error
    if version != FORMAT:
        raise UndertowError(f"{path} has format {version}; this undertow reads {FORMAT}.", "Use a matching version.")
    return run


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / SAMPLES
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the process was killed while this line was being written
            continue
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _part(unit: str) -> str:
    return unit.replace(":", "-").replace("+", "_").replace("/", "_") + ".safetensors"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
