"""Activation functions of sparse autoencoders, from pre-activations to latents.

An activation is *elementwise* when each latent depends on its own pre-activation only (ReLU, JumpReLU). Then a clamp of a few
features needs only their encoder columns; otherwise (TopK) every pre-activation has to be computed (method.md is explicit
on this: the shortcut is exact for ReLU and JumpReLU only).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override


class Activation(ABC):
    """Maps pre-activations to latents, over the last axis."""

    elementwise: ClassVar[bool]
    """Whether each latent depends on its own pre-activation only."""

    @abstractmethod
    def __call__(self, pre: Tensor) -> Tensor:
        """Latents, of the shape of `pre`."""

    @abstractmethod
    def threshold(self, pre: Tensor) -> Tensor:
        """Per latent, the pre-activation above which it is active; broadcastable to `pre`."""

    @abstractmethod
    def at(self, features: Tensor) -> Activation:
        """The same activation for chosen latents; elementwise ones only."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Activation:
        """The same activation on another device."""


@dataclass(frozen=True)
class ReLU(Activation):
    """`max(pre, 0)`."""

    elementwise = True

    @override
    def __call__(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    @override
    def threshold(self, pre: Tensor) -> Tensor:
        return torch.zeros_like(pre)

    @override
    def at(self, features: Tensor) -> ReLU:
        return self

    @override
    def to(self, device: torch.device | str) -> ReLU:
        return self


@dataclass(frozen=True, eq=False)
class JumpReLU(Activation):
    """`pre` where it exceeds a threshold per latent, else 0 (arXiv 2407.14435).

    The derivative used is the one almost everywhere: 1 above the threshold, 0 below; inactive latents have none (P3).
    """

    thresholds: Float[Tensor, " latent"]
    elementwise = True

    @override
    def __call__(self, pre: Tensor) -> Tensor:
        return torch.relu(pre) * (pre > self.thresholds)

    @override
    def threshold(self, pre: Tensor) -> Tensor:
        return self.thresholds.clamp(min=0)

    @override
    def at(self, features: Tensor) -> JumpReLU:
        return JumpReLU(self.thresholds[features])

    @override
    def to(self, device: torch.device | str) -> JumpReLU:
        return JumpReLU(self.thresholds.to(device))


@dataclass(frozen=True)
class TopK(Activation):
    """The `k` largest pre-activations, through a ReLU; the others 0 (arXiv 2406.04093)."""

    k: int
    elementwise = False

    @override
    def __call__(self, pre: Tensor) -> Tensor:
        best = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, torch.relu(best.values))

    def threshold(self, pre: Tensor) -> Tensor:
        """The k-th largest pre-activation: what a latent has to exceed to be among the active ones."""
        return pre.topk(self.k, dim=-1).values[..., -1:].clamp(min=0)

    @override
    def at(self, features: Tensor) -> TopK:
        raise ValueError("TopK latents depend on each other; encode all of them")

    @override
    def to(self, device: torch.device | str) -> TopK:
        return self
