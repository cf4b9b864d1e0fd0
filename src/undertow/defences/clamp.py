"""Clamping SAE features, in delta form and differentiable (method.md section 1; P8, P13).

At every position in scope:

1. read the defended latents `z_S` of the stream `h` (|S| encoder columns);
2. map them by the rule: `z'_S = rule(z_S)`;
3. write `h + (z'_S - z_S) @ W_dec[S]`, times the position's factor where the SAE normalises its input. The SAE's error term
   `r = h - D(E(h))` is thereby kept exactly; with `keep_error=False` the reconstruction takes the place of `h`.

Nothing is detached: a perturbation placed before the clamp has its gradient through the latents and through the error (P13).
Positions whose norm is beyond the SAE's `norm_limit` (massive activations) are left alone: the SAE was not trained on
them, and its reading there is meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from undertow.defences.base import Defence, FiringCount
from undertow.errors import UndertowError
from undertow.models.batch import Where
from undertow.models.residual import Edit
from undertow.saes.sae import FeatureSet
from undertow.sites import Site

Rule = Literal["set", "set_if_active", "scale", "zero", "floor", "cap"]
Positions = Literal["all", "last", "prompt", "generated"]

# z' as a function of the latents z and the clamp's value c, both [..., feature].
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda z, c: c.expand_as(z),
    "set_if_active": lambda z, c: torch.where(z > 0, c, z),
    "scale": lambda z, c: c * z,
    "zero": lambda z, c: torch.zeros_like(z),
    "floor": lambda z, c: torch.maximum(z, c),
    "cap": lambda z, c: torch.minimum(z, c),
}

IN_SCOPE: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda offsets: torch.ones_like(offsets, dtype=torch.bool),
    "last": lambda offsets: offsets == -1,
    "prompt": lambda offsets: offsets < 0,
    "generated": lambda offsets: offsets >= 0,
}


@dataclass(frozen=True, eq=False)
class Clamp:
    """A clamp of one feature set.

    Attributes:
        features: the defended set.
        rule: how the latents are changed.
        value: `c`, one number or one per feature, in the SAE's units; factor for `scale`, ignored by `zero`.
        keep_error: keep the SAE's error term (the field's usual form).
        positions: all, the last prompt position, the prompt, or the generated positions.
        skip_special: leave special tokens alone, as SAEBench does with BOS.
    """

    features: FeatureSet
    rule: Rule = "zero"
    value: float | Sequence[float] = 0.0
    keep_error: bool = True
    positions: Positions = "all"
    skip_special: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UndertowError(f"clamp rule {self.rule!r} is unknown.", f"Rules are {', '.join(get_args(Rule))}.")
        if self.positions not in IN_SCOPE:
            raise UndertowError(
                f"clamp positions {self.positions!r} are unknown.", f"Choose from {', '.join(get_args(Positions))}."
            )
        count = len(self.features.indices)
        if not isinstance(self.value, (int, float)) and len(self.value) != count:
            raise UndertowError(
                f"the clamp has {len(self.value)} values for {count} features.", "Give one value, or one per feature."
            )

    @property
    def site(self) -> Site:
        """Where the clamp acts."""
        return self.features.sae.site

    def clamped(self, latents: Float[Tensor, "*place feature"]) -> Float[Tensor, "*place feature"]:
        """`z'_S` for latents `z_S`."""
        value = torch.as_tensor(self.value, dtype=latents.dtype, device=latents.device)
        return RULES[self.rule](latents, value)

    def scope(self, stream: Float[Tensor, "batch slice d"], where: Where) -> Bool[Tensor, "batch slice"]:
        """Positions of this pass at which the clamp acts."""
        scope = where.mask & IN_SCOPE[self.positions](where.offsets) & self.features.sae.ordinary(stream)
        return scope & ~where.special if self.skip_special else scope

    def apply(
        self, stream: Float[Tensor, "batch slice d"], where: Where, count: FiringCount | None = None
    ) -> Float[Tensor, "batch slice d"]:
        """The stream after the clamp, in the stream's own type; the edit is computed in float32."""
        scope = self.scope(stream, where)
        if count is not None:
            count.add(scope, where)
        read = self.features.read(stream)
        change = ((self.clamped(read.post) - read.post) @ self.features.W_dec) * read.factor
        if not self.keep_error:
            sae = self.features.sae
            change = change + sae.decode(sae.encode(stream), stream) - sae.target(stream)
        return stream + (change * scope[..., None]).to(stream.dtype)

    def edit(self, count: FiringCount | None = None) -> Edit:
        """This clamp as an edit; `count` tallies its firings."""
        return Edit(self.site, lambda stream, where: self.apply(stream, where, count))


@dataclass(frozen=True, eq=False)
class Clamps(Defence):
    """Clamps at one site or several, at most one for each site.

    Raises:
        UndertowError: two clamps share a site, or there is none.
    """

    clamps: tuple[Clamp, ...]

    def __post_init__(self) -> None:
        sites = [clamp.site for clamp in self.clamps]
        if not sites or len(set(sites)) < len(sites):
            raise UndertowError(
                f"clamps at {', '.join(map(str, sites)) or 'no site'}: every site takes exactly one clamp.",
                "Put all features of a site into one clamp.",
            )

    @override
    def edits(self, count: FiringCount | None = None) -> list[Edit]:
        return [clamp.edit(count) for clamp in sorted(self.clamps, key=lambda clamp: clamp.site)]

    @property
    @override
    def defended(self) -> dict[Site, FeatureSet]:
        return {clamp.site: clamp.features for clamp in self.clamps}

    @override
    def describe(self) -> list[dict[str, Any]]:
        """Rule, value, error term, positions and features of every clamp: what names a clamp fully (method.md section 1)."""
        return [
            {
                "site": str(clamp.site), "sae": clamp.features.sae.name, "features": list(clamp.features.indices),
                "rule": clamp.rule, "value": clamp.value, "keep_error": clamp.keep_error,
                "positions": clamp.positions, "skip_special": clamp.skip_special,
                "skip_norm_above": clamp.features.sae.norm_limit,
            }
            for clamp in self.clamps
        ]  # fmt: skip
