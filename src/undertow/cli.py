"""The command line: thin; everything it does is a call that Python users can make as well.

Nothing heavy is imported until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from undertow.arguments import feature_fields, nested, pairs_of_names, parse_list, settings_fields
from undertow.errors import UndertowError
from undertow.options import (
    ATTACK,
    CLAMP,
    RUN,
    SAE,
    AsJson,
    CentreInput,
    Device,
    Dtype,
    InputScale,
    LayersPath,
    Model,
    Models,
    PrependBos,
    Revision,
    SAEName,
    SAENames,
    SAERevision,
    Site,
    Threads,
    option,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Does a clamped behaviour stay removed?

undertow searches, white-box and under constraints, for a small perturbation of the residual stream that brings a
behaviour back which an SAE clamp has removed, and says with intervals and controls how much that means.

Start with:

    undertow run ioi                    audit a clamp on the packaged model (a few minutes)
    undertow show runs/ioi-xxxxxxxx     print its tables again
    undertow compare RUN RUN            several runs in one table
    undertow check                      measure the packaged SAE and the machinery
    undertow list                       what is packaged and known
""",
)


@contextmanager
def _user_errors() -> Iterator[None]:
    """One line on stderr and exit code 2 for what the user can put right."""
    try:
        yield
    except UndertowError as error:
        typer.echo(f"undertow: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="the task: ioi")],
    model: Models = None,
    revision: Revision = None,
    sae: SAENames = None,
    sae_revision: SAERevision = None,
    site: Site = None,
    features: Annotated[
        Optional[str],
        option(help="how many attribution picks (20), or a list: indices (12,345; 77,) or Neuronpedia URLs", panel=SAE),
    ] = None,
    clamp: Annotated[Optional[str], option(help="set, set_if_active, scale, zero, floor, cap", panel=CLAMP)] = None,
    value: Annotated[Optional[float], option(help="the clamp's value (factor for scale)", panel=CLAMP)] = None,
    drop_error: Annotated[bool, option("--drop-error", help="clamp without keeping the SAE error", panel=CLAMP)] = False,
    positions: Annotated[Optional[str], option(help="where the clamp acts: all, last, prompt, generated", panel=CLAMP)] = None,
    arms: Annotated[
        Optional[str], option(help="attackers: none,encoder,encoder+decoder,published (default: all)", panel=ATTACK)
    ] = None,
    budgets: Annotated[Optional[str], option(help="norm budgets, e.g. 0.05,0.1,0.2", panel=ATTACK)] = None,
    budget_unit: Annotated[Optional[str], option(help="relative (to ||h_def||) or absolute", panel=ATTACK)] = None,
    order: Annotated[Optional[str], option(help="clamp-then-delta or delta-then-clamp (strict)", panel=ATTACK)] = None,
    steps: Annotated[Optional[int], option(help="solver steps for each budget", panel=ATTACK)] = None,
    prompts: Annotated[Optional[int], option(help="evaluation prompts to try", panel=RUN)] = None,
    names: Annotated[Optional[str], option(help="ioi: your own single-token names, comma-separated", panel=RUN)] = None,
    preset: Annotated[Optional[str], option(help="paper, paper-as-published", panel=RUN)] = None,
    config: Annotated[Optional[Path], option(help="YAML file in the form that --dry-run prints", panel=RUN)] = None,
    seed: Annotated[Optional[int], option(help="seed of everything", panel=RUN)] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    layers_path: LayersPath = None,
    prepend_bos: PrependBos = None,
    centre_input: CentreInput = None,
    input_scale: InputScale = None,
    accept_pairing: Annotated[
        bool, option("--accept-pairing", help="go on although the SAE fits another site or scaling better", panel=SAE)
    ] = False,
    settings: Annotated[
        Optional[list[str]],
        option("--set", help="any other field, e.g. --set audit.min_flips=20; repeatable", panel=RUN, metavar="<field=value>"),
    ] = None,
    out: Annotated[
        Optional[Path], option(help="run folder, or with several models their parent (default: runs/TASK-DIGEST)", panel=RUN)
    ] = None,
    dry_run: Annotated[bool, option("--dry-run", help="print the resolved configuration and stop", panel=RUN)] = False,
    as_json: AsJson = False,
) -> None:
    """Audit a clamp: choose features, clamp them, attack, verify, judge.

    The same command continues a run that was interrupted, and prints the verdict of one that is complete.

    Examples:

        undertow run ioi

        undertow run ioi --features 50 --clamp set_if_active --value -3 --budgets 0.05,0.1

        undertow run ioi --model ./my-model --sae ./my-sae --arms none,encoder

        undertow run ioi --features 150 --model smollm2 --model gemma3-270m      replication: two models, one table

        undertow run ioi --preset paper --model ./gpt2 --sae ./gpt2-small-res-jb --dry-run
    """
    with _user_errors():
        _quiet()
        from undertow.config import resolve
        from undertow.tasks.base import TASKS

        overrides = {
            "model.revision": revision, "model.device": device, "model.dtype": dtype, "model.prepend_bos": prepend_bos,
            "model.layers_path": layers_path, "sae.site": site, "sae.centre_input": centre_input,
            "sae.revision": sae_revision, "sae.input_scale": input_scale, "sae.accept_pairing": accept_pairing or None,
            "clamp.rule": clamp, "clamp.value": value, "clamp.keep_error": False if drop_error else None,
            "clamp.positions": positions,
            "attack.arms": parse_list(arms, str, "arms"), "attack.budgets": parse_list(budgets, float, "budgets"),
            "attack.budget_unit": budget_unit, "attack.order": order, "attack.steps": steps,
            "data.prompts": prompts, "data.names": parse_list(names, str, "names"), "seed": seed,
            "threads": threads, **feature_fields(features), **settings_fields(settings),
        }  # fmt: skip
        data = TASKS.get(task).data
        resolved = [
            resolve(task, data, preset=preset, file=config, overrides=nested({**overrides, **pair}))
            for pair in pairs_of_names(model, sae, overrides)
        ]
        if dry_run:
            typer.echo("---\n".join(_as_yaml(one.model_dump(mode="json")) for one in resolved), nl=False)
            return
        _run_and_print(resolved, out, as_json)


