"""The suffix pass against the full pass (design decision 2; E2)."""

import pytest
import torch
from conftest import LAYERS, D, random_batch, tiny_llama, tiny_sae

from undertow.defences.clamp import Clamp
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import run
from undertow.models.suffix import SuffixPass
from undertow.sites import Site


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def assert_suffix_is_exact(model, batch, site, edits, offsets, size=1.0):
    """Outputs and gradients of the suffix pass equal those of the full pass, with deltas of `size` at the offsets."""
    slots = tuple(Slot(site, offset) for offset in offsets)
    suffix = SuffixPass(model, batch, site, edits, min(offsets))
    generator = torch.Generator().manual_seed(0)
    start = size * torch.randn(batch.size, len(slots), model.d_model, generator=generator)
    weight = torch.randn(batch.size, -min(offsets), model.d_model, generator=generator)
    results = []
    for fast in (True, False):
        delta = start.clone().requires_grad_()
        extra = perturbation_edits(slots, delta)
        hidden = suffix(after=extra) if fast else run(model, batch, [*edits, *extra])[:, min(offsets) :]
        (gradient,) = torch.autograd.grad((hidden * weight).sum(), delta)
        results.append((hidden, gradient))
    assert relative(results[0][0], results[1][0]) <= 1e-5
    assert relative(results[0][1], results[1][1]) <= 1e-5


@pytest.mark.parametrize("boundary", range(LAYERS + 1))
@pytest.mark.parametrize("offsets", [(-1,), (-3, -1), (-5, -2)])
def test_outputs_and_gradients_equal_the_full_pass(tiny, boundary, offsets):
    below, above = tiny_sae(1, Site(min(boundary, 1))), tiny_sae(2, Site(min(boundary + 1, LAYERS)))
    clamps = [Clamp(sae.features([0, 5, 9]), "set_if_active", -0.5) for sae in (below, above)]
    assert_suffix_is_exact(tiny, random_batch(), Site(boundary), [clamp.edit() for clamp in clamps], offsets)


def test_never_runs_below_the_site_nor_the_prefix(tiny):
    batch = random_batch()
    suffix = SuffixPass(tiny, batch, Site(2), (), -2)
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, kwargs, i=i: seen.append((i, args[0].shape[1])), with_kwargs=True)
        for i, layer in enumerate(tiny.layers)
    ]
    suffix()
    for handle in handles:
        handle.remove()
    assert seen == [(2, 2), (3, 2)]


def test_repeated_calls_do_not_change_the_prepared_state(tiny):
    suffix = SuffixPass(tiny, random_batch(), Site(1), (), -1)
    first = suffix()
    assert torch.equal(first, suffix())


def test_a_selection_of_samples_equals_those_samples(tiny):
    suffix = SuffixPass(tiny, random_batch(), Site(1), (), -1)
    rows = torch.tensor([2, 0])
    assert torch.allclose(suffix.select(rows)(), suffix()[rows], atol=1e-5)


def test_left_padding_does_not_change_a_sample():
    model, batch = tiny_llama(3), random_batch(5)
    together = run(model, batch)[:, -1]
    alone = torch.stack([run(model, batch.select([i]).trimmed())[0, -1] for i in range(batch.size)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradients_are_finite_when_padding_lies_inside_the_slice(tiny):
    batch = random_batch(lengths=(2, 9))
    suffix = SuffixPass(tiny, batch, Site(1), (), None)
    delta = torch.zeros(2, 1, D, requires_grad=True)
    hidden = suffix(after=perturbation_edits((Slot(Site(1), -1),), delta))
    (gradient,) = torch.autograd.grad(hidden[:, -1, 0].sum(), delta)
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum((1, 2)) > 0).all()
