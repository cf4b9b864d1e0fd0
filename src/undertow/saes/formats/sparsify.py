"""EleutherAI's sparsify format: `cfg.json` and `sae.safetensors`, in a folder named after the module, such as `layers.10`.

TopK SAEs that subtract the decoder bias from their input. The configuration names no hook point; the folder does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from undertow.errors import UndertowError
from undertow.saes.activations import TopK
from undertow.saes.files import TensorFile, read_json
from undertow.saes.formats.base import FORMATS, Format, size
from undertow.saes.stored import Stored

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path, overrides: dict[str, Any]) -> Stored:
    """What a folder in sparsify's format holds.

    Raises:
        UndertowError: a file is missing or damaged, or it is a transcoder or an SAE of another place.
    """
    where = folder / CONFIG
    config = read_json(where)
    if config.get("transcode") or config.get("skip_connection"):
        raise UndertowError(
            f"{where} is of a transcoder, which does not reconstruct what it reads.", "Choose an SAE of the residual stream."
        )
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise UndertowError(
            f"{where}: activation {config.get('activation', 'topk')!r}{', signed' if config.get('signed') else ''} is not "
            "supported.",
            "Supported: topk.",
        )
    width = size(config, "d_in", where)
    latents = config.get("num_latents") or width * size(config, "expansion_factor", where)
    file = TensorFile(folder / WEIGHTS)
    return Stored(
        W_enc=file.take("encoder.weight", latents, width).T, b_enc=file.take("encoder.bias", latents),
        W_dec=file.take("W_dec", latents, width), b_dec=file.take("b_dec", width),
        activation=TopK(size(config, "k", where)), weights=file.path, format="sparsify", subtract_b_dec=True,
        site=_site(folder.resolve().name),
    )  # fmt: skip


def _site(name: str) -> str | None:
    """`layers.10` is the output of that layer; a longer name is another module's, and no place of the residual stream."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)[._](\d+)(.*)", name)
    if match and match[2]:
        raise UndertowError(f"{name} is not of the residual stream.", "Choose an SAE of a whole layer's output.")
    return f"layers.{match[1]}" if match else None


FORMATS.add("sparsify", Format("sparsify", WEIGHTS, (CONFIG,), read))
