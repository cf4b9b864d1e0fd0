"""Constraints hold exactly, for any sign, scale, position or rank (P1, P5; C1)."""

from dataclasses import replace

import pytest
import torch
from conftest import D, random_batch, tiny_llama, tiny_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.behaviours.base import Behaviour
from undertow.constraints.base import CONSTRAINTS, Leak, Subspace, orthonormal_basis
from undertow.controls import random_direction
from undertow.defences.clamp import Clamp, Clamps
from undertow.errors import UndertowError
from undertow.measurement import measure
from undertow.metrics import feature_metrics, perturbation_metrics
from undertow.models.perturbation import Slot, clipped, joint_norm
from undertow.saes.normalisation import ConstantNorm, LayerNorm
from undertow.sites import Site
from undertow.solvers.projected import Projected

MODEL = tiny_llama(1)


class Last(Behaviour):
    """A behaviour that is not under test here."""

    def value(self, model, hidden, rows):
        return hidden[:, -1, 0]


feature_lists = st.lists(st.integers(0, 95), min_size=1, max_size=12, unique=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    features=feature_lists,
    name=st.sampled_from(["encoder", "encoder+decoder"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offsets=st.lists(st.integers(-5, -1), min_size=1, max_size=3, unique=True),
    size=st.floats(0.1, 50),
    normaliser=st.sampled_from([None, LayerNorm(), ConstantNorm()]),
)
def test_a_projected_delta_moves_no_defended_preactivation(seed, features, name, scale, offsets, size, normaliser):
    """P1: checked end to end, on the stream of the running model, where a wrong sign, scale or position would show; also for
    SAEs that divide by a size which the perturbation could change."""
    sae, batch = replace(tiny_sae(seed % 5, Site.post(1), scale=scale), normaliser=normaliser), random_batch(seed)
    defence = Clamps((Clamp(sae.features(features)),))
    slots = tuple(Slot(sae.site, offset) for offset in sorted(offsets))
    raw = torch.randn(batch.size, len(slots), D, generator=torch.Generator().manual_seed(seed))
    common = (MODEL, batch, Last())
    before = measure(*common, defence, slots)
    constraint = CONSTRAINTS.get(name)(slots, defence.defended).at(before.at(slots, batch.width))
    delta = constraint.sized(constraint.project(raw), torch.full((batch.size,), size))
    if normaliser is None:
        assert torch.allclose(joint_norm(delta), torch.full((batch.size,), size), rtol=1e-4)
    after = measure(*common, defence, slots, delta=delta)
    moved = feature_metrics(before.readings, after.readings)
    # Rounding of the stream is all that may be seen, whatever the scale of the encoder.
    stream = before.at(slots, batch.width)
    seen = float(torch.linalg.matrix_norm(sae.features(features).W_enc, 2)) * (joint_norm(stream) + size)
    if normaliser is not None:
        smallest = stream.norm(dim=-1).amin(-1)
        seen = seen * D**0.5 / smallest
    assert (moved["preactivation_drift"] <= 1e-5 * seen).all()
    arrived = joint_norm(after.at(slots, batch.width) - stream - delta)
    assert (arrived <= 1e-5 * (joint_norm(stream) + size)).all(), "all of the perturbation is there, where it should be"
    facts = perturbation_metrics(delta, stream, slots, defence.defended)
    assert float(facts["leak"].max()) <= 1e-5
    if name == "encoder+decoder":
        assert float(facts["decoder_share"].max()) <= 1e-5
    assert float(constraint.leak(delta).max()) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), features=feature_lists, name=st.sampled_from(["none", "encoder", "encoder+decoder"]))
def test_projection_is_an_orthogonal_projection(seed, features, name):
    sae = tiny_sae(seed % 5)
    slots = (Slot(sae.site, -2), Slot(Site.post(0), -1))
    constraint = CONSTRAINTS.get(name)(slots, {sae.site: sae.features(features)})
    x, y = torch.randn(2, 4, 2, D, generator=torch.Generator().manual_seed(seed))
    once = constraint.project(x)
    assert torch.allclose(constraint.project(once), once, atol=1e-5), "idempotent"
    assert torch.allclose((once * y).sum((1, 2)), (x * constraint.project(y)).sum((1, 2)), atol=1e-3), "self-adjoint"
    assert torch.equal(once[:, 1], x[:, 1]), "a slot at an undefended site is free"