def _run_and_print(configs: list[Any], out: Path | None, as_json: bool) -> None:
    from undertow.report.tables import comparison, run_tables
    from undertow.setting import check_names

    for config in configs:
        check_names(config)
    folders = [_folder(config, out, len(configs) > 1) for config in configs]
    logs = [_run(config, folder) for config, folder in zip(configs, folders, strict=True)]
    if as_json:
        found = [{"run": str(folder), **log} for folder, log in zip(folders, logs, strict=True)]
        typer.echo(json.dumps(found if len(found) > 1 else found[0]))
        return
    console = _console()
    if len(logs) > 1:
        console.print(comparison(logs))
    else:
        console.print(run_tables(logs[0], console.width))
    for folder in folders:
        typer.echo(f"run folder: {folder}")


def _folder(config: Any, out: Path | None, several: bool) -> Path:
    if several and out:
        return out / f"{Path(config.model.name).name}-{config.digest()}"
    return out or Path("runs") / f"{config.task}-{config.digest()}"


def _run(config: Any, folder: Path) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from undertow.audit import run_audit

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        line = bar.add_task("starting", total=None)
        return run_audit(
            config, folder, lambda what, done, total: bar.update(line, description=what, completed=done, total=total)
        ).run


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="a folder made by `undertow run`")], as_json: AsJson = False) -> None:
    """Print the tables of a run, from its files alone.

    Example:

        undertow show runs/ioi-1a2b3c4d
    """
    with _user_errors():
        from undertow.report.tables import run_tables

        log = _complete_run(folder)
        if as_json:
            typer.echo(json.dumps(log))
        else:
            console = _console()
            console.print(run_tables(log, console.width))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="two or more folders made by `undertow run`")], as_json: AsJson = False
) -> None:
    """Print several runs in one table: other models, SAEs, clamps or seeds side by side.

    Example:

        undertow compare runs/ioi-1a2b3c4d runs/ioi-5e6f7a8b
    """
    with _user_errors():
        from undertow.report.tables import comparison

        if len(folders) < 2:
            raise UndertowError("one run cannot be compared.", "Give two run folders or more; `undertow show` prints one.")
        logs = [_complete_run(folder) for folder in folders]
        tasks = {log["config"]["task"] for log in logs}
        if len(tasks) > 1:
            raise UndertowError(f"the runs are of different tasks: {', '.join(sorted(tasks))}.", "Compare runs of one task.")
        if as_json:
            typer.echo(json.dumps([{"run": str(f), **log} for f, log in zip(folders, logs, strict=True)]))
        else:
            _console().print(comparison(logs))


def _complete_run(folder: Path) -> dict[str, Any]:
    from undertow.runlog import read_run

    log, rows = read_run(folder)
    if log.get("status") != "complete" or "verdict" not in log:
        raise UndertowError(
            f"the run in {folder} is not complete ({len(rows)} rows so far).", f"Continue it: {log.get('command')}"
        )
    return log


