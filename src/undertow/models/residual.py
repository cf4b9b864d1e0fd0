"""Running a decoder with edits of its residual stream, whole or in slices with a key-value cache.

An *edit* is a function of the residual stream at one site. Edits at one site run in the order given, which is how
`clamp-then-delta` and `delta-then-clamp` differ (P8). Every edit is told which columns it is looking at (`Where`), so that
an edit meant for offset `p` acts at `p` whether the pass sees the whole prompt or a single decoded token (P7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from undertow.models.batch import Batch, Where
from undertow.models.language_model import LanguageModel
from undertow.sites import Site

EditFunction = Callable[[Tensor, Where], Tensor]


@dataclass(frozen=True)
class Edit:
    """A change of the residual stream at a site.

    Attributes:
        site: where.
        apply: maps the stream `[batch, slice, d_model]` and its `Where` to a new stream of the same shape.
    """

    site: Site
    apply: EditFunction


class Recorder:
    """An edit that changes nothing and keeps what passes, slice by slice.

    `states` holds the stream at the site over all columns seen since the recorder was made, `[batch, pos, d_model]`.
    """

    def __init__(self, site: Site) -> None:
        self.edit = Edit(site, self._keep)
        self._slices: list[Tensor] = []

    def _keep(self, stream: Tensor, where: Where) -> Tensor:
        self._slices.append(stream)
        return stream

    @property
    def states(self) -> Float[Tensor, "batch pos d"]:
        """Everything recorded, in column order."""
        return torch.cat(self._slices, 1)


@contextmanager
def edited(model: LanguageModel, edits: Sequence[Edit], where: Where) -> Iterator[None]:
    """Apply the edits to every pass run inside the block."""
    sites: dict[Site, list[Edit]] = {}
    for edit in edits:
        sites.setdefault(edit.site.check(model.n_layers), []).append(edit)
    handles = [_hook(model, site, group, where) for site, group in sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: LanguageModel, site: Site, edits: Sequence[Edit], where: Where) -> Any:
    def through(stream: Tensor) -> Tensor:
        for edit in edits:
            stream = edit.apply(stream, where.to(stream.device))
        return stream

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (through(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": through(kwargs["hidden_states"])}

    def after(module: Any, args: tuple, output: Any) -> Any:
        return (through(output[0]), *output[1:]) if isinstance(output, tuple) else through(output)

    if site.boundary < model.n_layers:
        return model.layers[site.boundary].register_forward_pre_hook(before, with_kwargs=True)
    return model.layers[-1].register_forward_hook(after)


def run(
    model: LanguageModel,
    batch: Batch,
    edits: Sequence[Edit] = (),
    *,
    columns: tuple[int, int] | None = None,
    prompt_width: int | None = None,
    cache: DynamicCache | None = None,
) -> Float[Tensor, "batch slice d"]:
    """Final hidden states (after the last norm) of the batch, or of a slice of its columns.

    Args:
        model: the language model.
        batch: tokens; with `columns`, all tokens up to the end of the slice at least.
        edits: applied at their sites.
        columns: first and last column (exclusive) to compute; those before must be in `cache`. Default: all.
        prompt_width: columns that count as prompt; offsets are measured from there. Default: all of the batch.
        cache: keys and values of the columns before the slice; extended in place.

    Returns:
        `[batch, slice, d_model]`; differentiable with respect to whatever the edits introduce.
    """
    first, last = columns or (0, batch.width)
    where = Where.slice(batch, first, last, batch.width if prompt_width is None else prompt_width)
    with edited(model, edits, where):
        return model.decoder(
            input_ids=batch.ids[:, first:last],
            attention_mask=batch.mask[:, :last].long(),
            position_ids=batch.positions[:, first:last],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


@torch.no_grad()
def generate(
    model: LanguageModel, batch: Batch, edits: Sequence[Edit] = (), *, max_new_tokens: int, use_cache: bool = True
) -> Int[Tensor, "batch new"]:
    """Greedy continuation with edits active in the prompt and at every decode step.

    Args:
        model: the language model.
        batch: prompts.
        edits: applied at every site, each decode step included; offsets >= 0 are generated positions.
        max_new_tokens: length of the continuation; it is not cut at an end-of-text token.
        use_cache: off re-runs the whole sequence for every token; the result is the same (P7).

    Returns:
        `[batch, max_new_tokens]` token ids.
    """
    prompt_width = batch.width
    cache = DynamicCache(config=model.config) if use_cache else None
    done = 0
    for _ in range(max_new_tokens):
        hidden = run(model, batch, edits, columns=(done, batch.width), prompt_width=prompt_width, cache=cache)
        batch = batch.extended(model.all_logits(hidden[:, -1]).argmax(-1, keepdim=True))
        done = batch.width - 1 if use_cache else 0
    return batch.ids[:, prompt_width:]
