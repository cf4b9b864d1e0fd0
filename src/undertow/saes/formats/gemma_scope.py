"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, with or without a `config.json`).

JumpReLU SAEs of Gemma 2 and Gemma 3 that read the raw stream, trained on texts that start with a BOS. The layer stands in the
path: `layer_20/width_16k/average_l0_71`, or `resid_post/layer_12_width_16k_l0_small`. SAEs of attention and MLP outputs,
transcoders and cross-layer transcoders, which lie in the same repositories, are told apart by their paths and refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from undertow.errors import UndertowError
from undertow.saes.activations import JumpReLU
from undertow.saes.files import TensorFile, read_json
from undertow.saes.formats.base import FORMATS, Format
from undertow.saes.stored import Stored

ELSEWHERE = re.compile(r"-(?:att|mlp)\b|/(?:attn_out|mlp_out|embedding)|transcoder|crosscoder|clt")
PARTS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
LAYER = re.compile(r"(?:^|/)layer_(\d+)(?=[/_]|$)")


def read_npz(folder: Path, overrides: dict[str, Any]) -> Stored:
    """A Gemma Scope SAE.

    Raises:
        UndertowError: the file is damaged, or of an SAE of another place than the residual stream.
    """
    return _read(TensorFile(folder / "params.npz"), "gemma-scope")


def read_safetensors(folder: Path, overrides: dict[str, Any]) -> Stored:
    """A Gemma Scope 2 SAE.

    Raises:
        UndertowError: as `read_npz`.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    hook = config.get("hf_hook_point_in")
    expected = {
        "architecture": ("jump_relu",), "type": ("sae",), "affine_connection": (False,), "hf_hook_point_out": (hook, None)
    }  # fmt: skip
    for key, allowed in expected.items():
        if key in config and config[key] not in allowed:
            raise UndertowError(
                f"{folder / 'config.json'}: {key} is {config[key]!r}, expected {allowed[0]!r}: this is no SAE of one place.",
                "Choose an SAE of the residual stream.",
            )
    return _read(TensorFile(folder / "params.safetensors"), "gemma-scope-2", None if hook is None else str(hook))


def _read(file: TensorFile, name: str, hook: str | None = None) -> Stored:
    path = _within_release(file.path.parent.resolve())
    elsewhere = ELSEWHERE.search(path)
    if elsewhere or (hook and not re.fullmatch(r"model\.layers\.\d+\.output", hook)):
        what = hook or (elsewhere and elsewhere.group().strip("-/"))
        raise UndertowError(f"{path} is not of the residual stream but of {what}.", "Choose an SAE of the residual stream.")
    names = {name.lower(): name for name in file.shapes}
    if len(file.shapes.get(names.get("w_enc", ""), ())) != 2:
        raise UndertowError(f"{file.path} holds no encoder matrix.", "The file does not belong to this format.")
    width, latents = file.shapes[names["w_enc"]]
    extra = sorted(names.keys() - PARTS)
    if extra:
        raise UndertowError(f"{file.path} also holds {', '.join(extra)}: this is no plain SAE.", "Choose a plain SAE.")
    layers = LAYER.findall(path)
    if layers and hook and _site(hook) != f"model.layers.{layers[-1]}":
        raise UndertowError(f"{path}: config.json says {hook}, the path layer {layers[-1]}.", "They do not belong together.")
    return Stored(
        W_enc=file.take(names["w_enc"], width, latents), b_enc=file.take("b_enc", latents),
        W_dec=file.take(names.get("w_dec", "w_dec"), latents, width), b_dec=file.take("b_dec", width),
        activation=JumpReLU(file.take("threshold", latents)), weights=file.path, format=name, subtract_b_dec=False,
        site=f"blocks.{layers[-1]}.hook_resid_post" if layers else _site(hook), prepend_bos=True,
    )  # fmt: skip


def _within_release(folder: Path) -> str:
    """The path from the release's folder on; what lies above it is the user's own and says nothing."""
    parts = folder.parts
    starts = [index for index, part in enumerate(parts) if "gemma-scope" in part]
    return "/" + "/".join(parts[starts[-1] if starts else -3 :])


def _site(hook: str | None) -> str | None:
    """`model.layers.12.output` is the output of that layer."""
    return hook.removesuffix(".output") if hook else None


FORMATS.add("gemma-scope", Format("Gemma Scope", "params.npz", (), read_npz))
FORMATS.add("gemma-scope-2", Format("Gemma Scope 2", "params.safetensors", ("config.json",), read_safetensors))
