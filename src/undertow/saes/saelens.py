"""SAELens's folder format: `cfg.json` and `sae_weights.safetensors`.

Standard (ReLU), JumpReLU and TopK residual-stream SAEs are read. Both the flat configuration of older releases and the one with
a `metadata` section are understood. The subtraction of the decoder bias from the input is folded into the encoder bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from undertow.cache import sha256_of
from undertow.errors import UndertowError
from undertow.saes.activations import Activation, JumpReLU, ReLU, TopK
from undertow.saes.sae import SAE
from undertow.sites import Site

CONFIG, WEIGHTS, CARD = "cfg.json", "sae_weights.safetensors", "card.json"


def load_saelens(folder: Path, name: str, *, site: str | None = None, centre_input: bool = False) -> SAE:
    """An SAE from a folder in SAELens's format.

    Args:
        folder: the folder.
        name: what to call it.
        site: address to use instead of the one in its configuration.
        centre_input: the SAE reads residuals with their mean over dimensions subtracted (models processed by
            TransformerLens's `center_writing_weights`); folded into the encoder.

    Raises:
        UndertowError: a file is missing or damaged, a shape or value is wrong, or the architecture is not supported.
    """
    config = _read_json(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS, config)
    activation = _activation(config, tensors, folder)
    encoder, decoder = tensors["W_enc"].double(), tensors["W_dec"]
    b_enc = tensors["b_enc"].double()
    if config.get("apply_b_dec_to_input", True):
        b_enc = b_enc - tensors["b_dec"].double() @ encoder
    if centre_input:
        encoder = encoder - encoder.mean(0)
    card = _read_json(folder / CARD) if (folder / CARD).exists() else {}
    return SAE(
        name=name, site=Site.parse(site or _hook_name(config, folder)), W_enc=encoder.float(), b_enc=b_enc.float(),
        W_dec=decoder.float(), b_dec=tensors["b_dec"].float(), activation=activation,
        norm_limit=card.get("norm_limit"), centred=centre_input, card=card,
        source={"folder": str(folder), "format": "saelens", "sha256": sha256_of(folder / WEIGHTS)},
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UndertowError(f"{path} cannot be read: {error}.", "Pass a folder in SAELens's format.") from error
    if not isinstance(found, dict):
        raise UndertowError(f"{path} holds no JSON object.", "Pass a folder in SAELens's format.")
    return found


def _read_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    width, latents = config.get("d_in"), config.get("d_sae")
    if not isinstance(width, int) or not isinstance(latents, int):
        raise UndertowError(f"{path.parent / CONFIG} gives no d_in and d_sae.", "Pass a folder in SAELens's format.")
    shapes = {"W_enc": [width, latents], "b_enc": [latents], "W_dec": [latents, width], "b_dec": [width]}
    if config.get("architecture") == "jumprelu":
        shapes["threshold"] = [latents]
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, shape in shapes.items():
                # The header is checked before anything of that size is allocated.
                found = file.get_slice(name).get_shape()
                if found != shape:
                    raise UndertowError(
                        f"{path}: {name} has shape {found}, cfg.json says {shape}.", "The files do not belong together."
                    )
                tensors[name] = file.get_tensor(name).float()
    except (OSError, SafetensorError) as error:
        raise UndertowError(
            f"{path} cannot be read: {error}.",
            "SAE weights must be in safetensors; pickled .pt files are refused because they can run code.",
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UndertowError(f"{path}: {name} holds values that are NaN or infinite.", "Fetch the file again.")
    return tensors


def _activation(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Activation:
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    # Older files hold a boolean here.
    scaled = config.get("normalize_activations", "none") not in (None, False, "none")
    unfolded = any(config.get(name) for name in ("finetuning_scaling_factor", "rescale_acts_by_decoder_norm"))
    if scaled or unfolded or config.get("reshape_activations", "none") != "none":
        raise UndertowError(
            f"{folder / CONFIG} asks for a normalisation of its input that is not folded into the weights.",
            "Fold it with SAELens before saving.",
        )
    if architecture == "jumprelu":
        return JumpReLU(tensors["threshold"])
    if architecture == "standard" and function == "relu":
        return ReLU()
    if architecture == "topk" or function == "topk":
        k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        if isinstance(k, int) and k > 0:
            return TopK(k)
    raise UndertowError(
        f"{folder / CONFIG}: architecture {architecture!r} with activation {function!r} is not supported.",
        "Supported: standard (relu), jumprelu, topk.",
    )


def _hook_name(config: dict[str, Any], folder: Path) -> str:
    metadata = config.get("metadata") or {}
    address = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    if not address:
        raise UndertowError(f"{folder / CONFIG} names no hook point.", "Give the site with --site.")
    return address
