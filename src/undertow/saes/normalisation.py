"""Normalisations that an SAE applies to every position at run time, and that cannot be folded into its weights.

The SAE reads `x = (h - shift) / divisor` and its output `x_hat` stands for `x_hat * factor + shift` in the stream, where shift,
divisor and factor depend on the position. Constant scalings and centring are linear and are folded by `saes.stored` instead.
The dependence on `h` is differentiable and nothing of it is detached (P13).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Frame:
    """How a position's stream and the SAE's input are related; each `[..., 1]`."""

    shift: Float[Tensor, "*place one"]
    divisor: Float[Tensor, "*place one"]
    factor: Float[Tensor, "*place one"]


class Normaliser(ABC):
    """A normalisation of every position by itself."""

    name: str

    @abstractmethod
    def removed(self, d_model: int) -> Float[Tensor, "d n"]:
        """Directions that the normalisation takes out of the stream before it measures its size."""

    @abstractmethod
    def frame(self, stream: Float[Tensor, "*place d"]) -> Frame:
        """The frame of every position of a stream in float32."""


class LayerNorm(Normaliser):
    """Mean 0 and unit standard deviation, as SAELens's `layer_norm` has it (unbiased deviation, 1e-5 added going in only)."""

    name = "layer_norm"

    @override
    def frame(self, stream: Float[Tensor, "*place d"]) -> Frame:
        deviation = stream.std(-1, keepdim=True)
        return Frame(stream.mean(-1, keepdim=True), deviation + 1e-5, deviation)

    @override
    def removed(self, d_model: int) -> Float[Tensor, "d n"]:
        return torch.full((d_model, 1), d_model**-0.5)


class ConstantNorm(Normaliser):
    """Every position scaled to the norm `sqrt(d_model)`: SAELens's `constant_norm_rescale`."""

    name = "constant_norm_rescale"

    @override
    def frame(self, stream: Float[Tensor, "*place d"]) -> Frame:
        size = stream.norm(dim=-1, keepdim=True) / stream.shape[-1] ** 0.5
        return Frame(torch.zeros_like(size), size, size)

    @override
    def removed(self, d_model: int) -> Float[Tensor, "d n"]:
        return torch.ones(d_model, 0)
