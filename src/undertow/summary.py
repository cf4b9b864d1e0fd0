"""From rows to figures: per arm and budget the rate, its interval, and mean, interval and maximum of every metric."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from undertow.config import AuditConfig
from undertow.stats import mean_interval, rate_interval

Rows = list[dict[str, Any]]
Table = dict[str, dict[str, Any]]

# Name of a metric here, and its column in the rows. The score of the recovered model is called "recovered" in the rows,
# where "recovered" is a count here.
METRICS = {"score": "recovered"} | {
    name: name
    for name in (
        "relative_norm", "delta_norm", "leak", "drift", "relative_drift", "preactivation_drift",
        "relative_preactivation_drift", "decode_drift", "floor_violation", "decoder_share", "reactivated", "eligible",
        "margin", "steps",
    )
}  # fmt: skip


def summarise(rows: Rows, settings: AuditConfig, seed: int) -> Table:
    """Figures of all arms, controls included: `table[arm][budget]`, arms in the order of the rows."""
    groups: dict[tuple[str, float], Rows] = defaultdict(list)
    for row in rows:
        groups[row["arm"], row["budget"]].append(row)
    table: Table = {}
    for (arm, budget), group in groups.items():
        table.setdefault(arm, {})[f"{budget:g}"] = {"budget": budget, **_entry(group, settings, seed)}
    return table


def by_budget(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """An arm's figures, smallest budget first."""
    return sorted(entries.values(), key=lambda entry: entry["budget"])


def _entry(group: Rows, settings: AuditConfig, seed: int) -> dict[str, Any]:
    hits, clusters = [row["holds"] for row in group], [row["cluster"] for row in group]
    scores = [math.nan if row["recovered"] is None else row["recovered"] for row in group]
    n = len(group)
    return {
        "n": n, "recovered": sum(hits), "rate": sum(hits) / n,
        "interval": rate_interval(hits, clusters, settings.confidence, scores),
        "interval_unclustered": rate_interval(hits, [row["sample"] for row in group], settings.confidence),
        "clusters": len(set(clusters)), "failed": sum(row["status"] == "solver_failed" for row in group),
        "zero_reactivation": sum(row["holds"] and not row["reactivated"] for row in group) / n,
        "metrics": {
            name: _figure([(float(row[column]), row["cluster"]) for row in group if row[column] is not None], settings, seed)
            for name, column in METRICS.items()
        },
    }  # fmt: skip


def _figure(known: list[tuple[float, str]], settings: AuditConfig, seed: int) -> dict[str, Any] | None:
    """Mean, bootstrap interval and largest value of a metric; `None` where no sample has it."""
    if not known:
        return None
    values, members = zip(*known, strict=True)
    interval = mean_interval(values, members, settings.confidence, settings.resamples, seed)
    return {"mean": math.fsum(values) / len(values), "interval": interval, "max": max(values), "n": len(values)}
