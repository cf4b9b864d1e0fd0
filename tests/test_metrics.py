"""Metrics by hand (method.md, Table 1; P3, P4, P6)."""

import pytest
import torch
from conftest import tiny_sae

from undertow.metrics import Reading, feature_metrics, perturbation_metrics
from undertow.models.perturbation import Slot
from undertow.saes.sae import Latents


def reading(features, pre, threshold=0.2):
    pre = torch.tensor(pre).float()
    latents = Latents(pre, pre * (pre > threshold), torch.full_like(pre, threshold), torch.ones(*pre.shape[:2], 1))
    return Reading(features, latents, torch.ones(pre.shape[:2]).bool())


def test_by_hand():
    features = tiny_sae().features([0, 1])
    before = reading(features, [[[1.0, -1.0]]])
    after = reading(features, [[[0.4, 0.5]]])
    found = {name: float(value) for name, value in feature_metrics([before], [after]).items()}
    assert found["drift"] == pytest.approx((0.6**2 + 0.5**2) ** 0.5)
    assert found["relative_drift"] == pytest.approx(found["drift"] / 1.0)
    assert found["preactivation_drift"] == pytest.approx((0.6**2 + 1.5**2) ** 0.5)
    assert found["decode_drift"] == pytest.approx(float((torch.tensor([-0.6, 0.5]) @ features.W_dec).norm()), rel=1e-5)
    assert found["floor_violation"] == pytest.approx(0.6)
    assert (found["eligible"], found["reactivated"]) == (1, 1)
    assert found["margin"] == pytest.approx(0.2 - 0.5)


def test_dead_zone_hides_activation_drift_but_not_preactivation_drift():
    """P3, P4: an inactive JumpReLU feature moves towards its threshold with no activation drift at all."""
    features = tiny_sae().features([0])
    found = feature_metrics([reading(features, [[[-3.0]]])], [reading(features, [[[0.15]]])])
    assert float(found["drift"]) == 0
    assert float(found["preactivation_drift"]) == pytest.approx(3.15)
    assert float(found["margin"]) == pytest.approx(0.05)


def test_padding_does_not_count():
    features = tiny_sae().features([0])
    before, after = reading(features, [[[9.0], [1.0]]]), reading(features, [[[0.0], [1.0]]])
    mask = torch.tensor([[False, True]])
    masked = [Reading(features, r.latents, mask) for r in (before, after)]
    found = feature_metrics([masked[0]], [masked[1]])
    assert float(found["drift"]) == 0
    assert float(found["eligible"]) == 0
    assert torch.isnan(found["margin"]).all()


def test_norms_are_exact_and_joint():
    """P6: the relative norm is ||delta||_F / ||h_def||_F over the slots, not a proxy."""
    sae = tiny_sae()
    slots = (Slot(sae.site, -2), Slot(sae.site, -1))
    delta, stream = torch.zeros(1, 2, 32), torch.zeros(1, 2, 32)
    delta[0, 0, 0], delta[0, 1, 1] = 3.0, 4.0
    stream[0, 0, 0], stream[0, 1, 0] = 6.0, 8.0
    found = perturbation_metrics(delta, stream, slots, {sae.site: sae.features([0])})
    assert float(found["delta_norm"]) == pytest.approx(5)
    assert float(found["relative_norm"]) == pytest.approx(0.5)


def test_decoder_share_is_one_for_the_clamps_own_edit():
    """P5."""
    sae = tiny_sae()
    edit = (2 * sae.W_dec[3] - sae.W_dec[8])[None, None]
    found = perturbation_metrics(edit, edit, (Slot(sae.site, -1),), {sae.site: sae.features([3, 8])})
    assert float(found["decoder_share"]) == pytest.approx(1.0, abs=1e-5)
