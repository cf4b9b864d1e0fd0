"""One full pass of a model, and everything that is read from it: the only source of reported figures.

Attacks search by suffix passes; what is reported comes from here, where the whole model runs with hooks and nothing is
cached, so that an error in the fast path cannot confirm itself (design: one verification path).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.behaviours.base import Behaviour
from undertow.defences.base import Defence
from undertow.metrics import Reading
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.perturbation import Slot
from undertow.models.residual import Edit, Recorder
from undertow.sites import Site


@dataclass(frozen=True, eq=False)
class Measurement:
    """One full pass of a model under edits.

    Attributes:
        values: `[batch]` the behaviour's scores.
        readings: the defended features at the monitored positions, one for each defended site.
        streams: `[batch, pos, d_model]` the stream at each recorded site, after all edits there.
    """

    values: Float[Tensor, " batch"]
    readings: list[Reading]
    streams: dict[Site, Float[Tensor, "batch pos d"]]

    def at(self, slots: tuple[Slot, ...], prompt_width: int) -> Float[Tensor, "batch slot d"]:
        """The stream at some slots, in float32: perturbations are kept in it whatever the model's type."""
        return torch.stack([self.streams[slot.site][:, prompt_width + slot.offset] for slot in slots], 1).float()


@torch.no_grad()
def measure(
    model: LanguageModel,
    batch: Batch,
    behaviour: Behaviour,
    edits: list[Edit],
    defence: Defence,
    slots: tuple[Slot, ...],
) -> Measurement:
    """Run a model in full and read behaviour, defended features and stream (P9: where the perturbation acts and after)."""
    recorders = {site: Recorder(site) for site in {*defence.defended, *(slot.site for slot in slots)}}
    values = behaviour.measure(model, batch, [*edits, *(recorder.edit for recorder in recorders.values())])
    streams = {site: recorder.states for site, recorder in recorders.items()}
    first = max(0, batch.width + min(slot.offset for slot in slots))
    readings = []
    for site, features in sorted(defence.defended.items(), key=lambda item: item[0]):
        monitored = streams[site][:, first:]
        generated = monitored.shape[1] - batch.mask[:, first:].shape[1]
        mask = torch.nn.functional.pad(batch.mask[:, first:], (0, generated), value=True)
        readings.append(Reading(features, features.read(monitored), mask))
    return Measurement(values.float(), readings, streams)
