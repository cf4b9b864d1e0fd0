"""An SAE as a library stored it, and how it becomes `saes.sae.SAE`, undertow's one form.

    x = normalise(h * input_scale)      pre = (x - b_dec if subtract_b_dec) @ W_enc + b_enc
    z = activation(pre)                 h_hat = denormalise(z @ W_dec + b_dec) / input_scale

1. `subtract_b_dec`, a constant `input_scale` and centring of the input are linear and are folded into the four tensors, in
   float64;
2. latents whose sparsity is decided on `z * ||W_dec||` (`rescale_acts_by_decoder_norm`) are given in these units, with decoder
   rows of unit norm;
3. a gated SAE is a JumpReLU SAE: `gate > 0` says the same as `magnitude pre-activation > theta`, with
   `theta = b_mag - exp(r_mag) * b_gate`;
4. normalisations of each position by itself are kept and run (`saes.normalisation`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.cache import sha256_of
from undertow.errors import UndertowError
from undertow.saes.activations import Activation, JumpReLU
from undertow.saes.normalisation import Normaliser
from undertow.saes.sae import SAE
from undertow.sites import Site


@dataclass(frozen=True)
class Overrides:
    """What the user, or a registry of releases, says about an SAE beyond its own files; `None`: nothing.

    Attributes:
        site: address that replaces the one in its configuration.
        centre_input: it reads residuals with their mean over dimensions subtracted (TransformerLens's
            `center_writing_weights`).
        input_scale: constant factor on the stream before encoding.
        release_scale: the same, used only where the files leave the factor open.
        neuronpedia: `model/source` on Neuronpedia.
    """

    site: str | None = None
    centre_input: bool | None = None
    input_scale: float | None = None
    release_scale: float | None = None
    neuronpedia: str | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """What the files say.

    Attributes:
        W_enc: `[d_model, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_model]`.
        b_dec: `[d_model]`.
        activation: from pre-activations to latents.
        weights: the file that the tensors came from.
        format: name of its format.
        subtract_b_dec: the decoder bias is subtracted from the input.
        decoder_norm_units: the activation acts on `pre * ||W_dec||`, and the decoder divides by it.
        normaliser: normalisation at run time.
        scale_unknown: it was trained on a stream scaled by a constant that the files do not give
            (`expected_average_only_in`, not folded).
        site: its hook point; `None` where the files do not say.
        centred: it reads mean-centred residuals.
        prepend_bos: whether it was trained on texts with a BOS in front; `None` where the files do not say.
        neuronpedia: `model/source` on Neuronpedia.
        norm_limit: see `SAE`.
        card: see `SAE`.
    """

    W_enc: Float[Tensor, "d latent"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d"]
    b_dec: Float[Tensor, " d"]
    activation: Activation
    weights: Path
    format: str
    subtract_b_dec: bool
    decoder_norm_units: bool = False
    normaliser: Normaliser | None = None
    scale_unknown: bool = False
    site: str | None = None
    centred: bool = False
    prepend_bos: bool | None = None
    neuronpedia: str | None = None
    norm_limit: float | None = None
    card: dict[str, Any] = field(default_factory=dict)


def gated(
    W_enc: Tensor, r_mag: Tensor, b_mag: Tensor, b_gate: Tensor
) -> tuple[Float[Tensor, "d latent"], Float[Tensor, " latent"], JumpReLU]:
    """Encoder, bias and activation of the JumpReLU SAE that a gated one equals (step 3; float64)."""
    stretch = r_mag.double().exp()
    thresholds = b_mag.double() - stretch * b_gate.double()
    return W_enc.double() * stretch, b_mag.double(), JumpReLU(thresholds.float())


def canonical(stored: Stored, name: str, overrides: Overrides) -> SAE:
    """The SAE in undertow's form.

    Raises:
        UndertowError: the hook point is neither in the files nor given, or no address of the residual stream; or overrides
            contradict the files.
    """
    address = overrides.site or stored.site
    if not address:
        raise UndertowError(f"{stored.weights.parent} names no hook point.", "Give the site with --site.")
    centred = stored.centred if overrides.centre_input is None else overrides.centre_input
    if stored.normaliser and (overrides.input_scale or centred):
        raise UndertowError(
            f"SAE {name} normalises each position by itself ({stored.normaliser.name}); an input scale or centring does not "
            "belong with that.",
            "Leave --input-scale and --centre-input out.",
        )
    scale = overrides.input_scale or (overrides.release_scale if stored.scale_unknown else None)
    encoder, b_enc = stored.W_enc.double(), stored.b_enc.double()
    decoder, b_dec = stored.W_dec.double(), stored.b_dec.double()
    activation = stored.activation
    if stored.subtract_b_dec:
        b_enc = b_enc - b_dec @ encoder
    if stored.decoder_norm_units:
        norms = decoder.norm(dim=-1)
        encoder, b_enc, decoder = encoder * norms, b_enc * norms, decoder / norms.clamp(min=1e-30)[:, None]
    if scale:
        encoder, decoder, b_dec = encoder * scale, decoder / scale, b_dec / scale
    if centred:
        encoder = encoder - encoder.mean(0)
    _check_sound(stored, (encoder, b_enc, decoder, b_dec))
    return SAE(
        name=name, site=Site.parse(address), W_enc=encoder.float(), b_enc=b_enc.float(), W_dec=decoder.float(),
        b_dec=b_dec.float(), activation=activation, normaliser=stored.normaliser, norm_limit=stored.norm_limit,
        centred=centred, scale_unknown=stored.scale_unknown and not scale,
        prepend_bos=stored.prepend_bos, neuronpedia=overrides.neuronpedia or stored.neuronpedia, card=stored.card,
        source={
            "folder": str(stored.weights.parent), "weights": stored.weights.name, "format": stored.format,
            "sha256": sha256_of(stored.weights),
        },
    )  # fmt: skip


def _check_sound(stored: Stored, tensors: tuple[Tensor, ...]) -> None:
    thresholds = getattr(stored.activation, "thresholds", torch.zeros(1))
    if not all(torch.isfinite(tensor.float()).all() for tensor in (*tensors, thresholds)):
        raise UndertowError(f"{stored.weights}: the folded weights are not finite.", "The file is damaged; fetch it again.")
    k, latents = getattr(stored.activation, "k", 1), stored.W_enc.shape[1]
    if k > latents:
        raise UndertowError(f"{stored.weights}: k is {k}, and there are {latents} latents.", "The file is damaged.")


def batch_topk_threshold(value: float, latents: int) -> JumpReLU:
    """The activation of a BatchTopK SAE at inference: one threshold for all latents."""
    return JumpReLU(torch.full((latents,), float(value)))
