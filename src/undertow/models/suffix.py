"""The suffix pass: run only what a perturbation can change (E1, E2, E5).

A perturbation at boundary `b`, from column `c` on, cannot change the blocks below `b`, nor the keys and values of columns
before `c`. So, once for a batch:

1. run the prompt's first `c` columns under the given edits and keep the keys and values of all blocks;
2. run the other columns and keep the stream as it *enters* the site, before any edit there.

And then for every step:

3. replace the blocks below `b` by pass-through stand-ins, start from a shallow copy of the cache (attention concatenates, it
   does not write in place), and put the kept stream in at block `b`;
4. apply the edits at `b` and above to that stream, the perturbation among them, and run the remaining blocks.

The model's own decoder runs all of this, so each architecture keeps its masks, rotary embeddings and norms, and the result
equals that of the full pass. The design is ours; that it is exact follows from causality and is tested per architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Edit, Recorder, run
from undertow.sites import Site


class _Bypassed(nn.Module):
    """Stands in for a block that need not run; other attributes, and whether it returns a tuple, are those of the block."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_as_tuple", as_tuple)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if object.__getattribute__(self, "_as_tuple") else hidden_states


@contextmanager
def _bypassed(model: LanguageModel, boundary: int, as_tuple: bool) -> Iterator[None]:
    layers = model.layers
    blocks = list(layers[:boundary])
    try:
        for index, block in enumerate(blocks):
            layers[index] = _Bypassed(block, as_tuple)
        yield
    finally:
        for index, block in enumerate(blocks):
            layers[index] = block


@contextmanager
def _watched(model: LanguageModel) -> Iterator[list[bool]]:
    """Whether blocks return tuples, as seen in the passes run inside the block."""
    seen: list[bool] = []
    handle = model.layers[0].register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    try:
        yield seen
    finally:
        handle.remove()


def _copy_of(cache: DynamicCache | None, rows: Tensor | None = None) -> DynamicCache | None:
    """A cache that can be extended without changing this one; with `rows`, of those samples only."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers if rows is not None else ():
        state: Any = layer
        state.keys, state.values = state.keys[rows], state.values[rows]
    return copied


class SuffixPass:
    """A batch prepared for many passes that differ only at and after `site`, from offset `first_offset` on.

    Args:
        model: the language model.
        batch: prompts, of any lengths.
        site: where the perturbation enters.
        edits: the defence, active in every column.
        first_offset: first offset that may change, counted from the end of the prompt (-1 is its last token); `None` for
            all columns.
        prompt_width: number of columns of `batch` that are prompt, when it also holds an answer; default all.

    Attributes:
        entering: `[batch, slice, d_model]` the stream that enters the site, before any edit there.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: Batch,
        site: Site,
        edits: Sequence[Edit] = (),
        first_offset: int | None = -1,
        prompt_width: int | None = None,
    ) -> None:
        self.model, self.batch, self.site = model, batch, site.check(model.n_layers)
        self.prompt_width = batch.width if prompt_width is None else prompt_width
        self.first = 0 if first_offset is None else max(0, self.prompt_width + first_offset)
        self._edits = [edit for edit in edits if edit.site >= site]
        self._cache: DynamicCache | None = None
        entering = Recorder(site)
        with torch.no_grad(), _watched(model) as returned:
            if self.first:
                self._cache = DynamicCache(config=model.config)
                run(model, batch, edits, columns=(0, self.first), prompt_width=self.prompt_width, cache=self._cache)
            run(model, batch, [entering.edit, *edits], **self._slice())
        self._as_tuple = returned[-1]
        self.entering: Float[Tensor, "batch slice d"] = entering.states

    def select(self, rows: Tensor) -> SuffixPass:
        """The same preparation for the samples at `rows` only, with nothing computed again (E4)."""
        chosen = copy.copy(self)
        chosen.batch, chosen.entering = self.batch.select(rows), self.entering[rows]
        chosen._cache = _copy_of(self._cache, rows)
        return chosen

    def _slice(self) -> dict[str, Any]:
        return {
            "columns": (self.first, self.batch.width),
            "prompt_width": self.prompt_width,
            "cache": _copy_of(self._cache),
        }

    def __call__(self, before: Sequence[Edit] = (), after: Sequence[Edit] = ()) -> Float[Tensor, "batch slice d"]:
        """Final hidden states of the slice.

        Args:
            before: edits that run ahead of the defence's at their site.
            after: edits that run behind the defence's at their site.
        """
        entry = Edit(self.site, lambda stream, where: self.entering.to(stream.dtype))
        with _bypassed(self.model, self.site.boundary, self._as_tuple):
            return run(self.model, self.batch, [entry, *before, *self._edits, *after], **self._slice())
