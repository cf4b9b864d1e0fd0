"""The tables of a run, or of several side by side, from their files alone."""

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
    table.add_row("model", run["model"]["name"])
    sae = run["sae"]
    table.add_row("SAE", f"{sae['name']} at {sae['site']}, {sae['latents']} latents")
    if sae["explained_variance_on_prompts"] is not None:
        table.add_row("", f"explains {sae['explained_variance_on_prompts']:.2f} of the variance on the selection prompts")
    table.add_row(
        "clamp",
        f"{_clamp(clamp)} on {len(clamp['features'])} features, positions {clamp['positions']}, "
        f"error {'kept' if clamp['keep_error'] else 'dropped'}",
    )
    for url in clamp.get("neuronpedia", []):
        table.add_row("feature", url)
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
    for arm, entries in _shown_arms(run).items():
        ordered = sorted(entries.values(), key=lambda entry: entry["budget"])
        for index, entry in enumerate(ordered):
            cells = [cell(entry) for _, cell in columns]
            table.add_row("" if index else arm, *cells, end_section=index == len(ordered) - 1)
    return table


def _shown_arms(run: dict[str, Any]) -> dict[str, Any]:
    """Arms and controls; the random controls of arms other than the reference say the same as its own and stay in run.json."""
    return {arm: entries for arm, entries in {**run["arms"], **run["controls"]}.items() if ":random:" not in arm}


def _legend(run: dict[str, Any]) -> Text:
    audit, attack = run["config"]["audit"], run["config"]["attack"]
    unit = "share of ||h_def||" if attack["budget_unit"] == "relative" else "absolute norm"
    return Text(
        f"Budget: {unit}. Intervals: Wilson {audit['confidence']:.0%}, for samples clustered by source. Leak: "
        "||A'd|| / (||A|| ||d||), A the defended encoder columns. Drift: defended activations, mean over samples. Score: "
        "of the recovered model; above 0 the behaviour holds.",
        style="dim",
    )


def comparison(runs: list[dict[str, Any]]) -> Group:
    """Several complete runs side by side: what was audited, recovery by arm and budget, verdicts.

    Args:
        runs: contents of their `run.json`, all of one task.
    """
    headings = _headings(runs)
    facts = Table(title="Runs side by side", title_justify="left")
    table = Table(title="Recovered, by arm and budget", title_justify="left")
    for one, labels in ((facts, ("",)), (table, ("arm", "budget"))):
        for label in labels:
            one.add_column(label, no_wrap=True)
        for heading in headings:
            one.add_column(heading, justify="right")
    for label, cell in FACTS:
        facts.add_row(label, *(cell(run) for run in runs))
    shown = [_shown_arms(run) for run in runs]
    for arm in dict.fromkeys(arm for arms in shown for arm in arms):
        budgets = sorted({(entry["budget"], key) for arms in shown for key, entry in arms.get(arm, {}).items()})
        for index, (_, key) in enumerate(budgets):
            cells = [_recovery(arms.get(arm, {}).get(key)) for arms in shown]
            table.add_row("" if index else arm, key, *cells, end_section=index == len(budgets) - 1)
    legend = Text(
        "Intervals: Wilson, for samples clustered by source. `undertow show RUN` has drift, leak and norms.", style="dim"
    )
    sentences = [Text(f"{heading}: {run['verdict']['sentence']}") for heading, run in zip(headings, runs, strict=True)]
    notes = [
        Text(f"{heading}, warning: {warning}", style="yellow")
        for heading, run in zip(headings, runs, strict=True)
        for warning in run["warnings"]
    ]
    return Group(facts, table, legend, Text(), *sentences, *notes)


def _headings(runs: list[dict[str, Any]]) -> list[str]:
    """The models' names where they differ; else SAE sites; else run digests are all that tells the runs apart."""
    for heading in (lambda run: run["model"]["name"], lambda run: f"{run['model']['name']}, {run['sae']['name']}"):
        found = [heading(run) for run in runs]
        if len(set(found)) == len(found):
            return found
    return [f"{run['model']['name']} ({number})" for number, run in enumerate(runs, 1)]


def _recovery(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "{}/{} [{:.2f}, {:.2f}]".format(entry["recovered"], entry["n"], *entry["interval"])


def _two_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _clamp(clamp: dict[str, Any]) -> str:
    return clamp["rule"] if clamp["rule"] == "zero" else f"{clamp['rule']} {clamp['value']}"


# Rows of the comparison that say what was audited.
FACTS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("SAE site", lambda run: run["sae"]["site"]),
    ("latents", lambda run: str(run["sae"]["latents"])),
    ("explained variance, prompts", lambda run: _two_decimals(run["sae"]["explained_variance_on_prompts"])),
    ("features clamped", lambda run: str(len(run["clamp"][0]["features"]))),
    ("clamp", lambda run: _clamp(run["clamp"][0])),
    ("base model right", lambda run: f"{run['counts']['base_holds']}/{run['counts']['candidates']}"),
    ("mean score, base", lambda run: f"{run['means']['base']:.2f}"),
    ("mean score, clamped", lambda run: f"{run['means']['defended']:.2f}"),
    ("valid flips", lambda run: str(run["counts"]["valid_flips"])),
    ("order", lambda run: run["config"]["attack"]["order"]),
    ("budgets are", lambda run: run["config"]["attack"]["budget_unit"]),
    ("verdict", lambda run: run["verdict"]["label"]),
)
