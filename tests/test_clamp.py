"""The clamp against its definition, its gradient, its scope (method.md section 1; P8, P13, P17)."""

from dataclasses import replace

import pytest
import torch
from conftest import D, random_batch, tiny_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from undertow.defences.clamp import RULES, Clamp, Clamps
from undertow.errors import UndertowError
from undertow.models.batch import Where
from undertow.saes.activations import ReLU, TopK
from undertow.saes.normalisation import ConstantNorm, LayerNorm
from undertow.sites import Site

BY_HAND = {
    "set": lambda z, c: c,
    "set_if_active": lambda z, c: c if z > 0 else z,
    "scale": lambda z, c: c * z,
    "zero": lambda z, c: 0.0,
    "floor": lambda z, c: max(z, c),
    "cap": lambda z, c: min(z, c),
}


def whole(batch):
    return Where.slice(batch, 0, batch.width, batch.width)


def stream_for(batch, seed=0, scale=2.0):
    return scale * torch.randn(batch.size, batch.width, D, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "jumprelu": {}, "relu": {"activation": ReLU()}, "topk": {"activation": TopK(8)},
    "layer norm": {"normaliser": LayerNorm()}, "constant norm, topk": {"normaliser": ConstantNorm(), "activation": TopK(8)},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("rule", list(RULES))
def test_delta_form_equals_decoding_the_clamped_latents(rule, keep_error, kind):
    sae, batch, value = replace(tiny_sae(), **KINDS[kind]), random_batch(), 0.7
    stream = stream_for(batch)
    features = [3, 10, 50]
    latents = sae.encode(stream)
    wanted = latents.clone()
    for index in features:
        wanted[..., index] = torch.tensor([[BY_HAND[rule](float(z), value) for z in row] for row in latents[..., index]])
    slow = sae.decode(wanted, stream) + (stream - sae.decode(latents, stream) if keep_error else 0)
    clamped = Clamp(sae.features(features), rule, value, keep_error).apply(stream, whole(batch))
    assert torch.allclose(clamped[batch.mask], slow[batch.mask], atol=1e-5)
    assert torch.equal(clamped[~batch.mask], stream[~batch.mask]), "padding is left alone"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), rule=st.sampled_from(sorted(RULES)), value=st.floats(-3, 3), keep=st.booleans(),
    normaliser=st.sampled_from([None, LayerNorm(), ConstantNorm()]),
)  # fmt: skip
def test_gradient_against_finite_differences(seed, rule, value, keep, normaliser):
    """P13: a detached error term, latent or normalisation would show as a wrong directional derivative."""
    sae, batch = replace(tiny_sae(seed % 7), normaliser=normaliser), random_batch(seed)
    clamp = Clamp(sae.features([1, 2, 3, 4]), rule, value, keep)
    generator = torch.Generator().manual_seed(seed)
    stream = 2 * torch.randn(batch.size, batch.width, D, generator=generator)
    weight, direction = torch.randn(2, *stream.shape, generator=generator)
    # Keep away from the jumps of the activation and the kinks of floor and cap, where there is no derivative.
    reading = clamp.features.read(stream)
    near = ((reading.pre - reading.threshold).abs() < 0.05) | ((reading.post - value).abs() < 0.05)
    sae_near = (sae.features(range(sae.d_sae)).read(stream).pre - 0.2).abs().amin(-1) < 0.01
    usable = ~near.any(-1) & (~sae_near | keep)
    weight = weight * usable[..., None]
    leaf = stream.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((clamp.apply(leaf, whole(batch)) * weight).sum(), leaf)
    step = 1e-3
    up, down = (clamp.apply(stream + s * step * direction, whole(batch)).double() for s in (1, -1))
    numeric = float(((up - down) * weight).sum() / (2 * step))
    assert abs(float((gradient * direction).sum()) - numeric) <= 0.02 * (1 + abs(numeric))


def test_the_error_term_carries_gradient():
    """P13: a direction that no latent reads passes with derivative 1 when the error is kept, and 0 when it is dropped."""
    sae, batch = tiny_sae(), random_batch()
    encoder = sae.W_enc.clone()
    encoder[0] = 0
    blind = replace(sae, W_enc=encoder)
    for keep, expected in ((True, 1.0), (False, 0.0)):
        leaf = stream_for(batch).requires_grad_()
        clamp = Clamp(blind.features([0]), "zero", keep_error=keep)
        (gradient,) = torch.autograd.grad(clamp.apply(leaf, whole(batch))[..., 0][batch.mask].sum(), leaf)
        assert torch.allclose(gradient[..., 0][batch.mask], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("all", {-4, -3, -2, -1, 0, 1}), ("last", {-1}), ("prompt", {-4, -3, -2, -1}), ("generated", {0, 1})],
)
def test_position_scope(positions, expected):
    from undertow.models.batch import Batch

    batch = Batch.of([[5, 6, 7, 8, 9, 10]], set())
    where = Where.slice(batch, 0, 6, prompt_width=4)
    clamp = Clamp(tiny_sae().features([0]), "set", 3.0, positions=positions)
    scope = clamp.scope(torch.ones(1, 6, D), where)
    assert set(where.offsets[scope[0]].tolist()) == expected


def test_special_tokens_and_massive_activations_are_left_alone():
    from dataclasses import replace

    from undertow.models.batch import Batch

    batch = Batch.of([[1, 6, 7, 8]], {1})
    stream = torch.ones(1, 4, D)
    stream[0, 2] = 1e4
    sae = replace(tiny_sae(), norm_limit=100.0)
    where = whole(batch)
    assert Clamp(sae.features([0])).scope(stream, where).tolist() == [[False, True, False, True]]
    assert Clamp(sae.features([0]), skip_special=False).scope(stream, where).tolist() == [[True, True, False, True]]


def test_defended_columns_stay_float32_under_bfloat16_weights():
    """P17: the reading and the edit are computed in float32; only the sum is rounded to the stream's type."""
    sae, batch = tiny_sae(), random_batch()
    stream = stream_for(batch).bfloat16()
    features = sae.features([0, 1])
    assert features.read(stream).pre.dtype == torch.float32
    exact = Clamp(features, "set", 1.0).apply(stream.float(), whole(batch))
    rounded = Clamp(features, "set", 1.0).apply(stream, whole(batch))
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, rtol=2**-7, atol=0.05)


def test_several_features_and_sites():
    first, second = tiny_sae(0, Site.post(0)), tiny_sae(1, Site.post(2))
    clamps = Clamps((Clamp(second.features([2])), Clamp(first.features([1]))))
    assert [edit.site for edit in clamps.edits()] == [Site.post(0), Site.post(2)]
    with pytest.raises(UndertowError, match="exactly one clamp"):
        Clamps((Clamp(first.features([1])), Clamp(first.features([2]))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Clamp(f, "freeze"), "freeze"),
        (lambda f: Clamp(f, positions="first"), "first"),
        (lambda f: Clamp(f, "set", (1.0, 2.0, 3.0)), "3 values for 1 features"),
        (lambda f: f.sae.features([96]), "feature 96 is out of range"),
        (lambda f: f.sae.features([-1]), "feature -1 is out of range"),
        (lambda f: f.sae.features([1, 1]), "twice"),
    ],
)
def test_refusals(make, message):
    # The shape checker that tests install refuses a wrong literal by itself, with an error of its own.
    with pytest.raises((UndertowError, TypeCheckError), match=message):
        make(tiny_sae().features([0]))
