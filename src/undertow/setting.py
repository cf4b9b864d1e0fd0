"""What an audit is about, loaded and checked: model, SAE, data, chosen features, clamp, and its valid flips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.attacks.base import ARMS
from undertow.config import ModelConfig, RunConfig
from undertow.defences.clamp import Clamp, Clamps
from undertow.errors import UndertowError
from undertow.features.attribution import Selection, select_by_attribution
from undertow.models.exactness import LIMITS, exactness
from undertow.models.language_model import LanguageModel
from undertow.models.load import check_model_name, load_model, model_fingerprint
from undertow.models.perturbation import Slot
from undertow.saes.load import check_sae_name, fitted, read_sae, sae_fingerprint
from undertow.saes.neuronpedia import feature_url, parse_address
from undertow.saes.pairing import alternatives, better_uses
from undertow.saes.sae import SAE
from undertow.tasks.base import TASKS, TaskData

# An SAE that explains less of the variance on the task's own prompts does not belong to the model and site.
MIN_VARIANCE = 0.30


@dataclass(frozen=True, eq=False)
class Setting:
    """Everything an audit needs, loaded and checked."""

    config: RunConfig
    model: LanguageModel
    sae: SAE
    data: TaskData
    selection: Selection
    defence: Clamps
    slots: tuple[Slot, ...]
    explained_variance: float | None = None


def check_names(config: RunConfig) -> None:
    """Refuse names that cannot be right before anything heavy is loaded.

    Raises:
        UndertowError: an unknown arm, model or SAE.
    """
    for arm in config.attack.arms:
        ARMS.get(arm)
    check_model_name(config.model.name, config.model.revision)
    check_sae_name(config.sae.name, config.model.name)


def fingerprints(config: RunConfig) -> dict[str, str]:
    """What tells the model and the SAE of a run from others under the same names, without loading them.

    Raises:
        UndertowError: one of them is not there.
    """
    return {
        "model": model_fingerprint(config.model.name, config.model.revision),
        "sae": sae_fingerprint(config.sae.name, config.model.name, config.sae.revision),
    }


def prepare(config: RunConfig) -> Setting:
    """Load model and SAE, build the data, choose the features, make the clamp.

    Raises:
        UndertowError: anything in the configuration that does not fit together.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    # What can be wrong with the SAE is found before the model, which takes longer, is loaded.
    sae = read_sae(config.sae.name, config.model.name, **config.sae.options())
    _check_features(config, sae)
    if sae.scale_unknown:
        raise UndertowError(
            f"SAE {sae.name} was trained on a stream scaled by a constant that its files do not give "
            "(expected_average_only_in).",
            "Give it with --input-scale; `undertow check` estimates it.",
        )
    model = load_model(**model_options(config.model, sae))
    sae = fitted(sae, model)
    data = TASKS.get(config.task).build(model, config.data, config.seed)
    setting = assemble(config, model, sae, data)
    _check_exact(setting)
    return _belonging_together(setting)


def model_options(config: ModelConfig, sae: SAE) -> dict[str, Any]:
    """What `load_model` takes, with a BOS in front of texts where the SAE was trained so and the user says nothing."""
    options = config.model_dump()
    if options["prepend_bos"] is None:
        options["prepend_bos"] = bool(sae.prepend_bos)
    return options


def _check_features(config: RunConfig, sae: SAE) -> None:
    if config.features.method == "given":
        sae.features(config.features.indices)
    source = config.features.neuronpedia
    if not source:
        return
    address = parse_address(feature_url(source, 0))
    if any(f"-{other}-" in f"{address.source}-" for other in ("att", "mlp", "transcoder")):
        raise UndertowError(f"{source} on Neuronpedia is not of the residual stream.", "Give features of an SAE that is.")
    layer = address.layer
    # The boundary after a block is the one before the next, and sources are numbered by either.
    if layer not in (sae.site.boundary, sae.site.boundary - 1) or sae.neuronpedia not in (None, source):
        raise UndertowError(
            f"the features are of {source} on Neuronpedia, the SAE is {sae.neuronpedia or sae.name} at {sae.site}.",
            "Give the SAE that the features belong to with --sae.",
        )


