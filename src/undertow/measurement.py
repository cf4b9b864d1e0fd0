"""One full pass of a model, and everything that is read from it: the only source of reported figures.

Attacks search by suffix passes; what is reported comes from here, where the whole model runs with hooks and nothing is
cached, so that an error in the fast path cannot confirm itself (design: one verification path).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undertow.attacks.base import Order, ordered
from undertow.behaviours.base import Behaviour
from undertow.defences.base import Defence, FiringCount
from undertow.metrics import Reading
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import Recorder
from undertow.sites import Site


@dataclass(frozen=True, eq=False)
class Measurement:
    """One full pass of a model under edits.

    Attributes:
        values: `[batch]` the behaviour's scores.
        readings: the defended features at the monitored positions, one for each defended site.
        streams: `[batch, pos, d_model]` the stream at each recorded site, after all edits there.
        firings: `[batch]` positions at which the defence acted (P8).
    """

    values: Float[Tensor, " batch"]
    readings: list[Reading]
    streams: dict[Site, Float[Tensor, "batch pos d"]]
    firings: Int[Tensor, " batch"]

    def at(self, slots: tuple[Slot, ...], prompt_width: int) -> Float[Tensor, "batch slot d"]:
        """The stream at some slots, in float32: perturbations are kept in it whatever the model's type."""
        home = self.values.device
        return torch.stack([self.streams[slot.site][:, prompt_width + slot.offset].to(home) for slot in slots], 1).float()


@torch.no_grad()
def measure(
    model: LanguageModel,
    batch: Batch,
    behaviour: Behaviour,
    defence: Defence,
    slots: tuple[Slot, ...],
    *,
    active: bool = True,
    delta: Float[Tensor, "batch slot d"] | None = None,
    order: Order = "clamp-then-delta",
) -> Measurement:
    """Run a model in full and read behaviour, defended features and stream (P9: where the perturbation acts and after).

    Args:
        model: the language model.
        batch: the prompts.
        behaviour: what is scored; its rows are the samples of the batch.
        defence: whose features are read.
        slots: where the stream is read, and `delta` added.
        active: whether the defence acts.
        delta: the perturbation; default none.
        order: of clamp and delta at a site.
    """
    count = FiringCount(by_sample=torch.zeros(batch.size, dtype=torch.long, device=batch.ids.device))
    added = [] if delta is None else perturbation_edits(slots, delta)
    edits = ordered(defence.edits(count) if active else [], added, order)
    recorders = {site: Recorder(site) for site in {*defence.defended, *(slot.site for slot in slots)}}
    values = behaviour.measure(model, batch, [*edits, *(recorder.edit for recorder in recorders.values())])
    streams = {site: recorder.states for site, recorder in recorders.items()}
    first = max(0, batch.width + min(slot.offset for slot in slots))
    readings = [
        Reading(features, features.read(streams[site][:, first:]), batch.mask[:, first:].to(streams[site].device))
        for site, features in sorted(defence.defended.items(), key=lambda item: item[0])
    ]
    assert count.by_sample is not None
    return Measurement(values.float(), readings, streams, count.by_sample)
