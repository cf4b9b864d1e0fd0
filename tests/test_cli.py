"""The command line: help that teaches, and bad input refused in one line with exit code 2."""

import json

import pytest
import yaml
from planted import error_route, planted_audit
from test_saes import write
from typer.testing import CliRunner

from undertow.cli import app
from undertow.errors import UndertowError

RUNNER = CliRunner()
PEDIA = "https://www.neuronpedia.org/gpt2-small"


def refused(*arguments: str) -> str:
    """Run a command that must be refused; its one line on stderr."""
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "chess"], "task 'chess' is unknown. Choose from: ioi"),
        (["run", "ioi", "--model", "./missing"], "model './missing' is not a folder"),
        (["run", "ioi", "--model", "two words"], "model 'two words' is not a folder"),
        (["run", "ioi", "--sae", "./missing"], "SAE './missing' is not a folder"),
        (["run", "ioi", "--budgets", "0.1,-2"], "a budget must be a positive number, not -2.0"),
        (["run", "ioi", "--budgets", "small"], "--budgets 'small' is not a comma-separated list of float"),
        (["run", "ioi", "--features", ""], "--features '' is not a comma-separated list"),
        (["run", "ioi", "--seed", "-1"], "seed: Input should be greater than or equal to 0"),
        (["run", "ioi", "--value", "nan"], "clamp.value"),
        (["check", "--dtype", "fp16"], "dtype"),
        (["run", "ioi", "--features", "0"], "features.count: Input should be greater than 0"),
        (["run", "ioi", "--clamp", "freeze"], "clamp.rule"),
        (["run", "ioi", "--arms", "none,magic"], "arm 'magic' is unknown"),
        (["run", "ioi", "--preset", "best"], "task ioi has no preset 'best'. Choose from: paper, paper-as-published"),
        (["run", "ioi", "--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["run", "ioi", "--order", "sideways"], "attack.order"),
        (["run", "ioi", "--dtype", "int4"], "model.dtype"),
        (["show", "nowhere"], "nowhere is not a run folder"),
        (["check", "--model", "./missing"], "model './missing' is not a folder"),
        (["schema", "chess"], "task 'chess' is unknown"),
        (["list", "toys"], "there is no list of 'toys'. Choose from: models, families, saes"),
        (["compare", "nowhere"], "one run cannot be compared"),
        (["compare", "nowhere", "else"], "nowhere is not a run folder"),
        (["run", "ioi", "--model", "smollm2", "--model", "smollm2"], "the same model was given twice"),
        (["run", "ioi", "--model", "a/b", "--sae", "x", "--sae", "y"], "2 SAEs were given for 1 models"),
        (["run", "ioi", "--set", "audit.min_flips"], "is not of the form FIELD=VALUE"),
        (["run", "ioi", "--set", "audit.min_flips=[1"], "the value is not YAML"),
        (["run", "ioi", "--set", "audit.min_flip=3"], "audit.min_flip: Extra inputs are not permitted"),
        (["run", "ioi", "--revision", "v1"], "only models on the hub have revisions"),
        (["run", "ioi", "--input-scale", "-1"], "sae.input_scale: Input should be greater than 0"),
        (["run", "ioi", "--features", "https://www.neuronpedia.org/gpt2-small"], "is not the address of a feature"),
        (["run", "ioi", "--features", f"{PEDIA}/7-res-jb/1,{PEDIA}/8-res-jb/1"], "--features are of several SAEs"),
    ],
)
def test_bad_input(arguments, message):
    assert message in refused(*arguments)


