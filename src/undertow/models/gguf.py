"""Reading a GGUF file through transformers, which dequantises it.

What comes out is an ordinary model in the wanted type. The marks of its quantised origin are taken off, because with them it
could be neither saved nor moved between types.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from undertow.errors import UndertowError


def check_complete(network: Any, found: dict[str, Any]) -> None:
    """Refuse a model of which weights were missing: transformers would leave them random, and only print a warning.

    Args:
        network: the model.
        found: transformers' report of the loading.

    Raises:
        UndertowError: weights are missing, have another shape, or belong to decoder blocks that the configuration lacks.
    """
    unread = [key for key in found.get("unexpected_keys", ()) if re.search(r"\b(?:layers|h|blocks)\.\d+\.", key)]
    wrong = {
        "missing": found.get("missing_keys", ()), "of another shape": found.get("mismatched_keys", ()),
        "of blocks that its configuration lacks": unread,
    }  # fmt: skip
    for what, keys in wrong.items():
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            raise UndertowError(
                f"{type(network).__name__}: {len(names)} weights are {what}, among them {names[0]}.",
                "The checkpoint and its config.json do not belong together; fetch them again.",
            )


def read_gguf(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A dequantised model and its tokenizer, from one GGUF file.

    Args:
        path: the file.
        dtype: type of the weights in memory.
        options: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: what transformers and gguf raise for a file that they cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    network, found = loaded
    check_complete(network, found)
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    vars(network.config).pop("quantization_config", None)
    vars(network)["hf_quantizer"] = None
    return network, tokenizer
