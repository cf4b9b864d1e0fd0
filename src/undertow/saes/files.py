"""Reading weight files that may come from anyone: safetensors and npz, never pickles (E7).

What a file's header claims is checked before anything of that size is allocated: every shape against what is expected, every
array's length against what the archive really holds.
"""

from __future__ import annotations

import json
import math
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from undertow.errors import UndertowError

PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
# A compressed array may claim this many times its stored size (constant biases compress well), beyond a floor of 64 MB.
MOST_COMPRESSION, SMALL = 20, 64 << 20
FETCH_AGAIN = "Fetch the file again."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UndertowError: it cannot be read or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UndertowError(f"{path} cannot be read: {error}.", "It must be a JSON file beside the SAE's weights.") from error
    if not isinstance(found, dict):
        raise UndertowError(f"{path} holds no JSON object.", "It must be the configuration that came with the SAE.")
    return found


def refuse_pickle(path: Path) -> None:
    """Refuse a file whose format can run code when it is read.

    Raises:
        UndertowError: it has such a suffix; the message holds the command that converts it.
    """
    if path.suffix.lower() not in PICKLED:
        return
    target = path.with_suffix(".safetensors")
    code = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "s.save_file({k: v.contiguous() for k, v in w.items()}, sys.argv[2])"
    )
    command = shlex.join(["python", "-c", code, str(path), str(target)])
    raise UndertowError(
        f"{path} is pickled; undertow does not read pickles, because they can run code.",
        f"If you trust its source, convert it once and try again: {command}",
    )


class TensorFile:
    """Named tensors of a safetensors or npz file, taken one by one.

    Attributes:
        path: the file.
        shapes: what the header says of every tensor.

    Raises:
        UndertowError: the file is missing, damaged, pickled, or claims more than it holds.
    """

    def __init__(self, path: Path) -> None:
        refuse_pickle(path)
        self.path = path
        self._read_one = self._from_npz if path.suffix == ".npz" else self._from_safetensors
        try:
            self.shapes = _npz_shapes(path) if path.suffix == ".npz" else _safetensors_shapes(path)
        except Exception as error:  # a damaged or hostile archive can make the libraries raise anything
            raise UndertowError(f"{path} cannot be read: {error}.", FETCH_AGAIN) from error

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32.

        Args:
            name: its name.
            shape: the shape that it must have.

        Raises:
            UndertowError: it is missing, has another shape, or holds values that are not finite.
        """
        if name not in self.shapes:
            raise UndertowError(
                f"{self.path} has no tensor {name!r}, only {', '.join(sorted(self.shapes))}.",
                "The file does not belong to this format.",
            )
        if self.shapes[name] != shape:
            raise UndertowError(
                f"{self.path}: {name} has shape {list(self.shapes[name])}, expected {list(shape)}.",
                "The files do not belong together.",
            )
        try:
            tensor = self._read_one(name).float()
        except Exception as error:  # as above
            raise UndertowError(f"{self.path}: {name} cannot be read: {error}.", FETCH_AGAIN) from error
        if tuple(tensor.shape) != shape:
            raise UndertowError(f"{self.path}: {name} has another shape than its header says.", FETCH_AGAIN)
        if not torch.isfinite(tensor).all():
            raise UndertowError(f"{self.path}: {name} holds values that are NaN or infinite.", FETCH_AGAIN)
        return tensor

    def _from_safetensors(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def _from_npz(self, name: str) -> Tensor:
        with np.load(self.path, allow_pickle=False) as file:
            return torch.from_numpy(np.asarray(file[name], dtype=np.float32))


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    # The library itself checks that the header's offsets lie within the file.
    shapes = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            header = file.get_slice(name)
            if header.get_dtype() not in ("F64", "F32", "F16", "BF16", "I64", "I32"):
                raise ValueError(f"{name} holds {header.get_dtype()}, not plain numbers")
            shapes[name] = tuple(header.get_shape())
    return shapes


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in shapes:
                raise ValueError(f"{name} is there twice")
            if member.file_size > max(SMALL, MOST_COMPRESSION * member.compress_size):
                raise ValueError(f"{name} claims {member.file_size} bytes and is stored in {member.compress_size}")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                header = file.tell()
            if dtype.kind not in "fiu":
                raise ValueError(f"{name} holds {dtype}, not numbers")
            if header + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{name} claims shape {list(shape)}, which is not what the archive holds")
            shapes[name] = tuple(shape)
    return shapes