def test_a_field_that_does_not_exist(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("attack: {stepz: 3}\n")
    assert "attack.stepz: Extra inputs are not permitted" in refused("run", "ioi", "--config", str(file))
    file.write_text("- a list\n")
    assert "holds no mapping" in refused("run", "ioi", "--config", str(file))
    file.write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read as YAML" in refused("run", "ioi", "--config", str(file))
    file.write_text("features: {indices: [3, 4]}\n")
    assert "go together" in refused("run", "ioi", "--config", str(file))
    file.write_text("task: tpp\n")
    assert "is for task 'tpp'" in refused("run", "ioi", "--config", str(file))


def test_unwritable_output_is_refused_before_loading(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot be written" in refused("run", "ioi", "--out", str(blocker / "run"))


def test_a_broken_sae_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    import torch

    from undertow import setting

    monkeypatch.setattr(setting, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    write(tmp_path / "sae", b_enc=torch.full((40,), float("nan")))
    common = ["run", "ioi", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "run")]
    assert "b_enc holds values that are NaN" in refused(*common)
    write(tmp_path / "sae")
    assert "feature 40 is out of range" in refused(*common, "--features", "1,40")
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_no_valid_flip_says_what_to_do(tmp_path):
    """A clamp that removes nothing leaves nothing to recover."""
    with pytest.raises(UndertowError, match="no valid flip: the behaviour holds on 24 of 24 prompts"):
        planted_audit(error_route(0), tmp_path, clamp={"rule": "floor", "value": 0.0})


@pytest.mark.parametrize("command", [[], ["run"], ["show"], ["compare"], ["check"], ["list"], ["schema"]])
def test_help(command):
    result = RUNNER.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "undertow" in result.output


@pytest.mark.parametrize("preset", ["paper", "paper-as-published"])
def test_presets_resolve_and_hold_the_published_settings(preset):
    """presets.md: GPT-2 small, 64 features at the last position, set_if_active to -5, 100 steps at 0.1, budget 20."""
    result = RUNNER.invoke(app, ["run", "ioi", "--preset", preset, "--dry-run"])
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(result.stdout)
    assert config["model"]["name"] == "gpt2"
    assert config["sae"]["site"] == "blocks.4.hook_resid_pre"
    assert config["features"] == {"method": "attribution", "count": 64, "positions": "last", "indices": [], "neuronpedia": None}
    assert (config["clamp"]["rule"], config["clamp"]["value"]) == ("set_if_active", -5.0)
    assert config["attack"]["published_steps"] == 100
    assert max(config["attack"]["budgets"]) == 20
    assert config["attack"]["budget_unit"] == "absolute"
    assert config["data"]["orders"] == ["BABA"]
    assert config["preset"] == preset


def test_dry_run_output_is_a_valid_configuration_file(tmp_path):
    printed = RUNNER.invoke(app, ["run", "ioi", "--features", "3,4", "--budgets", "0.5,0.1", "--dry-run"]).stdout
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    again = RUNNER.invoke(app, ["run", "ioi", "--config", str(file), "--dry-run"]).stdout
    assert again == printed
    config = yaml.safe_load(printed)
    assert config["features"]["method"] == "given"
    assert config["attack"]["budgets"] == [0.1, 0.5]


def test_one_feature_and_a_count_over_a_given_list(tmp_path):
    one = yaml.safe_load(RUNNER.invoke(app, ["run", "ioi", "--features", "77,", "--dry-run"]).stdout)
    assert one["features"]["indices"] == [77]
    file = tmp_path / "run.yaml"
    file.write_text("features: {method: given, indices: [3]}\nattack: {arms: [encoder, encoder]}\n")
    config = yaml.safe_load(RUNNER.invoke(app, ["run", "ioi", "--config", str(file), "--features", "5", "--dry-run"]).stdout)
    assert (config["features"]["method"], config["features"]["count"]) == ("attribution", 5)
    assert config["attack"]["arms"] == ["encoder"], "an arm named twice would count its samples twice"


def test_schema_names_every_field():
    schema = json.loads(RUNNER.invoke(app, ["schema", "ioi"]).stdout)
    assert {"model", "sae", "features", "clamp", "attack", "data", "audit"} <= set(schema["properties"])


def test_show_prints_tables_from_the_files_alone(tmp_path):
    planted_audit(error_route(0), tmp_path, attack={"steps": 4, "published_steps": 4})
    shown = RUNNER.invoke(app, ["show", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    for expected in ("encoder+decoder", "control:undo", "valid flips", "24/24", "RECOVERED"):
        assert expected in shown.stdout
    assert json.loads(RUNNER.invoke(app, ["show", str(tmp_path), "--json"]).stdout)["status"] == "complete"
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "status": "running"}))
    assert "is not complete" in refused("show", str(tmp_path))


def test_list():
    result = RUNNER.invoke(app, ["list", "--json"])
    known = json.loads(result.stdout)
    assert known["presets"] == ["ioi: paper", "ioi: paper-as-published"]
    assert {"none", "encoder", "encoder+decoder", "published"} <= set(known["arms"])


def test_list_models_says_what_fetching_costs(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path))
    shown = RUNNER.invoke(app, ["list", "models"]).stdout
    assert "gemma3-270m: Gemma 3 270M (pretrained)" in shown
    assert "Gemma Terms of Use; to be fetched on first use: 240 MB from PyPI, then about 60 s once" in shown
    assert "blocks." not in shown, "only what was asked for"
    assert "gemma2: Gemma 2" in RUNNER.invoke(app, ["list", "families"]).stdout


