"""What is said about figures: no more than they say."""

import pytest
from planted import planted_config

from undertow.summary import summarise
from undertow.verdict import judge, warnings

SETTINGS = planted_config().audit
CONTEXT = {
    "valid_flips": 24, "describes": "it", "order": "clamp-then-delta", "budget_unit": "relative", "arms": ["encoder"],
    "reference": "encoder",
}  # fmt: skip


def rows_of(arm: str, hits: int, n: int = 24, budget: float = 0.1, **fields):
    return [
        {
            "sample": f"s{i}", "cluster": f"c{i % 8}", "arm": arm, "budget": budget, "holds": i < hits,
            "status": "recovered" if i < hits else "held", "recovered": 1.0 if i < hits else -1.0 - i / 100,
            "silenced": 0, "reactivated": 0, "eligible": 1, "leak": 0.0, "drift": 0.1, "relative_norm": 0.05,
            "delta_norm": 1.0, "relative_drift": 0.0, "preactivation_drift": 0.0, "relative_preactivation_drift": 0.0,
            "decode_drift": 0.0, "floor_violation": 0.0, "decoder_share": 0.0, "margin": None, "steps": 1, **fields,
        }
        for i in range(n)
    ]  # fmt: skip


def verdict(encoder=0, random=0, undo=0, zero=0, context=CONTEXT, **fields):
    rows = [
        *rows_of("encoder", encoder, **fields), *rows_of("control:zero", zero, budget=0.0),
        *rows_of("control:undo", undo), *rows_of("control:random", random),
    ]  # fmt: skip
    return judge(rows, summarise(rows, SETTINGS, 0), context, SETTINGS, 0)


@pytest.mark.parametrize(
    ("figures", "label"),
    [
        ({"encoder": 24}, "recovered"),
        ({"encoder": 12}, "recovered"),
        ({"encoder": 0}, "held"),
        ({"encoder": 4, "random": 4}, "held"),
        ({"encoder": 24, "zero": 24}, "held"),
        ({"encoder": 1}, "inconclusive"),
        ({"encoder": 24, "undo": 24}, "recovered by undo"),
        ({"encoder": 0, "undo": 24}, "recovered by undo"),
        ({"encoder": 24, "undo": 3}, "recovered"),
        ({"encoder": 0, "status": "solver_failed"}, "solver failed"),
        ({"context": {**CONTEXT, "valid_flips": 3}}, "too few flips"),
    ],
)
def test_labels(figures, label):
    assert verdict(**figures)["label"] == label


def test_no_more_than_the_controls_is_said_only_where_it_is_so():
    assert "no more than the controls" not in verdict(encoder=1)["sentence"]
    assert "no more than the controls" in verdict(encoder=2, random=5)["sentence"]
    assert "not a proof" in verdict(encoder=0)["sentence"]


def test_the_sentence_names_attacker_counts_budget_and_what_was_not_tested():
    sentence = verdict(encoder=24)["sentence"]
    for part in ("white-box", "clamp-then-delta", "encoder", "24/24", "0.1", "specific"):
        assert part in sentence


def test_blind_drift_is_flagged_for_any_arm():
    """P4: activation drift that is 0 while defended pre-activations move."""
    blind = rows_of("published", 24, drift=0.0, leak=0.1)
    assert any("blind" in warning for warning in warnings(blind, {"arms": ["published"]}))
    assert not any("blind" in w for w in warnings(rows_of("encoder", 24, drift=0.0), {"arms": ["encoder"]}))


def test_a_silenced_clamp_is_flagged():
    """P8: a perturbation that switches the clamp off where it acted before."""
    assert any("fewer positions" in w for w in warnings(rows_of("none", 24, silenced=1), {"arms": ["none"]}))
