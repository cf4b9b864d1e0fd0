"""Addresses of places in the residual stream.

A decoder of `n` layers has `n + 1` places between its blocks. `Site.boundary` counts the blocks that have run before the
place: `blocks.L.hook_resid_pre` is boundary `L`, `blocks.L.hook_resid_post` is boundary `L + 1`, and the output of the Hugging
Face module `model.layers.L` is the same place as the latter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from undertow.errors import UndertowError

_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_MODULE = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|blocks|block|h)\.(\d+)")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the residual stream, equal to every other address of the same place.

    Attributes:
        boundary: number of decoder blocks that ran before it, 0 to the number of layers.
    """

    boundary: int

    @classmethod
    def parse(cls, address: str) -> Site:
        """The site that an address names.

        Args:
            address: `blocks.L.hook_resid_pre`, `blocks.L.hook_resid_post`, or the Hugging Face name of a decoder layer
                such as `model.layers.12` or `transformer.h.12`, which means that layer's output.

        Raises:
            UndertowError: the address has none of these forms.
        """
        if match := _HOOK.fullmatch(address):
            return cls(int(match[1]) + (match[2] == "post"))
        if match := _MODULE.fullmatch(address):
            return cls(int(match[1]) + 1)
        raise UndertowError(
            f"site {address!r} is not an address of the residual stream.",
            "Use blocks.L.hook_resid_pre, blocks.L.hook_resid_post, or the name of a decoder layer like model.layers.12.",
        )

    @classmethod
    def post(cls, layer: int) -> Site:
        """The output of decoder layer `layer`."""
        return cls(layer + 1)

    def check(self, n_layers: int) -> Site:
        """This site, if a model of `n_layers` has it.

        Raises:
            UndertowError: the model has fewer layers.
        """
        if self.boundary > n_layers:
            raise UndertowError(
                f"site {self} lies beyond the model, which has layers 0 to {n_layers - 1}.", "Choose a lower layer."
            )
        return self

    def __str__(self) -> str:
        return f"blocks.{self.boundary - 1}.hook_resid_post" if self.boundary else "blocks.0.hook_resid_pre"
