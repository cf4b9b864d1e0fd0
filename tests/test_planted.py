"""Planted truth: the verdict is right where the answer is known by construction."""

import pytest
from planted import error_route, one_route, planted_audit, planted_config, planted_data, planted_model, planted_sae, undo_route

SEEDS = (0, 1, 2)
FORBIDDING = ("encoder", "encoder+decoder")


@pytest.mark.parametrize("seed", SEEDS)
def test_single_route_through_the_clamped_feature_is_held(tmp_path, seed):
    run = planted_audit(one_route(seed), tmp_path, seed).run
    assert run["counts"]["valid_flips"] == 24
    arms = run["verdict"]["arms"]
    assert {arm: arms[arm]["label"] for arm in FORBIDDING} == dict.fromkeys(FORBIDDING, "held")
    assert arms["none"]["label"] == "recovered", "without a constraint the route itself is open"
    assert run["arms"]["encoder"]["1"]["recovered"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_second_route_through_the_reconstruction_error_is_recovered(tmp_path, seed):
    run = planted_audit(error_route(seed), tmp_path, seed).run
    arms = run["verdict"]["arms"]
    assert {arm: arms[arm]["label"] for arm in FORBIDDING} == dict.fromkeys(FORBIDDING, "recovered")
    assert run["verdict"]["headline"] == "encoder+decoder"
    assert run["controls"]["control:zero"]["0"]["recovered"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_route_is_open_to_encoder_orthogonality_and_closed_by_encoder_decoder(tmp_path, seed):
    """P5, C-d: the closed form recovers with no search; forbidding span(W_dec) as well holds."""
    run = planted_audit(undo_route(seed), tmp_path, seed).run
    arms = run["verdict"]["arms"]
    assert arms["encoder"]["label"] == "recovered"
    assert arms["encoder+decoder"]["label"] == "held"
    assert run["controls"]["control:undo"]["1"]["rate"] == 1.0
    assert run["verdict"]["label"] == "recovered by undo"


def test_published_optimiser_recovers_what_its_own_constraint_forbids(tmp_path):
    """P1: the gradient has no component along the only route, yet Adam's rescaled steps leave the null space."""
    run = planted_audit(error_route(0), tmp_path).run
    ours, published = run["arms"]["encoder"]["1"], run["arms"]["published"]["1"]
    assert ours["metrics"]["leak"]["max"] < 1e-6
    assert published["metrics"]["leak"]["max"] > 1e-3
    assert published["metrics"]["preactivation_drift"]["mean"] > 100 * ours["metrics"]["preactivation_drift"]["mean"]


def test_few_flips_make_no_claim(tmp_path):
    run = planted_audit(one_route(0), tmp_path, audit={"min_flips": 100}).run
    assert run["verdict"]["label"] == "too few flips"


def test_strict_order_clamps_again_after_delta(tmp_path):
    """P8: with delta-then-clamp the clamp acts last, so even the unconstrained arm cannot use the clamped feature."""
    run = planted_audit(one_route(1), tmp_path, 1, attack={"order": "delta-then-clamp", "arms": ("none",)}).run
    assert run["verdict"]["arms"]["none"]["label"] == "held"
    assert run["arms"]["none"]["1"]["metrics"]["drift"]["max"] < 1e-5


def test_bfloat16_weights(tmp_path):
    """P17: perturbations are kept in float32, so the constraint holds on what is stored; rounding shows in the drift alone."""
    from planted import planted_setting

    from undertow.audit import audit
    from undertow.runlog import RunLog

    setting = planted_setting(error_route(0), attack={"arms": ("encoder",)})
    setting.model.network.bfloat16()
    log = audit(setting, RunLog(tmp_path, {"command": "test", "config": setting.config.model_dump(mode="json")}))
    entry = log.run["arms"]["encoder"]["1"]
    assert entry["recovered"] == entry["n"]
    assert entry["metrics"]["leak"]["max"] <= 1e-5


def test_an_sae_that_normalises_its_input_is_audited_exactly(tmp_path):
    """Encoder arms hold the readings of an SAE that divides by the stream's size; in the strict order they are refused."""
    from dataclasses import replace

    from undertow.audit import audit
    from undertow.errors import UndertowError
    from undertow.runlog import RunLog
    from undertow.saes.normalisation import ConstantNorm
    from undertow.setting import assemble

    def planted(order: str):
        plant = error_route(0)
        config = planted_config(attack={"order": order, "arms": ("none", "encoder", "encoder+decoder"), "budgets": (0.5,)})
        sae = replace(planted_sae(plant), normaliser=ConstantNorm())
        return assemble(config, planted_model(plant, 0), sae, planted_data(0))

    setting = planted("clamp-then-delta")
    log = audit(setting, RunLog(tmp_path / "a", {"command": "test", "config": setting.config.model_dump(mode="json")}))
    for row in log.rows():
        if row["arm"].startswith("encoder"):
            assert row["leak"] <= 1e-5
            assert row["relative_preactivation_drift"] <= 1e-5
    free = [row["relative_preactivation_drift"] for row in log.rows() if row["arm"] == "none"]
    assert max(free) > 0.05
    setting = planted("delta-then-clamp")
    with pytest.raises(UndertowError, match="normalises its input, and what the clamp reads"):
        audit(setting, RunLog(tmp_path / "b", {"command": "test", "config": setting.config.model_dump(mode="json")}))
