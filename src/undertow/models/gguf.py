"""Reading a GGUF file through transformers, which dequantises it.

What comes out is an ordinary model in the wanted type. The marks of its quantised origin are taken off, because with them it
could be neither saved nor moved between types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


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
    network = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, trust_remote_code=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    vars(network.config).pop("quantization_config", None)
    vars(network)["hf_quantizer"] = None
    return network, tokenizer