def test_features_by_their_addresses_on_neuronpedia():
    addresses = f"{PEDIA}/8-res-jb/123, www.neuronpedia.org/gpt2-small/8-res-jb/77?embed=true"
    config = yaml.safe_load(RUNNER.invoke(app, ["run", "ioi", "--features", addresses, "--dry-run"]).stdout)
    assert config["features"]["indices"] == [123, 77]
    assert config["features"]["neuronpedia"] == "gpt2-small/8-res-jb"


def test_features_of_another_sae_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    from undertow import setting

    write(tmp_path / "sae")
    monkeypatch.setattr(setting, "load_model", lambda **_: pytest.fail("the model was loaded"))
    common = ("run", "ioi", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "r"))
    message = refused(*common, "--features", f"{PEDIA}/8-res-jb/3")
    assert "the features are of gpt2-small/8-res-jb on Neuronpedia" in message
    write(tmp_path / "sae", normalize_activations="expected_average_only_in")
    assert "Give it with --input-scale; `undertow check` estimates it." in refused(*common)


def test_any_field_by_set():
    arguments = ["--set", "audit.min_flips=3", "--set", "attack.offsets=[-2, -1]", "--dry-run"]
    config = yaml.safe_load(RUNNER.invoke(app, ["run", "ioi", *arguments]).stdout)
    assert (config["audit"]["min_flips"], config["attack"]["offsets"]) == (3, [-2, -1])


def test_several_models_make_several_runs(tmp_path):
    printed = RUNNER.invoke(app, ["run", "ioi", "--model", "smollm2", "--model", "gemma3-270m", "--dry-run"]).stdout
    assert [config["model"]["name"] for config in yaml.safe_load_all(printed)] == ["smollm2", "gemma3-270m"]
    write(tmp_path / "sae")
    pairs = ["--model", "smollm2", "--model", "smollm2", "--sae", str(tmp_path / "sae"), "--sae", "smollm2/x"]
    configs = list(yaml.safe_load_all(RUNNER.invoke(app, ["run", "ioi", *pairs, "--dry-run"]).stdout))
    assert [config["sae"]["name"] for config in configs] == [str(tmp_path / "sae"), "smollm2/x"]


def test_compare_prints_runs_side_by_side(tmp_path):
    for seed in (0, 1):
        planted_audit(error_route(seed), tmp_path / str(seed), seed, attack={"steps": 4, "published_steps": 4})
    folders = [str(tmp_path / str(seed)) for seed in (0, 1)]
    shown = RUNNER.invoke(app, ["compare", *folders])
    assert shown.exit_code == 0, shown.output
    for expected in ("planted (1)", "planted (2)", "encoder+decoder", "control:undo", "valid flips", "24/24 ["):
        assert expected in shown.stdout
    logs = json.loads(RUNNER.invoke(app, ["compare", *folders, "--json"]).stdout)
    assert [log["status"] for log in logs] == ["complete", "complete"]
    run = json.loads((tmp_path / "1" / "run.json").read_text())
    (tmp_path / "1" / "run.json").write_text(json.dumps({**run, "config": {**run["config"], "task": "tpp"}}))
    assert "the runs are of different tasks: ioi, tpp" in refused("compare", *folders)
