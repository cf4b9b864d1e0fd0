"""Feature addresses on Neuronpedia: `https://www.neuronpedia.org/gpt2-small/8-res-jb/123` names a model, a source and an index.

A source starts with the layer that it was trained at. Addresses are read and printed; nothing is fetched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from undertow.errors import UndertowError

_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?neuronpedia\.org/(?P<model>[\w.-]+)/(?P<source>(?P<layer>\d+)-[\w.-]+)/(?P<index>\d+)/?(?:[?#].*)?"
)


@dataclass(frozen=True)
class Address:
    """A feature on Neuronpedia.

    Attributes:
        model: Neuronpedia's name of the model.
        layer: the layer, as the source gives it.
        source: name of the SAE, layer included, such as `8-res-jb`.
        index: index of the feature.
    """

    model: str
    layer: int
    source: str
    index: int

    @property
    def sae(self) -> str:
        """`model/source`, which names the SAE."""
        return f"{self.model}/{self.source}"


def is_address(text: str) -> bool:
    """Whether a text means to be an address on Neuronpedia."""
    return "neuronpedia.org" in text


def parse_address(text: str) -> Address:
    """The feature that an address names.

    Raises:
        UndertowError: it is not the address of a feature.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if not match:
        raise UndertowError(
            f"{text!r} is not the address of a feature on Neuronpedia.",
            "It has the form https://www.neuronpedia.org/MODEL/LAYER-SOURCE/INDEX.",
        )
    return Address(match["model"], int(match["layer"]), match["source"], int(match["index"]))


def feature_url(sae: str, index: int) -> str:
    """The page of a feature of the SAE `model/source`."""
    return f"https://www.neuronpedia.org/{sae}/{index}"