def sphere(seed: int, normaliser=None, features=(1, 5, 7), slots: int = 2):
    """The constraint of an SAE that normalises, bound to random streams, and these."""
    sae = replace(tiny_sae(seed), normaliser=normaliser or LayerNorm())
    stream = 3 * torch.randn(4, slots, D, generator=torch.Generator().manual_seed(seed)) + 1
    places = tuple(Slot(sae.site, offset) for offset in range(-slots, 0))
    return sae, stream, CONSTRAINTS.get("encoder")(places, {sae.site: sae.features(features)}).at(stream)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), budget=st.floats(1e-3, 30), normaliser=st.sampled_from([LayerNorm(), ConstantNorm()]))
def test_a_normalising_sae_has_a_curved_constraint(seed, budget, normaliser):
    """Projection is idempotent; drawing back to a budget and growing to a norm stay inside; tangents leave to second order."""
    sae, stream, constraint = sphere(seed, normaliser)
    features = sae.features([1, 5, 7])
    raw = torch.randn(4, 2, D, generator=torch.Generator().manual_seed(seed + 1))
    once = constraint.project(raw)
    assert torch.allclose(constraint.project(once), once, atol=1e-5)
    limit = torch.full((4,), budget)
    for delta in (once, constraint.within(once, limit), constraint.sized(once, limit)):
        moved = features.read(stream + delta).pre - features.read(stream).pre
        assert float(moved.abs().max()) <= 1e-4
        assert float(constraint.leak(delta).max()) <= 1e-5
    assert (joint_norm(constraint.within(once, limit)) <= limit * (1 + 1e-5)).all()
    furthest = joint_norm(constraint.sized(once, 2 * joint_norm(constraint.remainder).float()))
    assert torch.allclose(joint_norm(constraint.sized(once, limit)), torch.minimum(limit, furthest), rtol=1e-3)
    flat = Subspace([features.W_enc] * 2).project(raw)
    naive = (features.read(stream + flat).pre - features.read(stream).pre).abs().max()
    assert float(naive) > 1e-3, "orthogonality alone does not hold the readings of an SAE that divides by the size"
    tangent = constraint.tangent(torch.zeros_like(raw), raw)
    leaks = [float((features.read(stream + h * tangent).pre - features.read(stream).pre).abs().max()) for h in (1e-1, 1e-2)]
    assert leaks[1] <= max(leaks[0] / 50, 1e-5)


def test_a_curved_constraint_needs_two_free_dimensions():
    """With one, the sphere is two points, and the solver would have nowhere to go."""
    for count, forbidden in ((D - 3, False), (D - 2, True)):
        sae = replace(tiny_sae(), normaliser=LayerNorm())
        slots = (Slot(sae.site, -1),)
        # The mean, which the normalisation removes, is one more direction.
        constraint = CONSTRAINTS.get("encoder")(slots, {sae.site: sae.features(range(count))})
        assert constraint.forbids_everything is forbidden


def test_a_curved_constraint_without_streams_says_so():
    sae = replace(tiny_sae(), normaliser=LayerNorm())
    constraint = CONSTRAINTS.get("encoder")((Slot(sae.site, -1),), {sae.site: sae.features([1])})
    with pytest.raises(ValueError, match=r"bind it to the samples with at\(stream\)"):
        constraint.project(torch.zeros(1, 1, D))


def test_the_solver_stays_on_a_curved_constraint():
    """P1 for SAEs that normalise: iterates, and what is bisected at the target, stay inside."""
    from test_solvers import Curved as Rough
    from test_solvers import N

    _, _, constraint = sphere(3, slots=1)
    constraint = constraint.select(torch.arange(N) % 4)
    for target in (1e9, 0.5):
        result = Projected(steps=20).solve(Rough(1, target=target), constraint, torch.full((N,), 2.0), torch.zeros(N, 1, D))
        assert float(constraint.leak(result.delta).max()) <= 1e-5
        assert (joint_norm(result.delta) <= 2.0 * (1 + 1e-5)).all()
        assert (result.value > Rough(1)(torch.zeros(N, 1, D), torch.arange(N))).all()


