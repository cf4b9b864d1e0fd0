"""The protocol of an audit.

1. Load the model and the SAE; build the task's prompts, split into selection and evaluation (P15).
2. Choose the features on the selection prompts; make the clamp.
3. Valid flips: evaluation prompts on which the behaviour holds on the base model and does not under the clamp.
4. For every arm and every batch of flips: attack over the budgets.
5. For every arm and budget, controls included: run the *defended model in full* with the stored perturbation, measure
   behaviour, movement of the defended features, leak and norms there, and write a row for each sample. The attack's own
   figures are not used.
6. Summarise with intervals, judge, finish the log.

Steps 4 and 5 are done in units (arm x batch of samples) that are recorded when complete; a run that was killed goes on at
the first unit that is not.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undertow import controls
from undertow.attacks.base import ARMS, Problem
from undertow.config import RunConfig
from undertow.controls import UNDO, ZERO, random_arm
from undertow.errors import UndertowError
from undertow.measurement import Measurement, measure
from undertow.metrics import feature_metrics, perturbation_metrics
from undertow.runlog import RunLog, environment, exclusive
from undertow.saes.neuronpedia import feature_url
from undertow.setting import Flips, Setting, check_names, find_flips, fingerprints, prepare
from undertow.solvers.base import Status
from undertow.summary import summarise
from undertow.tasks.base import TASKS
from undertow.verdict import judge, warnings

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """The default progress: none."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece of work that is recorded as a whole: an arm on a batch of samples; `of`: the arm it is a control
    for."""

    arm: str
    batch_number: int
    samples: list[int]
    budgets: tuple[float, ...]
    of: str | None = None

    @property
    def name(self) -> str:
        """Identifier within the run."""
        return f"{self.arm}.{self.batch_number:03d}"


def units_of(config: RunConfig, valid: list[int], reference: str) -> list[Unit]:
    """All units of a run, in their order: arms first, because the random controls take their norms."""
    size, budgets = config.audit.batch_size, config.attack.budgets
    batches = list(enumerate(valid[start : start + size] for start in range(0, len(valid), size)))
    searching = config.attack.arms
    kinds: list[tuple[str, tuple[float, ...], str | None]] = [(arm, budgets, None) for arm in searching]
    kinds += [(ZERO, (0.0,), None), (UNDO, budgets, reference)]
    kinds += [(random_arm(arm, reference), budgets, arm) for arm in searching]
    return [Unit(arm, number, samples, wanted, of) for arm, wanted, of in kinds for number, samples in batches]


class Auditor:
    """Runs the units of an audit and writes their rows."""

    def __init__(self, setting: Setting, flips: Flips, log: RunLog) -> None:
        self.setting, self.flips, self.log = setting, flips, log
        self._problems: dict[int, tuple[Problem, Measurement]] = {}
        attacks = {arm: ARMS.get(arm)(setting.config.attack) for arm in setting.config.attack.arms}
        self.attacks = attacks
        self.constraints = {arm: attack.constraint(setting.slots, setting.defence) for arm, attack in attacks.items()}
        self.reference = "encoder" if "encoder" in attacks else next(iter(attacks))
        for arm, constraint in self.constraints.items():
            if constraint.after_clamp_only and setting.config.attack.order == "delta-then-clamp":
                raise UndertowError(
                    f"arm {arm} with order delta-then-clamp: SAE {setting.sae.name} normalises its input, and what the clamp "
                    "reads and what it leaves behind cannot both be held.",
                    "Use --order clamp-then-delta, or the arms none and published-none.",
                )
            if constraint.forbids_everything:
                raise UndertowError(
                    f"arm {arm} with {len(setting.selection.indices)} features forbids every direction of a stream of width "
                    f"{setting.model.d_model}.",
                    "Clamp fewer features (--features), or leave that arm out (--arms).",
                )

    def problem(self, unit: Unit) -> tuple[Problem, Measurement]:
        """The samples of a unit as an attack problem, with their defended measurement; made once for each batch."""
        if unit.batch_number not in self._problems:
            self._problems[unit.batch_number] = self._problem(unit.samples)
        return self._problems[unit.batch_number]

    def _problem(self, samples: list[int]) -> tuple[Problem, Measurement]:
        setting = self.setting
        batch, behaviour = setting.data.evaluation.rows(samples)
        common = (setting.model, batch, behaviour)
        defended = measure(*common, setting.defence, setting.slots)
        base = measure(*common, setting.defence, setting.slots, active=False)
        problem = Problem(
            *common, setting.defence, setting.slots, setting.config.attack.order, target=base.values,
            stream=defended.at(setting.slots, batch.width), base_stream=base.at(setting.slots, batch.width),
        )  # fmt: skip
        return problem, defended

    def run(self, unit: Unit) -> None:
        """Attack (or make the control's perturbation), verify, record."""
        began = time.perf_counter()
        problem, defended = self.problem(unit)
        size = problem.stream.double().flatten(1).norm(dim=-1).float()
        relative = self.setting.config.attack.budget_unit == "relative"
        budgets = [budget * (size if relative else torch.ones_like(size)) for budget in unit.budgets]
        deltas, facts = self._perturbations(unit, problem, budgets)
        spent = (time.perf_counter() - began) / max(1, len(unit.samples) * len(budgets))
        rows, tensors = [], {}
        for budget, delta, fact in zip(unit.budgets, deltas, facts, strict=True):
            measured = self._verify(problem, defended, delta)
            for index, sample in enumerate(unit.samples):
                key = f"{unit.arm}/{budget:g}/{self.setting.data.evaluation.names[sample]}"
                tensors[key] = delta[index].cpu()
                rows.append(self._row(unit, sample, budget, index, measured, fact, key, spent))
        self.log.append(unit.name, rows, tensors)

    def _perturbations(self, unit: Unit, problem: Problem, budgets: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        nothing = {"steps": [0] * len(unit.samples), "failed": [False] * len(unit.samples)}
        if unit.arm in self.attacks:
            results = self.attacks[unit.arm](problem, budgets)
            failed = [[status is Status.FAILED for status in result.status] for result in results]
            facts = [{"steps": r.steps.tolist(), "failed": f} for r, f in zip(results, failed, strict=True)]
            return [result.delta for result in results], facts
        if unit.arm == ZERO:
            deltas = [controls.zero(problem)]
        elif unit.arm == UNDO:
            deltas = [controls.undo(problem, self.constraints[self.reference], budget) for budget in budgets]
        else:
            deltas = [self._random(unit, problem, budget) for budget in unit.budgets]
        return deltas, [nothing] * len(budgets)

    def _random(self, unit: Unit, problem: Problem, budget: float) -> Tensor:
        """Random directions in the subspace of the arm that is controlled, at the norms it used on the same samples."""
        assert unit.of is not None
        names = [self.setting.data.evaluation.names[sample] for sample in unit.samples]
        source = f"{unit.of}.{unit.batch_number:03d}"
        norms = [self.log.delta(source, f"{unit.of}/{budget:g}/{name}").double().norm() for name in names]
        seeds = [zlib.crc32(f"{self.setting.config.seed}/{name}/{budget:g}".encode()) for name in names]
        return controls.random_direction(
            self.constraints[unit.of], problem.stream, torch.stack(norms).to(problem.stream), seeds
        )

    def _verify(self, problem: Problem, defended: Measurement, delta: Tensor) -> dict[str, Tensor]:
        """The one path by which a result is measured: a full pass of the defended model with the stored perturbation."""
        recovered = measure(
            problem.model, problem.batch, problem.behaviour, problem.defence, problem.slots, delta=delta, order=problem.order
        )
        return {
            "recovered": recovered.values,
            "holds": problem.behaviour.holds(recovered.values),
            "silenced": (defended.firings - recovered.firings).clamp(min=0),
            **feature_metrics(defended.readings, recovered.readings),
            **perturbation_metrics(delta, problem.stream, problem.slots, problem.defence.defended),
        }

    def _row(
        self, unit: Unit, sample: int, budget: float, index: int, measured: dict[str, Tensor], fact: dict[str, Any],
        key: str, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        split = self.setting.data.evaluation
        figures = {name: _number(tensor[index]) for name, tensor in measured.items() if name != "holds"}
        holds = bool(measured["holds"][index])
        status = "recovered" if holds else "solver_failed" if fact["failed"][index] else "held"
        return {
            "sample": split.names[sample], "cluster": split.clusters[sample], "arm": unit.arm, "budget": budget,
            "status": status, "base": _number(self.flips.base[sample]),
            "defended": _number(self.flips.defended[sample]), "holds": holds, **figures,
            "reactivated": int(measured["reactivated"][index]), "eligible": int(measured["eligible"][index]),
            "silenced": int(measured["silenced"][index]), "steps": fact["steps"][index], "seconds": round(seconds, 4),
            "delta": key,
        }  # fmt: skip


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def run_audit(config: RunConfig, folder: Path, progress: Progress = _silent) -> RunLog:
    """A whole audit, resumed when the folder holds part of it.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        progress: called with a description, the units done and their number.

    Raises:
        UndertowError: bad configuration, an unwritable folder, or no valid flip at all.
    """
    began = time.perf_counter()
    check_names(config)
    header = {"config": config.model_dump(mode="json"), "task": config.task, "inputs": fingerprints(config)}
    with exclusive(folder):
        log = RunLog(folder, {**environment(), **header})
        if log.finished:
            return log
        progress("loading model and SAE", 0, 1)
        try:
            return audit(prepare(config), log, progress, began)
        except UndertowError:
            log.abandon()
            raise


def audit(setting: Setting, log: RunLog, progress: Progress = _silent, began: float | None = None) -> RunLog:
    """The audit of a prepared setting; see the module's docstring."""
    began = time.perf_counter() if began is None else began
    config = setting.config
    progress("finding valid flips", 0, 1)
    flips = find_flips(setting)
    if not flips.valid:
        raise UndertowError(
            f"no valid flip: the behaviour holds on {flips.base_holds} of {len(flips.base)} prompts and the clamp "
            "removes it from none.",
            "Clamp more features (--features), another value (--value), or ask for more prompts (--prompts).",
        )
    auditor = Auditor(setting, flips, log)
    units = units_of(config, flips.valid, auditor.reference)
    names = setting.data.evaluation.names
    expected = {u.name: {(names[s], u.arm, b) for s in u.samples for b in u.budgets} for u in units}
    finished = log.keep_complete(expected)
    for done, unit in enumerate(units):
        progress(f"{unit.arm}, batch {unit.batch_number + 1}", done, len(units))
        if unit.name not in finished:
            auditor.run(unit)
    progress("done", len(units), len(units))
    log.finish(_results(setting, flips, log, auditor.reference, time.perf_counter() - began), _slots(setting))
    return log


def _slots(setting: Setting) -> list[dict[str, Any]]:
    return [{"site": str(slot.site), "offset": slot.offset} for slot in setting.slots]


def _results(setting: Setting, flips: Flips, log: RunLog, reference: str, seconds: float) -> dict[str, Any]:
    config, rows = setting.config, log.rows()
    table = summarise(rows, config.audit, config.seed)
    context = {
        "valid_flips": len(flips.valid), "arms": list(config.attack.arms),
        "describes": TASKS.get(config.task).describes, "order": config.attack.order,
        "budget_unit": config.attack.budget_unit, "reference": reference,
    }  # fmt: skip
    clamp = setting.defence.describe()
    clamp[0]["scores"] = setting.selection.scores
    pages = config.features.neuronpedia or setting.sae.neuronpedia
    if pages:
        clamp[0]["neuronpedia"] = [feature_url(pages, index) for index in setting.selection.indices]
    return {
        "model": {"name": setting.model.name, "layers": setting.model.n_layers, "width": setting.model.d_model,
                  **setting.model.source},
        "sae": {"name": setting.sae.name, "site": str(setting.sae.site), "latents": setting.sae.d_sae,
                "norm_limit": setting.sae.norm_limit, "explained_variance_on_prompts": setting.explained_variance,
                **setting.sae.source},
        "clamp": clamp,
        "seeds": {"run": config.seed, "bootstrap": config.seed},
        "counts": {"candidates": len(flips.base), "base_holds": flips.base_holds, "valid_flips": len(flips.valid)},
        "means": {"base": float(flips.base.mean()), "defended": float(flips.defended.mean())},
        "arms": {arm: entries for arm, entries in table.items() if not arm.startswith("control:")},
        "controls": {arm: entries for arm, entries in table.items() if arm.startswith("control:")},
        "reference": reference,
        "verdict": judge(rows, table, context, config.audit, config.seed),
        "warnings": warnings(rows, context),
        "seconds": round(seconds, 1),
    }  # fmt: skip
