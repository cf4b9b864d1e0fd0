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

from undertow.errors import UndertowError

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


def _parse_list(text: str | None, convert: type, field: str) -> list[Any] | None:
    if text is None:
        return None
    try:
        pieces = [convert(piece.strip()) for piece in text.split(",") if piece.strip()]
        if pieces:
            return pieces
        raise ValueError
    except ValueError:
        raise UndertowError(
            f"--{field} {text!r} is not a comma-separated list of {convert.__name__} values.", "Example: 1,2,3."
        ) from None


Model = Annotated[Optional[str], typer.Option(help="packaged name, hub id, or local folder [default: smollm2]")]
SAEName = Annotated[
    Optional[str], typer.Option("--sae", help="packaged name, local folder, or hub id/folder [default: packaged]")
]
Site = Annotated[Optional[str], typer.Option(help="overrides the SAE's own hook point, e.g. blocks.15.hook_resid_post")]
PrependBos = Annotated[bool, typer.Option("--prepend-bos", help="put a BOS before prompts if the tokenizer adds none")]
CentreInput = Annotated[
    bool, typer.Option("--centre-input", help="the SAE reads mean-centred residuals (TransformerLens weights)")
]
Device = Annotated[Optional[str], typer.Option(help="torch device [default: cpu]")]
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16 [default: float32]")]
Threads = Annotated[Optional[int], typer.Option(help="CPU threads [default: one for each core]", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="the task: ioi")],
    model: Model = None,
    revision: Annotated[Optional[str], typer.Option(help="hub revision of the model")] = None,
    sae: SAEName = None,
    site: Site = None,
    features: Annotated[
        Optional[str], typer.Option(help="how many features attribution picks (20), or a list of indices (12,345,6; 77,)")
    ] = None,
    clamp: Annotated[Optional[str], typer.Option(help="set, set_if_active, scale, zero, floor, cap")] = None,
    value: Annotated[Optional[float], typer.Option(help="the clamp's value (factor for scale)")] = None,
    drop_error: Annotated[bool, typer.Option("--drop-error", help="clamp without keeping the SAE error")] = False,
    positions: Annotated[Optional[str], typer.Option(help="where the clamp acts: all, last, prompt, generated")] = None,
    arms: Annotated[
        Optional[str], typer.Option(help="attackers: none,encoder,encoder+decoder,published [default: all]")
    ] = None,
    budgets: Annotated[Optional[str], typer.Option(help="norm budgets, e.g. 0.05,0.1,0.2")] = None,
    budget_unit: Annotated[Optional[str], typer.Option(help="relative (to ||h_def||) or absolute")] = None,
    order: Annotated[Optional[str], typer.Option(help="clamp-then-delta or delta-then-clamp (strict)")] = None,
    steps: Annotated[Optional[int], typer.Option(help="solver steps for each budget")] = None,
    prompts: Annotated[Optional[int], typer.Option(help="evaluation prompts to try")] = None,
    names: Annotated[Optional[str], typer.Option(help="ioi: your own single-token names, comma-separated")] = None,
    preset: Annotated[Optional[str], typer.Option(help="paper, paper-as-published")] = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file in the form that --dry-run prints")] = None,
    seed: Annotated[Optional[int], typer.Option(help="seed of everything")] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    prepend_bos: PrependBos = False,
    centre_input: CentreInput = False,
    out: Annotated[Optional[Path], typer.Option(help="run folder [default: runs/TASK-DIGEST]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Audit a clamp: choose features, clamp them, attack, verify, judge.

    The same command continues a run that was interrupted, and prints the verdict of one that is complete.

    Examples:

        undertow run ioi

        undertow run ioi --features 50 --clamp set_if_active --value -3 --budgets 0.05,0.1

        undertow run ioi --model ./my-model --sae ./my-sae --arms none,encoder

        undertow run ioi --preset paper --model ./gpt2 --sae ./gpt2-small-res-jb --dry-run
    """
    with _user_errors():
        overrides = _nested(
            {
                "model.name": model, "model.revision": revision, "model.device": device, "model.dtype": dtype,
                "model.prepend_bos": prepend_bos or None, "sae.centre_input": centre_input or None,
                "sae.name": sae, "sae.site": site, "clamp.rule": clamp, "clamp.value": value,
                "clamp.keep_error": False if drop_error else None, "clamp.positions": positions,
                "attack.arms": _parse_list(arms, str, "arms"), "attack.budgets": _parse_list(budgets, float, "budgets"),
                "attack.budget_unit": budget_unit, "attack.order": order, "attack.steps": steps,
                "data.prompts": prompts, "data.names": _parse_list(names, str, "names"), "seed": seed,
                "threads": threads, **_feature_fields(features),
            }
        )  # fmt: skip
        _quiet()
        from undertow.config import resolve
        from undertow.tasks.base import TASKS

        resolved = resolve(task, TASKS.get(task).data, preset=preset, file=config, overrides=overrides)
        if dry_run:
            typer.echo(_as_yaml(resolved.model_dump(mode="json")))
            return
        folder = out or Path("runs") / f"{task}-{resolved.digest()}"
        _run_and_print(resolved, folder, as_json)


def _feature_fields(text: str | None) -> dict[str, Any]:
    """`20` is a count; a list, which one index makes with a trailing comma, is the features themselves."""
    features = _parse_list(text, int, "features")
    if features is None or text is None:
        return {}
    if "," not in text:
        return {"features.method": "attribution", "features.count": features[0], "features.indices": []}
    return {"features.method": "given", "features.indices": features}


def _run_and_print(config: Any, folder: Path, as_json: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from undertow.audit import run_audit
    from undertow.report.tables import run_tables

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        line = bar.add_task("starting", total=None)
        log = run_audit(
            config, folder, lambda what, done, total: bar.update(line, description=what, completed=done, total=total)
        )
    if as_json:
        typer.echo(json.dumps({"run": str(folder), **log.run}))
        return
    console = _console()
    console.print(run_tables(log.run, console.width))
    typer.echo(f"run folder: {folder}")


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="a folder made by `undertow run`")], as_json: AsJson = False) -> None:
    """Print the tables of a run, from its files alone.

    Example:

        undertow show runs/ioi-1a2b3c4d
    """
    with _user_errors():
        from undertow.report.tables import run_tables
        from undertow.runlog import read_run

        log, rows = read_run(folder)
        if log.get("status") != "complete" or "verdict" not in log:
            raise UndertowError(
                f"the run in {folder} is not complete ({len(rows)} rows so far).", f"Continue it: {log.get('command')}"
            )
        if as_json:
            typer.echo(json.dumps(log))
        else:
            console = _console()
            console.print(run_tables(log, console.width))


@app.command()
def check(
    model: Model = None,
    sae: SAEName = None,
    site: Site = None,
    text: Annotated[Optional[Path], typer.Option(help="own text file, UTF-8 [default: the public corpus]")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of held-out text to measure on", min=500)] = 20_000,
    everything: Annotated[bool, typer.Option("--all", help="check every SAE packaged for the model")] = False,
    write_card: Annotated[bool, typer.Option("--write-card", help="store the figures in the SAE's card.json")] = False,
    prepend_bos: PrependBos = False,
    centre_input: CentreInput = False,
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

        given = {"name": model, "device": device, "dtype": dtype, "prepend_bos": prepend_bos or None}
        reports = check_pairs(
            validated(ModelConfig, {field: value for field, value in given.items() if value is not None}),
            SAEConfig(name=sae, site=site, centre_input=centre_input), text=text, tokens=tokens, everything=everything,
            write_card=write_card, threads=threads,
            announce=lambda report: None if as_json else _console().print(report.table()),
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps([report.as_dict() for report in reports]))
        complaints = [complaint for report in reports for complaint in report.complaints()]
        if complaints:
            raise UndertowError("; ".join(complaints), "Choose an SAE that was trained at this site of this model.")


@app.command(name="list")
def list_parts(as_json: AsJson = False) -> None:
    """What is packaged and known: models, SAEs, tasks, presets, arms.

    Example:

        undertow list
    """
    _quiet()
    from undertow.attacks.base import ARMS
    from undertow.config import presets
    from undertow.models.packaged import PACKAGED_MODELS
    from undertow.saes.load import packaged_saes
    from undertow.tasks.base import TASKS

    known = {
        "models": [f"{m.name}: {m.description}, {m.licence}, {m.wheel.megabytes} MB" for m in PACKAGED_MODELS.values()],
        "saes": list(packaged_saes()),
        "tasks": TASKS.names(),
        "presets": [f"{task}: {name}" for task in TASKS.names() for name in presets(task)],
        "arms": ARMS.names(),
    }
    if as_json:
        typer.echo(json.dumps(known))
        return
    for kind, entries in known.items():
        typer.echo(kind)
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


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested dictionaries, leaving out what was not given."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        if value is None:
            continue
        *parents, last = dotted.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _as_yaml(data: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)


def _console() -> Any:
    from rich.console import Console

    # A pipe or a file has no width of its own; tables must not be cut there.
    return Console() if sys.stdout.isatty() else Console(width=140)


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
