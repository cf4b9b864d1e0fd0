"""Loading a model by what the user typed: a packaged name, a local folder, a GGUF file, or a hub id.

Weights are read from safetensors or GGUF only and no code from a checkpoint is run (E7). Nothing is downloaded unless the name
asks for it; what was downloaded is kept in Hugging Face's own cache, and `HF_HUB_OFFLINE=1` keeps to that.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from undertow.errors import UndertowError
from undertow.models.gguf import check_complete, read_gguf
from undertow.models.language_model import LanguageModel
from undertow.models.packaged import PACKAGED_MODELS, packaged_folder

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILE = re.compile(r"[\w.-]+/[\w.-]+/[\w./-]+\.gguf")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    prepend_bos: bool | None = None,
    layers_path: str | None = None,
) -> LanguageModel:
    """A frozen model and its tokenizer.

    Args:
        name: packaged name (`smollm2`), local folder, GGUF file, hub id (`org/name`), or GGUF file on the hub
            (`org/name/file.gguf`).
        revision: hub revision; only with a hub id.
        device: torch device, or `auto` to spread the layers over what there is (accelerate's `device_map`).
        dtype: `float32`, `bfloat16` or `float16`.
        prepend_bos: put a BOS before every text to which the tokenizer adds none.
        layers_path: dotted name of the decoder blocks, for architectures that keep them at an unusual place.

    Raises:
        UndertowError: the model is not there, is not a causal language model, or has no safetensors weights.
    """
    where = _locate(name)
    spread: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    try:
        network, tokenizer = _read(where, revision, getattr(torch, dtype), spread)
        if not spread:
            network.to(torch.device(device))
    except UndertowError:
        raise
    except Exception as error:  # a damaged file can make the libraries raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UndertowError(
            f"model {name!r} cannot be loaded: {reason}",
            "It must be a causal language model with safetensors or GGUF weights and a tokenizer, for a device that exists.",
        ) from error
    source = {"resolved": name if name in PACKAGED_MODELS else str(where), "revision": revision or ""}
    if name in PACKAGED_MODELS:
        source["gguf_sha256"] = PACKAGED_MODELS[name].gguf_sha256
    if prepend_bos and getattr(tokenizer, "bos_token_id", None) is None:
        raise UndertowError(
            f"a BOS before every text was asked for, and the tokenizer of {name} has none.", "Pass --no-prepend-bos."
        )
    facts = {"source": source, "prepend_bos": bool(prepend_bos)}
    return LanguageModel.wrap(network, tokenizer, name, layers_path=layers_path, **facts)


def _read(where: str | Path, revision: str | None, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if HUB_FILE.fullmatch(str(where)) and not isinstance(where, Path):
        from huggingface_hub import hf_hub_download

        organisation, repository, file = where.split("/", 2)
        where = Path(hf_hub_download(f"{organisation}/{repository}", file, revision=revision))
    if isinstance(where, Path) and where.suffix == ".gguf":
        return read_gguf(where, dtype, **spread)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **spread
    )
    network, found = loaded
    check_complete(network, found)
    return network, AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """What tells this model from another under the same name, without reading its weights.

    The GGUF file's hash for a packaged model; a digest of names, sizes and times of the files for a folder or file; name and
    revision for a hub id.

    Raises:
        UndertowError: as `check_model_name`.
    """
    where = _locate(name, dry=True)
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].gguf_sha256
    if isinstance(where, str):
        return f"{where}@{_commit(where, revision)}"
    paths = [where] if where.is_file() else [path for path in where.iterdir() if path.is_file()]
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision of a model on the hub means now; the revision itself where that cannot be found out."""
    from huggingface_hub import hf_hub_download

    file = name.split("/", 2)[2] if HUB_FILE.fullmatch(name) else "config.json"
    try:
        path = hf_hub_download("/".join(name.split("/")[:2]), file, revision=revision)
    except (OSError, ValueError):
        return revision or "main"
    return Path(path).parts[Path(path).parts.index("snapshots") + 1]


def check_model_name(name: str, revision: str | None = None) -> None:
    """Refuse a name that can mean nothing, before any work.

    Raises:
        UndertowError: not packaged, not a folder or GGUF file, and not of the form of a hub id; or a revision of something
            that is not on the hub.
    """
    on_hub = isinstance(_locate(name, dry=True), str) and name not in PACKAGED_MODELS
    if revision and not on_hub:
        raise UndertowError(f"revision {revision!r} of {name!r}: only models on the hub have revisions.", "Leave it out.")


def _locate(name: str, dry: bool = False) -> str | Path:
    """A folder or GGUF file on this machine, or the name as it is where it means something on the hub (or, `dry`, packaged)."""
    if name in PACKAGED_MODELS:
        return name if dry else packaged_folder(PACKAGED_MODELS[name])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UndertowError(f"model folder {path} has no config.json.", "Pass a folder in Hugging Face format.")
        return path
    on_hub = HUB_FILE.fullmatch(name) or HUB_ID.fullmatch(name)
    if path.exists() or name.startswith((".", "/", "~")) or not on_hub:
        raise UndertowError(
            f"model {name!r} is not a folder or GGUF file.",
            f"Pass a packaged name ({', '.join(PACKAGED_MODELS)}), a folder in Hugging Face format, a .gguf file, or a hub id.",
        )
    return name