@app.command()
def check(
    model: Model = None,
    sae: SAEName = None,
    revision: Revision = None,
    sae_revision: SAERevision = None,
    site: Site = None,
    text: Annotated[Optional[Path], typer.Option(help="own text file, UTF-8 (default: the public corpus)")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of held-out text to measure on", min=500)] = 20_000,
    everything: Annotated[bool, typer.Option("--all", help="check every SAE packaged for the model")] = False,
    write_card: Annotated[bool, typer.Option("--write-card", help="store the figures in the SAE's card.json")] = False,
    layers_path: LayersPath = None,
    prepend_bos: PrependBos = None,
    centre_input: CentreInput = None,
    input_scale: InputScale = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether a model and an SAE belong together, and whether the machinery is exact on them.

    Explained variance, L0 and loss recovered on held-out text; clamp readback; gradients against finite differences;
    the suffix pass against the full pass. Exit code 2 when the pair does not belong together or a check fails.

    Examples:

        undertow check

        undertow check --model ./my-model --sae ./my-sae --text mine.txt
    """
    with _user_errors():
        _quiet()
        from undertow.config import ModelConfig, SAEConfig, validated
        from undertow.preflight import check_pairs

        given = {
            "model.name": model, "model.revision": revision, "model.device": device, "model.dtype": dtype,
            "model.prepend_bos": prepend_bos, "model.layers_path": layers_path,
            "sae.name": sae, "sae.revision": sae_revision, "sae.site": site, "sae.centre_input": centre_input,
            "sae.input_scale": input_scale,
        }  # fmt: skip
        sections = nested(given)
        reports = check_pairs(
            validated(ModelConfig, sections.get("model", {})), validated(SAEConfig, sections.get("sae", {})),
            text=text, tokens=tokens, everything=everything, write_card=write_card, threads=threads,
            announce=lambda report: None if as_json else _console().print(report.table()),
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps([report.as_dict() for report in reports]))
        complaints = [complaint for report in reports for complaint in report.complaints()]
        if complaints:
            raise UndertowError("; ".join(complaints), "Choose an SAE that was trained at this site of this model.")


@app.command(name="list")
def list_parts(
    kind: Annotated[
        Optional[str], typer.Argument(help="models, families, saes, formats, tasks, presets or arms (default: all)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is packaged and known: models, architectures, SAEs, formats, tasks, presets, arms.

    Examples:

        undertow list

        undertow list models
    """
    with _user_errors():
        _quiet()
        from undertow.attacks.base import ARMS
        from undertow.config import presets
        from undertow.models.language_model import TESTED_FAMILIES
        from undertow.models.packaged import PACKAGED_MODELS
        from undertow.saes.formats.base import FORMATS
        from undertow.saes.load import packaged_saes
        from undertow.tasks.base import TASKS

        formats = [FORMATS.get(name) for name in FORMATS.names()]
        known = {
            "models": [model.summary() for model in PACKAGED_MODELS.values()],
            "families": [f"{model_type}: {name}" for model_type, name in TESTED_FAMILIES.items()],
            "saes": list(packaged_saes()),
            "formats": [f"{known.name}: {known.weights}" for known in formats],
            "tasks": TASKS.names(),
            "presets": [f"{task}: {name}" for task in TASKS.names() for name in presets(task)],
            "arms": ARMS.names(),
        }
        if kind is not None and kind not in known:
            raise UndertowError(f"there is no list of {kind!r}.", f"Choose from: {', '.join(known)}.")
        shown = known if kind is None else {kind: known[kind]}
        if as_json:
            typer.echo(json.dumps(shown))
            return
        for heading, entries in shown.items():
            typer.echo(heading)
            for entry in entries:
                typer.echo(f"  {entry}")


@app.command()
def schema(task: Annotated[str, typer.Argument(help="the task")] = "ioi") -> None:
    """Print the JSON schema of a task's configuration file.

    Example:

        undertow schema ioi > ioi.schema.json
    """
    with _user_errors():
        _quiet()
        from undertow.config import RunConfig
        from undertow.tasks.base import TASKS

        typer.echo(json.dumps(RunConfig[TASKS.get(task).data].model_json_schema(), indent=2))


def _as_yaml(data: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)


def _console() -> Any:
    from rich.console import Console

    # A pipe or a file has no width of its own; tables must not be cut there.
    # Names may hold square brackets, which are not markup.
    return Console(markup=False) if sys.stdout.isatty() else Console(width=140, markup=False)


def _quiet() -> None:
    """Silence the libraries' own chatter; undertow says what matters itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