def _check_exact(setting: Setting) -> None:
    """Refuse a model on which the fast path computes something else than the model itself, before it is searched with."""
    batch, _ = setting.data.selection.rows(list(range(min(3, setting.data.selection.batch.size))))
    limit = LIMITS[setting.model.dtype]
    for name, error in exactness(setting.model, batch, setting.sae.site).items():
        if not error <= limit:
            raise UndertowError(
                f"undertow is not exact on {setting.model.name} ({type(setting.model.network).__name__}): {name}, relative "
                f"error {error:.1e}, more than {limit:g}.",
                "It needs a causal attention-only decoder; `undertow list families` names those that are proven.",
            )


def _belonging_together(setting: Setting) -> Setting:
    """The setting with the SAE's explained variance on the selection prompts; refused where they do not belong together."""
    batches = [batch for batch, _ in setting.data.selection.pieces(setting.config.audit.batch_size)]
    explained, others = alternatives(setting.model, setting.sae, batches)
    where = f"of the variance of {setting.model.name} at {setting.sae.site} on the task's prompts"
    if not explained >= MIN_VARIANCE:
        raise UndertowError(
            f"SAE {setting.sae.name} explains {explained:.2f} {where}, less than {MIN_VARIANCE}.",
            "It was trained on another model, site or scaling; `undertow check` measures more.",
        )
    better = better_uses(explained, others)
    if better and not setting.config.sae.accept_pairing:
        use, value = max(better.items(), key=lambda item: item[1])
        raise UndertowError(
            f"SAE {setting.sae.name} explains {explained:.2f} {where}, but {value:.2f} {use}.",
            "Mend its site or scaling (`undertow check` measures more), or go on with --accept-pairing.",
        )
    return replace(setting, explained_variance=explained)


def assemble(config: RunConfig, model: LanguageModel, sae: SAE, data: TaskData) -> Setting:
    """Choose the features and make the clamp, for a model, an SAE and data that are already there."""
    if config.features.method == "given":
        selection = Selection(list(config.features.indices), [])
    else:
        batches = list(data.selection.pieces(config.audit.batch_size))
        selection = select_by_attribution(model, batches, sae, config.features.count, config.features.positions)
    clamp = Clamp(
        sae.features(selection.indices), config.clamp.rule, config.clamp.value, config.clamp.keep_error,
        config.clamp.positions, config.clamp.skip_special,
    )  # fmt: skip
    slots = tuple(Slot(sae.site, offset) for offset in config.attack.offsets)
    shortest = int(data.evaluation.batch.mask.sum(-1).min())
    if -min(config.attack.offsets) > shortest:
        raise UndertowError(
            f"attack.offsets: {min(config.attack.offsets)} lies before the start of a prompt of {shortest} tokens.",
            "Use offsets within every prompt.",
        )
    return Setting(config, model, sae, data, selection, Clamps((clamp,)), slots)


@dataclass(frozen=True, eq=False)
class Flips:
    """Base and defended scores of all evaluation prompts, and which of them are valid flips."""

    base: Float[Tensor, " sample"]
    defended: Float[Tensor, " sample"]
    valid: list[int]
    base_holds: int


def find_flips(setting: Setting) -> Flips:
    """`V = {x : the behaviour holds on the base model and not on the defended one}` (method.md section 1)."""
    split, edits = setting.data.evaluation, setting.defence.edits()
    scores: dict[str, list[Tensor]] = {"base": [], "defended": []}
    for batch, behaviour in split.pieces(setting.config.audit.batch_size):
        scores["base"].append(behaviour.measure(setting.model, batch, []))
        scores["defended"].append(behaviour.measure(setting.model, batch, edits))
    base, defended = torch.cat(scores["base"]).float(), torch.cat(scores["defended"]).float()
    held = split.behaviour.holds(base)
    valid = held & ~split.behaviour.holds(defended)
    return Flips(base, defended, valid.nonzero().flatten().tolist(), int(held.sum()))
