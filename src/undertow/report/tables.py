"""The tables of a run, from its files alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

# Heading, whether it is shown in a narrow terminal too, and the cell of an entry of `run.json`.
COLUMNS: tuple[tuple[str, bool, Callable[[dict[str, Any]], str]], ...] = (
    ("budget", True, lambda e: f"{e['budget']:g}"),
    ("recovered", True, lambda e: f"{e['recovered']}/{e['n']}"),
    ("rate", False, lambda e: f"{e['rate']:.2f}"),
    ("interval", True, lambda e: "[{:.2f}, {:.2f}]".format(*e["interval"])),
    ("rel. norm", True, lambda e: f"{e['metrics']['relative_norm']['mean']:.3f}"),
    ("max leak", True, lambda e: f"{e['metrics']['leak']['max']:.0e}"),
    ("drift", False, lambda e: f"{e['metrics']['drift']['mean']:.2g}"),
    ("pre-act. drift", False, lambda e: f"{e['metrics']['preactivation_drift']['mean']:.1e}"),
    ("decoder share", False, lambda e: f"{e['metrics']['decoder_share']['mean']:.2f}"),
    ("score", False, lambda e: f"{e['metrics']['score']['mean']:.2f}"),
)
WIDE = 140


def run_tables(run: dict[str, Any], width: int = WIDE) -> Group:
    """Verdict, set-up, arms with intervals, and warnings of a run, for rich to print.

    Args:
        run: the contents of a complete `run.json`.
        width: columns of the terminal; below 140 only the main columns are shown.
    """
    verdict = run["verdict"]
    parts: list[Any] = [Text(verdict["label"].upper(), style="bold"), Text(verdict["sentence"]), Text()]
    parts += [_setup(run), Text(), _arms(run, width), _legend(run)]
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in run["warnings"]]
    return Group(*parts)


def _setup(run: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    clamp, counts, means = run["clamp"][0], run["counts"], run["means"]
    value = "" if clamp["rule"] == "zero" else f" {clamp['value']}"
    table.add_row("model", run["model"]["name"])
    table.add_row("SAE", f"{run['sae']['name']} at {run['sae']['site']}, {run['sae']['latents']} latents")
    table.add_row(
        "clamp",
        f"{clamp['rule']}{value} on {len(clamp['features'])} features, positions {clamp['positions']}, "
        f"error {'kept' if clamp['keep_error'] else 'dropped'}",
    )
    table.add_row(
        "valid flips",
        f"{counts['valid_flips']} of {counts['base_holds']} prompts on which the base model shows the behaviour "
        f"({counts['candidates']} tried)",
    )
    table.add_row("mean score", f"base {means['base']:.2f}, clamped {means['defended']:.2f}")
    return table


def _arms(run: dict[str, Any], width: int) -> Table:
    table = Table(title=f"Recovery, {run['config']['attack']['order']}", title_justify="left")
    columns = [(heading, cell) for heading, always, cell in COLUMNS if always or width >= WIDE]
    table.add_column("arm", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    # The random controls of the other arms say the same as the reference arm's; they are in run.json.
    shown = {arm: entries for arm, entries in run["controls"].items() if not arm.startswith("control:random:")}
    for arm, entries in {**run["arms"], **shown}.items():
        ordered = sorted(entries.values(), key=lambda entry: entry["budget"])
        for index, entry in enumerate(ordered):
            cells = [cell(entry) for _, cell in columns]
            table.add_row("" if index else arm, *cells, end_section=index == len(ordered) - 1)
    return table


def _legend(run: dict[str, Any]) -> Text:
    audit, attack = run["config"]["audit"], run["config"]["attack"]
    unit = "share of ||h_def||" if attack["budget_unit"] == "relative" else "absolute norm"
    return Text(
        f"Budget: {unit}. Intervals: Wilson {audit['confidence']:.0%}, for samples clustered by source. Leak: "
        "||A'd|| / (||A|| ||d||), A the defended encoder columns. Drift: defended activations, mean over samples. Score: "
        "of the recovered model; above 0 the behaviour holds.",
        style="dim",
    )