def test_dependent_directions_are_recognised():
    """Rank-revealing and without a ridge: a repeated column takes away one dimension, not two, and exactly."""
    column = torch.randn(D, 1, generator=torch.Generator().manual_seed(0)).double()
    assert orthonormal_basis(torch.cat([column, -3 * column, 1e-6 * column], 1)).shape == (D, 1)
    tiny_columns = 1e-12 * torch.randn(D, 3, generator=torch.Generator().manual_seed(0))
    assert orthonormal_basis(tiny_columns).shape == (D, 3)


def test_encoder_leaves_the_undo_open_and_encoder_decoder_closes_it():
    """P5: the clamp's edit survives encoder projection with the share that the encoder-decoder cosine says."""
    encoder = torch.zeros(D, 1)
    encoder[0] = 1
    for cosine, expected in ((0.9, 0.44), (0.7, 0.71), (0.5, 0.87)):
        decoder = torch.zeros(1, D)
        decoder[0, 0], decoder[0, 1] = cosine, (1 - cosine**2) ** 0.5
        sae = tiny_sae()
        from dataclasses import replace

        sae = replace(
            sae, W_enc=encoder.repeat(1, 2), W_dec=decoder.repeat(2, 1), b_enc=torch.zeros(2),
            activation=type(sae.activation)(torch.zeros(2)),
        )  # fmt: skip
        slots, defended = (Slot(sae.site, -1),), {sae.site: sae.features([0])}
        edit = decoder[None]
        share = joint_norm(CONSTRAINTS.get("encoder")(slots, defended).project(edit))
        assert float(share) == pytest.approx(expected, abs=0.01)
        assert float(joint_norm(CONSTRAINTS.get("encoder+decoder")(slots, defended).project(edit))) <= 1e-6


def test_leak_is_one_along_the_strongest_direction_and_zero_off_it():
    columns = torch.eye(D)[:, :2] * torch.tensor([3.0, 1.0])
    along, off = torch.zeros(1, 1, D), torch.zeros(1, 1, D)
    along[..., 0], off[..., 5] = 7.0, 7.0
    leak = Leak([columns])
    assert float(leak(along)) == pytest.approx(1.0)
    assert float(leak(off)) == 0.0
    assert float(leak(torch.zeros(1, 1, D))) == 0.0


def test_budget_is_joint_over_slots():
    """P6: one norm over everything that is added, not one for each slot."""
    delta = torch.ones(2, 4, D)
    limited = clipped(delta, torch.tensor([1.0, 1e6]))
    assert joint_norm(limited).tolist() == pytest.approx([1.0, (4 * D) ** 0.5])


def test_random_control_stays_in_the_subspace_at_the_given_norm():
    """C-a: a sample's direction depends on its own seed, not on its batch."""
    sae = tiny_sae()
    slots, defended = (Slot(sae.site, -1),), {sae.site: sae.features([1, 2, 3])}
    constraint = CONSTRAINTS.get("encoder")(slots, defended)

    both = random_direction(constraint, torch.zeros(2, 1, D), torch.tensor([2.0, 5.0]), [11, 12])
    assert joint_norm(both).tolist() == pytest.approx([2.0, 5.0], rel=1e-5)
    assert float(constraint.leak(both).max()) <= 1e-6
    alone = random_direction(constraint, torch.zeros(1, 1, D), torch.tensor([5.0]), [12])
    assert torch.allclose(alone[0], both[1], atol=1e-6)


def test_a_constraint_that_forbids_everything_leaves_exactly_nothing():
    """As many independent directions as dimensions: no rounding noise may be scaled up into a perturbation."""
    slots, sae = (Slot(Site.post(1), -1),), tiny_sae()
    constraint = CONSTRAINTS.get("encoder")(slots, {sae.site: sae.features(range(40))})
    assert constraint.forbids_everything
    assert not constraint.project(torch.randn(3, 1, D)).any()
    assert not random_direction(constraint, torch.zeros(2, 1, D), torch.ones(2), [1, 2]).any()
    assert not CONSTRAINTS.get("encoder")(slots, {sae.site: sae.features(range(31))}).forbids_everything


def test_unknown_constraint():
    with pytest.raises(UndertowError, match="constraint 'decoder' is unknown. Choose from: encoder, encoder\\+decoder, none"):
        CONSTRAINTS.get("decoder")
