"""The tables of a run, from its files alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

Cell = str


def run_tables(run: dict[str, Any]) -> Group:
    """Verdict, set-up, arms with intervals, and warnings of a run, for rich to print.

    Args:
        run: the contents of a complete `run.json`.
    """
    verdict = run["verdict"]
    parts: list[Any] = [Text(verdict["label"].upper(), style="bold"), Text(verdict["sentence"]), Text()]
    parts += [_setup(run), Text(), _arms(run), _legend(run)]
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


def _arms(run: dict[str, Any]) -> Table:
    table = Table(title=f"Recovery, {run['config']['attack']['order']}", title_justify="left")
    for heading in ("arm", "budget", "recovered", "rate", "interval", "rel. norm", "leak (max)", "drift",
                    "pre-act. drift", "decoder share"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm, entries in {**run["arms"], **run["controls"]}.items():
        ordered = sorted(entries.values(), key=lambda entry: entry["budget"])
        for index, entry in enumerate(ordered):
            table.add_row(*_cells(arm if index == 0 else "", entry), end_section=index == len(ordered) - 1)
    return table


def _cells(arm: str, entry: dict[str, Any]) -> list[Cell]:
    (low, high), metrics = entry["interval"], entry["metrics"]
    return [
        arm, f"{entry['budget']:g}", f"{entry['recovered']}/{entry['n']}", f"{entry['rate']:.2f}",
        f"[{low:.2f}, {high:.2f}]", f"{metrics['relative_norm']['mean']:.3f}", f"{metrics['leak']['max']:.1e}",
        f"{metrics['drift']['mean']:.3g}", f"{metrics['preactivation_drift']['mean']:.2e}",
        f"{metrics['decoder_share']['mean']:.2f}",
    ]  # fmt: skip


def _legend(run: dict[str, Any]) -> Text:
    audit, attack = run["config"]["audit"], run["config"]["attack"]
    unit = "share of ||h_def||" if attack["budget_unit"] == "relative" else "absolute norm"
    return Text(
        f"Budget: {unit}. Intervals: Wilson {audit['confidence']:.0%}, for samples clustered by source. Leak: "
        "||A'd|| / (||A|| ||d||), A the defended encoder columns. Drift: defended activations, mean over samples.",
        style="dim",
    )
