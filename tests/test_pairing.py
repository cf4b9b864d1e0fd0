"""A wrong pairing of SAE and model is caught, whatever is wrong: no fixed bar on explained variance would do."""

from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, D, random_batch, tiny_llama

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Recorder, run
from undertow.saes.activations import ReLU, TopK
from undertow.saes.normalisation import LayerNorm
from undertow.saes.pairing import alternatives, better_uses, estimate_input_scale
from undertow.saes.sae import SAE
from undertow.sites import Site

LATENTS, K = 128, 8


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_llama(layers=LAYERS)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [random_batch(seed, (12,) * 64) for seed in range(4)]


@pytest.fixture(scope="module")
def stream(model, batches):
    """The stream at the middle, and fitted to it below a small TopK SAE that is right at that place."""
    recorder = Recorder(Site(2))
    for batch in batches:
        run(model, batch, [recorder.edit])
    return torch.cat([part.flatten(0, 1) for part in recorder._slices])


@pytest.fixture(scope="module")
def sae(stream) -> SAE:
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(LATENTS, D), dim=-1).requires_grad_()
    encoder = decoder.detach().T.clone().requires_grad_()
    bias, mean = torch.zeros(LATENTS, requires_grad=True), stream.mean(0)
    optimiser = torch.optim.Adam([decoder, encoder, bias], lr=3e-3)
    for _ in range(300):
        z = TopK(K)((stream - mean) @ encoder + bias)
        loss = (z @ decoder + mean - stream).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder, decoder, bias = (t.detach() for t in (encoder, decoder, bias))
    return SAE("fitted", Site(2), encoder, bias - mean @ encoder, decoder, mean, TopK(K))


def uses(model, sae, batches):
    stated, others = alternatives(model, sae, batches)
    return stated, better_uses(stated, others)


def test_used_as_it_was_trained_it_explains_the_most(model, sae, batches):
    stated, better = uses(model, sae, batches)
    assert stated > 0.8
    assert better == {}


@pytest.mark.parametrize("boundary", [1, 3])
def test_a_site_off_by_one_layer_which_is_also_pre_for_post(model, sae, batches, boundary):
    _, better = uses(model, replace(sae, site=Site(boundary)), batches)
    assert f"at {Site(2)}" in better


@pytest.mark.parametrize("scale", [0.05, 0.25])
def test_a_missing_scale(model, sae, batches, scale):
    """The SAE was trained on a larger stream, and is used without the factor."""
    _, better = uses(model, sae.rescaled(scale), batches)
    assert any(use.startswith("with the stream times") for use in better)


def test_topk_read_as_relu(model, sae, batches):
    """Without its TopK far too many latents are active: fewer would explain more."""
    _, better = uses(model, replace(sae, activation=ReLU()), batches)
    assert any("largest latents only" in use for use in better)


def test_missing_centring(model, sae, batches, stream):
    """Residuals with a large mean over dimensions, and an SAE that was trained without it."""
    shifted = tiny_llama(layers=LAYERS)
    shifted.network.model.embed_tokens.weight.data += 3.0
    recorder = Recorder(Site(0))
    for batch in batches:
        run(shifted, batch, [recorder.edit])
    rows = torch.cat([part.flatten(0, 1) for part in recorder._slices])
    rows = rows - rows.mean(-1, keepdim=True)
    left = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:24]
    decoder = torch.cat([left, -left])
    exact = SAE("pca", Site(0), decoder.T, -rows.mean(0) @ decoder.T, decoder, rows.mean(0), ReLU())
    _, better = uses(shifted, exact, batches)
    assert "with the stream centred" in better
    encoder = exact.W_enc - exact.W_enc.mean(0)
    assert uses(shifted, replace(exact, W_enc=encoder, centred=True), batches)[1] == {}


def test_an_sae_that_normalises_is_compared_at_other_sites_only(model, sae, batches):
    _, others = alternatives(model, replace(sae, normaliser=LayerNorm()), batches)
    assert set(others) == {f"at {Site(1)}", f"at {Site(3)}"}


def test_the_input_scale_is_estimated_from_the_norms(model, sae, batches, stream):
    wanted = D**0.5 / stream.norm(dim=-1).mean()
    assert estimate_input_scale(model, sae, batches) == pytest.approx(float(wanted), rel=0.05)
