"""The run folder: resumable, readable without a model, safe against damage (E6)."""

import json

import pytest
import torch
from planted import error_route, planted_config, planted_setting
from safetensors import safe_open

from undertow import audit as audit_module
from undertow.audit import Auditor, audit
from undertow.defences.clamp import Clamp, Clamps
from undertow.errors import UndertowError
from undertow.runlog import RunLog, environment, exclusive, read_run
from undertow.setting import find_flips

FIELDS = {
    "sample", "cluster", "arm", "budget", "status", "base", "defended", "recovered", "holds", "delta_norm", "relative_norm",
    "leak", "drift", "relative_drift", "preactivation_drift", "decode_drift", "reactivated", "eligible", "margin",
    "decoder_share", "steps", "seconds", "delta",
}  # fmt: skip


def header(setting):
    return {**environment(), "config": setting.config.model_dump(mode="json"), "task": "ioi"}


@pytest.fixture(scope="module")
def setting():
    return planted_setting(error_route(0), audit={"batch_size": 12, "resamples": 50}, attack={"steps": 6, "published_steps": 6})


def comparable(folder):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    run = json.loads((folder / "run.json").read_text())
    return sorted(rows, key=lambda r: (r["arm"], r["budget"], r["sample"])), {
        key: run[key] for key in ("arms", "controls", "verdict", "counts", "warnings")
    }


def test_contract(setting, tmp_path):
    log = audit(setting, RunLog(tmp_path, header(setting)))
    run, rows = read_run(tmp_path)
    for field in (
        "format", "command", "config", "model", "sae", "clamp", "task", "versions", "seeds", "machine", "counts", "arms",
        "controls", "verdict", "warnings", "seconds",
    ):  # fmt: skip
        assert field in run, field
    assert run["status"] == "complete"
    assert set(run["counts"]) == {"candidates", "base_holds", "valid_flips"}
    assert {"label", "sentence", "thresholds"} <= set(run["verdict"])
    for arm in ("none", "encoder", "encoder+decoder", "published"):
        assert {"n", "recovered", "rate", "interval"} <= set(run["arms"][arm]["0.25"])
    others = {f"control:random:{arm}" for arm in ("none", "encoder+decoder", "published")}
    assert set(run["controls"]) == {"control:zero", "control:random", "control:undo"} | others
    assert all(set(row) >= FIELDS for row in rows)
    with safe_open(tmp_path / "deltas.safetensors", framework="pt") as file:
        assert set(file.keys()) == {row["delta"] for row in rows}
        assert json.loads(file.metadata()["slots"]) == [{"site": "blocks.0.hook_resid_post", "offset": -1}]
        for row in rows[::17]:
            assert float(file.get_tensor(row["delta"]).double().norm()) == pytest.approx(row["delta_norm"], abs=1e-9)
    assert log.run["verdict"] == run["verdict"]


def test_a_killed_run_goes_on_and_ends_equal(setting, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    audit(setting, RunLog(whole, header(setting)))

    original, done = audit_module.Auditor.run, []

    def dies(self, unit):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit.name)
        original(self, unit)

    monkeypatch.setattr(audit_module.Auditor, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        audit(setting, RunLog(killed, header(setting)))
    # The kill also tore the last line in two.
    path = killed / "samples.jsonl"
    path.write_text(path.read_text()[:-40])

    again = []
    monkeypatch.setattr(audit_module.Auditor, "run", lambda self, unit: (again.append(unit.name), original(self, unit)))
    audit(setting, RunLog(killed, header(setting)))
    assert done[-1] in again, "the unit with the torn row is done again"
    assert not set(done[:-1]) & set(again), "finished units are not"
    assert comparable(whole) == comparable(killed)
    assert (whole / "deltas.safetensors").read_bytes() == (killed / "deltas.safetensors").read_bytes()
    assert not (killed / "parts").exists()


def test_a_finished_run_is_not_touched(setting, tmp_path):
    audit(setting, RunLog(tmp_path, header(setting)))
    before = (tmp_path / "run.json").read_bytes()
    assert RunLog(tmp_path, header(setting)).finished
    assert (tmp_path / "run.json").read_bytes() == before


def test_another_configuration_is_refused(setting, tmp_path):
    RunLog(tmp_path, header(setting))
    other = {**header(setting), "config": planted_config(7).model_dump(mode="json")}
    with pytest.raises(UndertowError, match="another configuration"):
        RunLog(tmp_path, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a run folder"), ("{", "not a run log"), ("[]", "not a run log"), ('{"format": 99}', "format 99")],
)
def test_damaged_folders(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UndertowError, match=message):
        read_run(tmp_path)


def test_abandoning_an_empty_run_leaves_the_users_files(setting, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    RunLog(tmp_path, header(setting)).abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    RunLog(tmp_path / "new", header(setting)).abandon()
    assert not (tmp_path / "new").exists()


def test_other_weights_under_the_same_name_are_refused(setting, tmp_path):
    """A finished run is not shown as the result of weights that it was not made with."""
    inputs = {"inputs": {"model": "a", "sae": "b"}}
    audit(setting, RunLog(tmp_path, {**header(setting), **inputs}))
    with pytest.raises(UndertowError, match="other model or SAE weights"):
        RunLog(tmp_path, {**header(setting), "inputs": {"model": "a", "sae": "c"}})


def test_a_folder_with_files_of_others_is_left_alone(setting, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "engine.txt").write_text("mine")
    with pytest.raises(UndertowError, match="holds parts but no run.json"):
        RunLog(tmp_path, header(setting))
    assert (tmp_path / "parts" / "engine.txt").exists()


def test_a_second_process_is_refused(tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(UndertowError, match="another process"), exclusive(tmp_path / "run"):
        pass


def test_each_arm_has_a_random_control_at_its_own_norms(setting, tmp_path):
    """C-a: the same norm and the same subspace as the arm that is controlled, sample by sample."""
    audit(setting, RunLog(tmp_path, header(setting)))
    rows = {(row["arm"], row["sample"], row["budget"]): row for row in read_run(tmp_path)[1]}
    for (arm, sample, budget), row in rows.items():
        if arm.startswith("control:random"):
            controlled = arm.removeprefix("control:random").removeprefix(":") or "encoder"
            assert row["delta_norm"] == pytest.approx(rows[controlled, sample, budget]["delta_norm"], rel=1e-5)
            if controlled in ("encoder", "encoder+decoder", "published"):
                assert row["leak"] <= 1e-6


def test_a_constraint_that_forbids_everything_is_refused_before_the_attack(tmp_path):
    from dataclasses import replace as with_

    wide = planted_setting(error_route(0))
    encoder = torch.randn(wide.sae.d_model, 30)
    sae = with_(wide.sae, W_enc=encoder, W_dec=encoder.T.contiguous(), b_enc=torch.zeros(30))
    clamps = Clamps((Clamp(sae.features(range(30)), "set", -5.0),))
    with pytest.raises(UndertowError, match="forbids every direction of a stream of width 24"):
        Auditor(with_(wide, defence=clamps), find_flips(wide), RunLog(tmp_path, header(wide)))
