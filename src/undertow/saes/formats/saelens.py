"""SAELens's folder format: `cfg.json` and `sae_weights.safetensors`, from its first releases to the present ones.

Standard (ReLU), gated, JumpReLU, TopK, and BatchTopK and Matryoshka SAEs, which it saves as JumpReLU for inference or, in
training checkpoints, under their own names with a running threshold. Both the flat configuration of older releases and the
one with a `metadata` section are understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undertow.errors import UndertowError
from undertow.saes.activations import Activation, JumpReLU, ReLU, TopK
from undertow.saes.files import TensorFile, read_json
from undertow.saes.formats.base import FORMATS, Format, flag, size
from undertow.saes.normalisation import ConstantNorm, LayerNorm, Normaliser
from undertow.saes.stored import Stored, batch_topk_threshold, gated

CONFIG, WEIGHTS, CARD = "cfg.json", "sae_weights.safetensors", "card.json"
NORMALISERS: dict[str, type[Normaliser]] = {kind.name: kind for kind in (LayerNorm, ConstantNorm)}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")


def read(folder: Path, overrides: dict[str, Any]) -> Stored:
    """What a folder in SAELens's format holds.

    Raises:
        UndertowError: a file is missing or damaged, a shape or value is wrong, or the architecture is not supported.
    """
    where = folder / CONFIG
    config = {**read_json(where), **overrides}
    # Before version 6 everything lay flat, and a BOS in front was the default.
    metadata = {"prepend_bos": True, **config} if "metadata" not in config else config["metadata"] or {}
    facts = {**config, **metadata, **overrides}
    width, latents = size(config, "d_in", where), size(config, "d_sae", where)
    architecture = _architecture(config, where)
    _refuse_what_is_unfolded(config, where)
    file = TensorFile(folder / WEIGHTS)
    _refuse_finetuned(file, latents)
    encoder, b_enc, activation = _encoder(file, architecture, config, width, latents)
    normalisation = _normalisation(config)
    if normalisation == "covariance_whitening":
        raise UndertowError(
            f"{where} asks for covariance whitening, whose matrices are not among the SAE's files.",
            "Fold it with SAELens (`fold_activation_whitening`) and save the SAE again; then nothing is left to ask for.",
        )
    card = read_json(folder / CARD) if (folder / CARD).exists() else {}
    limit = card.get("norm_limit")
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise UndertowError(f"{folder / CARD}: norm_limit is {limit!r}, expected a positive number.", "Mend the file.")
    loading = facts.get("model_from_pretrained_kwargs") or {}
    return Stored(
        encoder, b_enc, file.take("W_dec", latents, width), file.take("b_dec", width), activation, file.path, "saelens",
        subtract_b_dec=flag(config, "apply_b_dec_to_input", True, where),
        # The library honours it for these alone, whatever the configuration of the others says.
        decoder_norm_units=architecture in ("topk", *BATCH_TOPK) and flag(config, "rescale_acts_by_decoder_norm", False, where),
        normaliser=NORMALISERS[normalisation]() if normalisation in NORMALISERS else None,
        scale_unknown=normalisation == "expected_average_only_in",
        site=facts.get("hook_name") or facts.get("hook_point"),
        # A layer norm takes the mean out by itself.
        centred=flag(loading, "center_writing_weights", False, where) and normalisation != LayerNorm.name,
        prepend_bos=flag(facts, "prepend_bos", False, where) if "prepend_bos" in facts else None,
        neuronpedia=facts.get("neuronpedia_id"),
        norm_limit=limit, card=card,
    )  # fmt: skip


def _architecture(config: dict[str, Any], where: Path) -> str:
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if "transcoder" in str(architecture) or (config.get("d_out") or config.get("d_in")) != config.get("d_in"):
        raise UndertowError(
            f"{where} is of a transcoder: it reads one place and writes what another computes, so it does not reconstruct the "
            "residual stream and no clamp with its error kept can be made of it.",
            "Choose an SAE of the residual stream.",
        )
    if architecture == "standard" and function == "topk":
        return "topk"
    if architecture in ("gated", "jumprelu", "topk", *BATCH_TOPK) or (architecture == "standard" and function == "relu"):
        return architecture
    raise UndertowError(
        f"{where}: architecture {architecture!r} with activation {function!r} is not supported.",
        f"Supported: standard (relu), gated, jumprelu, topk, {', '.join(BATCH_TOPK)}.",
    )


def _normalisation(config: dict[str, Any]) -> str:
    found = config.get("normalize_activations")
    if isinstance(found, bool) or found is None:
        # Older files hold a boolean here.
        return "expected_average_only_in" if found else "none"
    return str(found)


def _refuse_what_is_unfolded(config: dict[str, Any], where: Path) -> None:
    known = {"none", "expected_average_only_in", "covariance_whitening", *NORMALISERS}
    if _normalisation(config) not in known:
        raise UndertowError(
            f"{where}: normalize_activations is {_normalisation(config)!r}, which is not known.", f"Known: {', '.join(known)}."
        )
    if (config.get("reshape_activations") or "none") != "none":
        raise UndertowError(f"{where} is of an SAE of attention heads.", "Choose an SAE of the residual stream.")


def _refuse_finetuned(file: TensorFile, latents: int) -> None:
    """Old files carry a scaling factor per latent, which is 1 unless the SAE was fine-tuned."""
    for name in {"scaling_factor", "finetuning_scaling_factor"} & file.shapes.keys():
        if not torch.allclose(file.take(name, latents), torch.ones(latents)):
            raise UndertowError(
                f"{file.path} holds a fine-tuning scaling factor, which SAELens itself no longer applies.",
                "Multiply it into W_dec, row by row, and save the SAE without it.",
            )


def _encoder(
    file: TensorFile, architecture: str, config: dict[str, Any], width: int, latents: int
) -> tuple[Tensor, Tensor, Activation]:
    encoder = file.take("W_enc", width, latents)
    if architecture == "gated":
        return gated(encoder, *(file.take(name, latents) for name in ("r_mag", "b_mag", "b_gate")))
    bias = file.take("b_enc", latents)
    if architecture == "jumprelu":
        if "log_threshold" in file:
            return encoder, bias, JumpReLU(file.take("log_threshold", latents).exp())
        return encoder, bias, JumpReLU(file.take("threshold", latents))
    if architecture in BATCH_TOPK:
        return encoder, bias, batch_topk_threshold(file.take("topk_threshold").item(), latents)
    if architecture == "topk":
        k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        return encoder, bias, TopK(size({"k": k}, "k", file.path.parent / CONFIG))
    return encoder, bias, ReLU()


FORMATS.add("saelens", Format("SAELens", WEIGHTS, (CONFIG, CARD), read))
