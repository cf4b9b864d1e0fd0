"""Edits in generation with a key-value cache (P7, P8)."""

import pytest
import torch
from conftest import D, random_batch, tiny_sae

from undertow.defences.clamp import Clamp, FiringCount
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import Recorder, generate
from undertow.sites import Site

NEW = 6


def test_cache_and_no_cache_agree_under_clamp_and_delta(tiny):
    """P7: with the cache on, an edit sees slices of length 1 and must still act at its absolute place."""
    batch, sae = random_batch(), tiny_sae()
    slots = (Slot(Site(1), -1), Slot(Site(1), 0), Slot(Site(2), 2))
    delta = 3 * torch.randn(batch.size, 3, D, generator=torch.Generator().manual_seed(0))
    edits = [Clamp(sae.features([1, 2]), "set", 1.0).edit(), *perturbation_edits(slots, delta)]
    cached = generate(tiny, batch, edits, max_new_tokens=NEW)
    assert torch.equal(cached, generate(tiny, batch, edits, max_new_tokens=NEW, use_cache=False))
    assert not torch.equal(cached, generate(tiny, batch, max_new_tokens=NEW))


@pytest.mark.parametrize("offset", [-1, 0, 2])
def test_delta_at_an_offset_changes_the_next_token_and_none_before(tiny, offset):
    """P7: delta at offset p + j changes token j + 1, not an earlier one, with the cache on."""
    batch = random_batch()
    plain = generate(tiny, batch, max_new_tokens=NEW)
    head = tiny.network.get_output_embeddings().weight
    last = Site(tiny.n_layers)
    rows = torch.arange(batch.size)
    unwanted = plain[rows, offset + 1]
    direction = -head[unwanted]
    delta = 100 * (direction / direction.norm(dim=-1, keepdim=True))[:, None]
    changed = generate(tiny, batch, perturbation_edits((Slot(last, offset),), delta), max_new_tokens=NEW)
    assert torch.equal(changed[:, : offset + 1], plain[:, : offset + 1])
    assert (changed[:, offset + 1] != unwanted).all()


def test_clamp_fires_once_for_every_token_in_scope(tiny):
    """P8: the clamp is active at every decode step; its firings are counted."""
    batch, sae = random_batch(), tiny_sae()
    for positions, expected in (
        ("all", {**{o: int(batch.mask[:, o].sum()) for o in range(-batch.width, 0)}, **dict.fromkeys(range(NEW - 1), 3)}),
        ("generated", dict.fromkeys(range(NEW - 1), 3)),
        ("last", {-1: 3}),
    ):
        count = FiringCount()
        clamp = Clamp(sae.features([1]), "set", 2.0, positions=positions)
        generate(tiny, batch, [clamp.edit(count)], max_new_tokens=NEW)
        assert {o: n for o, n in count.by_offset.items() if n} == expected


def test_recorder_sees_the_generated_trajectory(tiny):
    """P9: what is read is what was generated, all columns of it."""
    batch = random_batch()
    recorder = Recorder(Site(2))
    generate(tiny, batch, [recorder.edit], max_new_tokens=NEW)
    assert recorder.states.shape == (3, batch.width + NEW - 1, D)
