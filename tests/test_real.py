"""On the packaged model with the packaged SAEs: small, but real."""

import json

import pytest
import torch
from test_suffix import relative
from typer.testing import CliRunner

from undertow.cli import app
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import generate, run
from undertow.models.suffix import SuffixPass
from undertow.runlog import read_run
from undertow.saes.load import load_sae, packaged_saes
from undertow.sites import Site

pytestmark = pytest.mark.real

PROMPTS = ["When Mary and John went to the shop, John gave the bag to", "The capital of France is", "2 + 2 ="]
DEPTHS = ("blocks.9.hook_resid_post", "blocks.15.hook_resid_post", "blocks.21.hook_resid_post")


def test_the_model_is_the_real_one(smollm2):
    batch = smollm2.tokens(PROMPTS)
    words = [smollm2.tokenizer.decode(ids) for ids in generate(smollm2, batch, max_new_tokens=1)]
    assert words[:2] == [" Mary", " Paris"]


def test_suffix_pass_equals_the_full_pass(smollm2):
    batch, site = smollm2.tokens(PROMPTS), Site(15)
    weight = torch.randn(3, smollm2.d_model, generator=torch.Generator().manual_seed(0))
    start = torch.randn(3, 1, smollm2.d_model, generator=torch.Generator().manual_seed(1))
    results = []
    suffix = SuffixPass(smollm2, batch, site)
    for fast in (True, False):
        delta = start.clone().requires_grad_()
        edits = perturbation_edits((Slot(site, -1),), delta)
        hidden = (suffix(after=edits) if fast else run(smollm2, batch, edits))[:, -1]
        (gradient,) = torch.autograd.grad((hidden * weight).sum(), delta)
        results.append((hidden, gradient))
    assert relative(results[0][0], results[1][0]) <= 1e-5
    assert relative(results[0][1], results[1][1]) <= 1e-5


def test_chosen_logits_equal_the_full_unembedding(smollm2):
    hidden = run(smollm2, smollm2.tokens(PROMPTS))[:, -1]
    ids = torch.tensor([[5, 900], [17, 40000], [3, 3]])
    assert torch.allclose(smollm2.logits(hidden, ids), smollm2.network.lm_head(hidden).gather(1, ids), atol=1e-4)


def test_packaged_saes_stand_at_three_depths_and_are_small():
    found = {name.split("/")[1]: folder for name, folder in packaged_saes().items() if name.startswith("smollm2/")}
    assert set(DEPTHS) <= set(found)
    for depth in DEPTHS:
        assert (found[depth] / "sae_weights.safetensors").stat().st_size <= 12_000_000
        card = json.loads((found[depth] / "card.json").read_text())
        assert card["held_out"]["explained_variance"] >= 0.80
        assert card["held_out"]["loss_recovered"] >= 0.95
        assert card["held_out"]["l0"] <= 64
        assert {"text", "tokens", "dead_features"} <= set(card["held_out"])
        assert {"version", "seed", "rows_trained", "text"} <= set(card["recipe"])


def test_check_re_measures_the_card(smollm2):
    """The shipped figures come out again from the shipped files, on a part of the held-out text."""
    from undertow.preflight import check_pair
    from undertow.texts import corpus_texts

    sae = load_sae("smollm2/blocks.15.hook_resid_post", smollm2)
    report = check_pair(smollm2, sae, corpus_texts("held_out"), 4000)
    assert report.complaints() == []
    assert report.quality.explained_variance == pytest.approx(sae.card["held_out"]["explained_variance"], abs=0.03)
    assert report.quality.loss_recovered == pytest.approx(sae.card["held_out"]["loss_recovered"], abs=0.02)


def test_check_refuses_an_sae_at_the_wrong_site(smollm2):
    from undertow.preflight import check_pair
    from undertow.texts import corpus_texts

    sae = load_sae("smollm2/blocks.9.hook_resid_post", smollm2, site="blocks.21.hook_resid_post")
    complaints = check_pair(smollm2, sae, corpus_texts("held_out"), 1000).complaints()
    assert any("explained variance" in complaint for complaint in complaints)


def test_ioi_audit_end_to_end(tmp_path):
    """Leak <= 1e-5 and pre-activation drift <= 1e-4 for every sample of our arms; the published optimiser is far above (P1)."""
    command = ["run", "ioi", "--prompts", "48", "--budgets", "0.1,0.3", "--steps", "15", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    log, rows = read_run(tmp_path / "run")
    assert log["counts"]["valid_flips"] >= 8
    ours = [row for row in rows if row["arm"] in ("encoder", "encoder+decoder")]
    assert max(row["leak"] for row in ours) <= 1e-5
    assert max(row["relative_preactivation_drift"] for row in ours) <= 1e-4
    published = [row for row in rows if row["arm"] == "published"]
    assert min(row["leak"] for row in published) > 1e-3
    zero = [row for row in rows if row["arm"] == "control:zero"]
    assert not any(row["holds"] for row in zero)
    assert all(row["recovered"] == pytest.approx(row["defended"], abs=1e-3) for row in zero)
    assert {row["sample"] for row in zero} == {row["sample"] for row in ours}
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout)["seconds"] == log["seconds"], "a finished run is not run again"


def test_a_name_of_two_tokens_is_refused(tmp_path):
    names = "Anna,Tom,Mary,John,Sarah,David,Laura,Bartholomewson"
    result = CliRunner().invoke(app, ["run", "ioi", "--names", names, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "' Bartholomewson' is" in result.stderr
    assert not (tmp_path / "run").exists(), "nothing is left behind"
