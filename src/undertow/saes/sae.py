"""A sparse autoencoder in one canonical form, whatever file it came from.

    pre = x @ W_enc + b_enc        z = activation(pre)        x_hat = z @ W_dec + b_dec

where `x` is the stream `h` itself, or, for the SAEs that normalise every position at run time, `x = (h - shift) / divisor`
and `h_hat = x_hat * factor + shift`. `saes.stored` folds everything that is linear (input scaling, subtraction of the decoder
bias, centring) into the four tensors, in float64. They are kept in float32 whatever the model's type: a rounded encoder would
quantise the drift that is to be measured (P17).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undertow.errors import UndertowError
from undertow.saes.activations import Activation
from undertow.saes.normalisation import Normaliser
from undertow.sites import Site


@dataclass(frozen=True, eq=False)
class Latents:
    """What an SAE reads of some latents.

    Attributes:
        pre: `[..., latent]` pre-activations.
        post: `[..., latent]` activations.
        threshold: `[..., latent]` pre-activation above which each latent would be active.
        factor: `[..., 1]` length in the stream of a vector of unit length in the SAE's output; 1 without a normaliser.
    """

    pre: Float[Tensor, "*place latent"]
    post: Float[Tensor, "*place latent"]
    threshold: Float[Tensor, "*place latent"]
    factor: Float[Tensor, "*place one"]


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of the residual stream at a site.

    Attributes:
        name: what the user called it.
        site: where in the model it was trained.
        W_enc: `[d_model, d_sae]`, float32.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_model]`.
        b_dec: `[d_model]`.
        activation: from pre-activations to latents.
        norm_limit: norm of the residual stream above which a position is a massive activation and outside of what the SAE
            was trained on; `None` where there is no such limit.
        normaliser: normalisation of every position at run time, if any.
        centred: it reconstructs the stream minus its mean over dimensions (`center_writing_weights`).
        scale_unknown: it was trained on a stream scaled by a constant that neither its files nor the user gave.
        prepend_bos: whether it was trained on texts with a BOS in front; `None` where that is not known.
        neuronpedia: `model/source` on Neuronpedia, where known.
        card: facts that came with the weights (held-out quality, recipe); may be empty.
        source: facts for the run log: folder, weights file, format, digest of the weights.
    """

    name: str
    site: Site
    W_enc: Float[Tensor, "d latent"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d"]
    b_dec: Float[Tensor, " d"]
    activation: Activation
    norm_limit: float | None = None
    normaliser: Normaliser | None = None
    centred: bool = False
    scale_unknown: bool = False
    prepend_bos: bool | None = None
    neuronpedia: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @property
    def d_model(self) -> int:
        """Width of the residual stream it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def encode(self, stream: Float[Tensor, "*place d"]) -> Float[Tensor, "*place latent"]:
        """All latents `[..., d_sae]`, in float32."""
        return self.activation(self.seen(stream) @ self.W_enc + self.b_enc)

    def decode(self, latents: Float[Tensor, "*place latent"], stream: Float[Tensor, "*place d"]) -> Float[Tensor, "*place d"]:
        """Reconstruction `[..., d_model]` of a stream from its latents; the stream matters where the SAE normalises it."""
        output = latents @ self.W_dec + self.b_dec
        if self.normaliser is None:
            return output
        frame = self.normaliser.frame(stream.float())
        return output * frame.factor + frame.shift

    def seen(self, stream: Float[Tensor, "*place d"]) -> Float[Tensor, "*place d"]:
        """What the encoder's columns are applied to, in float32."""
        stream = stream.float()
        if self.normaliser is None:
            return stream
        frame = self.normaliser.frame(stream)
        return (stream - frame.shift) / frame.divisor

    def factor(self, stream: Float[Tensor, "*place d"]) -> Float[Tensor, "*place one"]:
        """Length in the stream of a vector of unit length in the SAE's output, `[..., 1]`."""
        if self.normaliser is None:
            return torch.ones(*stream.shape[:-1], 1, device=stream.device)
        return self.normaliser.frame(stream.float()).factor

    def target(self, stream: Float[Tensor, "*place d"]) -> Float[Tensor, "*place d"]:
        """What the reconstruction is to be compared with: the stream in float32, centred where the SAE is."""
        stream = stream.float()
        return stream - stream.mean(-1, keepdim=True) if self.centred else stream

    def ordinary(self, stream: Float[Tensor, "*place d"]) -> Tensor:
        """`[...]` true where the position's norm is within `norm_limit`, that is, where the SAE applies."""
        if self.norm_limit is None:
            return torch.ones(stream.shape[:-1], dtype=torch.bool, device=stream.device)
        return stream.detach().float().norm(dim=-1) <= self.norm_limit

    def features(self, indices: Sequence[int]) -> FeatureSet:
        """A view of chosen latents.

        Raises:
            UndertowError: an index is out of range or given twice, or there is none.
        """
        for index in indices:
            if not 0 <= index < self.d_sae:
                raise UndertowError(
                    f"feature {index} is out of range: SAE {self.name} has features 0 to {self.d_sae - 1}.",
                    "Check the index and that it belongs to this SAE.",
                )
        if not indices or len(set(indices)) < len(indices):
            raise UndertowError(
                f"the feature list {list(indices)} is empty or names a feature twice.", "List each feature once."
            )
        return FeatureSet(self, tuple(indices))

    def rescaled(self, scale: float) -> SAE:
        """The same SAE, reading the stream times `scale`."""
        return replace(self, W_enc=self.W_enc * scale, W_dec=self.W_dec / scale, b_dec=self.b_dec / scale, scale_unknown=False)

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE on another device."""
        if self.W_enc.device == torch.device(device):
            return self
        tensors = {name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return replace(self, **tensors, activation=self.activation.to(device))


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A defended set `S` of latents of one SAE: |S| columns and rows instead of the whole dictionary (E3)."""

    sae: SAE
    indices: tuple[int, ...]

    @cached_property
    def index(self) -> Int[Tensor, " feature"]:
        """The indices as a tensor on the SAE's device."""
        return torch.tensor(self.indices, device=self.sae.W_enc.device)

    @cached_property
    def W_enc(self) -> Float[Tensor, "d feature"]:
        """Encoder columns `A_S`."""
        return self.sae.W_enc[:, self.index].contiguous()

    @cached_property
    def b_enc(self) -> Float[Tensor, " feature"]:
        """Encoder biases."""
        return self.sae.b_enc[self.index]

    @cached_property
    def W_dec(self) -> Float[Tensor, "feature d"]:
        """Decoder rows."""
        return self.sae.W_dec[self.index].contiguous()

    @cached_property
    def _activation(self) -> Activation:
        return self.sae.activation.at(self.index)

    def read(self, stream: Float[Tensor, "*place d"]) -> Latents:
        """Pre-activations, activations and thresholds of the set, each `[..., |S|]`, differentiable, in float32."""
        seen, factor = self.sae.seen(stream), self.sae.factor(stream)
        if self.sae.activation.elementwise:
            pre = seen @ self.W_enc + self.b_enc
            return Latents(pre, self._activation(pre), self._activation.threshold(pre).expand_as(pre), factor)
        pre = seen @ self.sae.W_enc + self.sae.b_enc
        post, threshold = self.sae.activation(pre), self.sae.activation.threshold(pre).expand_as(pre)
        return Latents(pre[..., self.index], post[..., self.index], threshold[..., self.index], factor)
