"""The format of `dictionary_learning` (saprmarks): `config.json` and weights, once these are converted from their pickle.

The library saves `ae.pt`, a pickle, which undertow does not open; the message that says so holds the command that makes
`ae.safetensors` of it, with the same tensor names. The class of dictionary stands in the configuration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from undertow.errors import UndertowError
from undertow.saes.activations import Activation, JumpReLU, ReLU, TopK
from undertow.saes.files import TensorFile, read_json
from undertow.saes.formats.base import FORMATS, Format, size
from undertow.saes.stored import Stored, batch_topk_threshold, gated

CONFIG, WEIGHTS = "config.json", "ae.safetensors"
CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def read(folder: Path, overrides: dict[str, Any]) -> Stored:
    """What a folder of `dictionary_learning` holds.

    Raises:
        UndertowError: a file is missing or damaged, or the class of dictionary is not known.
    """
    where = folder / CONFIG
    trainer = read_json(where).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in CLASSES:
        found = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise UndertowError(f"{where}: trainer.dict_class is {found!r}.", f"Known: {', '.join(CLASSES)}.")
    kind, width, latents = trainer["dict_class"], size(trainer, "activation_dim", where), size(trainer, "dict_size", where)
    file = TensorFile(folder / WEIGHTS)
    encoder = _matrix(file, "W_enc", "encoder.weight", width, latents)
    decoder = _matrix(file, "W_dec", "decoder.weight", latents, width)
    # The decoder's bias has another name in each class.
    bias = next((name for name in ("bias", "decoder_bias", "decoder.bias") if name in file), "b_dec")
    encoder, b_enc, activation = _encoder(file, kind, encoder, trainer, latents, where)
    return Stored(
        encoder, b_enc, decoder, file.take(bias, width), activation, file.path, "dictionary_learning",
        subtract_b_dec=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"), site=_site(trainer, where),
        # The library's own loader gives this class decoder rows of unit norm.
        decoder_norm_units=kind == "AutoEncoder",
    )  # fmt: skip


def _matrix(file: TensorFile, plain: str, linear: str, rows: int, columns: int) -> Tensor:
    """`[rows, columns]`, stored as it is or as the weight of a linear layer, which is the transpose."""
    return file.take(plain, rows, columns) if plain in file else file.take(linear, columns, rows).T


def _encoder(
    file: TensorFile, kind: str, encoder: Tensor, trainer: dict[str, Any], latents: int, where: Path
) -> tuple[Tensor, Tensor, Activation]:
    if kind == "GatedAutoEncoder":
        return gated(encoder, *(file.take(name, latents) for name in ("r_mag", "mag_bias", "gate_bias")))
    bias = file.take("b_enc" if "b_enc" in file else "encoder.bias", latents)
    if kind == "JumpReluAutoEncoder":
        return encoder, bias, JumpReLU(file.take("threshold", latents))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return encoder, bias, batch_topk_threshold(file.take("threshold").item(), latents)
    return encoder, bias, TopK(size(trainer, "k", where)) if kind == "AutoEncoderTopK" else ReLU()


def _site(trainer: dict[str, Any], where: Path) -> str | None:
    """The residual stream before or after the trainer's layer, as its submodule is named; `None` where it has no name."""
    submodule, layer = trainer.get("submodule_name"), trainer.get("layer")
    if submodule is None:
        return None
    match = re.match(r"resid_(pre|post)(?:_|$)", str(submodule))
    if not match or not isinstance(layer, int):
        raise UndertowError(
            f"{where}: submodule {submodule!r} of layer {layer!r} is no place of the residual stream that is known.",
            "Give the site with --site if it is one all the same, after setting submodule_name to null.",
        )
    return f"blocks.{layer}.hook_resid_{match[1]}"


FORMATS.add("dictionary_learning", Format("dictionary_learning, converted", WEIGHTS, (CONFIG,), read))
