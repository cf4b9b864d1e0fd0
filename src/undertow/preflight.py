"""Preflight: do this model and this SAE belong together, and is the machinery exact on them?

1. quality on held-out text (`saes.quality`), against the SAE's card where there is one;
2. pairing: no other use of the same weights (a site next to it, another scale, centring) explains more (`saes.pairing`);
3. clamp readback: a `set` clamp through the hook against the slow form `D(clamp(z)) + (h - D(z))`, and how much of the
   requested change an encoder reads back from the clamped stream;
4. gradient of the clamped stream against central differences, in the direction in which a detached error term would show
   (P13);
5. the suffix pass against the full pass, padding, and logits (`models.exactness`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undertow.cache import write_atomically
from undertow.config import ModelConfig, SAEConfig
from undertow.defences.clamp import Clamp
from undertow.errors import UndertowError
from undertow.models.batch import Batch, Where
from undertow.models.exactness import LIMITS, exactness, relative_error
from undertow.models.language_model import LanguageModel
from undertow.models.load import check_model_name, load_model
from undertow.models.residual import Recorder, run
from undertow.models.suffix import SuffixPass
from undertow.saes.load import fitted, packaged_saes, read_sae
from undertow.saes.pairing import MARGIN, alternatives, estimate_input_scale
from undertow.saes.quality import Quality, measure_quality, text_batches
from undertow.saes.sae import SAE
from undertow.setting import MIN_VARIANCE, model_options
from undertow.texts import CORPUS, corpus_texts, texts_from_file

# A pair is refused when it explains this much less variance than its card says, or, without a card, less than MIN_VARIANCE.
CARD_SLACK = 0.10
# Tokens on which other uses of the SAE are compared.
PAIRING_TOKENS = 4000


@dataclass(frozen=True)
class Check:
    """One measured figure.

    Attributes:
        name: what was measured.
        value: the figure.
        limit: what it was held against, in words; empty where it is for information.
        passed: whether it is within the limit.
    """

    name: str
    value: float
    limit: str = ""
    passed: bool = True


@dataclass(frozen=True)
class Report:
    """The preflight of one pair."""

    model: str
    sae: str
    site: str
    quality: Quality
    checks: list[Check]

    def complaints(self) -> list[str]:
        """One phrase for each check that failed."""
        return [
            f"{self.sae} on {self.model}: {check.name} is {check.value:.3g}, must be {check.limit}"
            for check in self.checks
            if not check.passed
        ]

    def as_dict(self) -> dict[str, Any]:
        """The report as data."""
        return {
            "model": self.model, "sae": self.sae, "site": self.site, "checks": [asdict(c) for c in self.checks],
            "quality": {**asdict(self.quality), "loss_recovered": self.quality.loss_recovered},
        }  # fmt: skip

    def table(self) -> Any:
        """The report as a rich table."""
        from rich.table import Table

        table = Table(title=f"{self.sae} on {self.model}", title_justify="left")
        for heading, justify in (("check", "left"), ("value", "right"), ("limit", "left"), ("", "left")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for check in self.checks:
            verdict = ("ok" if check.passed else "FAILED") if check.limit else ""
            table.add_row(check.name, f"{check.value:.4g}", check.limit, verdict)
        return table


def check_pairs(
    model_config: ModelConfig,
    sae_config: SAEConfig,
    *,
    text: Path | None,
    tokens: int,
    everything: bool,
    write_card: bool,
    threads: int | None,
    announce: Callable[[Report], None],
) -> list[Report]:
    """Preflight of one SAE of a model, or with `everything` of all that are packaged for it.

    With `write_card`, the figures of every pair that passes are stored in its `card.json`.

    Raises:
        UndertowError: model, SAE or text cannot be read, or their widths or sites do not fit.
    """
    if threads:
        torch.set_num_threads(threads)
    own = model_config.name
    check_model_name(own, model_config.revision)
    names = [name for name in packaged_saes() if name.split("/")[0] == own] if everything else [sae_config.name]
    if everything and (sae_config.site or sae_config.name):
        raise UndertowError("--all is for every packaged SAE at its own site.", "Leave --sae and --site out.")
    if not names:
        raise UndertowError(f"no SAE is packaged for model {own!r}.", "Name one with --sae instead of --all.")
    saes = [read_sae(name, own, **sae_config.options()) for name in names]
    texts = texts_from_file(text) if text else corpus_texts("held_out")
    model = load_model(**model_options(model_config, saes[0]))
    reports = []
    for sae in saes:
        report = check_pair(model, fitted(sae, model), texts, tokens)
        announce(report)
        if write_card and not report.complaints():
            _write_card(sae, report.quality, str(text) if text else f"{CORPUS.project} {CORPUS.version}, held out")
        reports.append(report)
    return reports


def check_pair(model: LanguageModel, sae: SAE, texts: list[str], tokens: int) -> Report:
    """All checks of a pair. An SAE whose input scale is not known is measured at an estimate, which is the first check."""
    checks = []
    batches = list(text_batches(model, texts, PAIRING_TOKENS))
    if sae.scale_unknown:
        scale = estimate_input_scale(model, sae, batches)
        checks.append(Check("input scale (estimated; give it with --input-scale)", scale))
        sae = sae.rescaled(scale)
    quality = measure_quality(model, sae, texts, tokens)
    checks += _quality_checks(quality, sae)
    checks += _pairing_checks(model, sae, batches)
    # Two prompts of different length, so that padding is exercised too.
    pieces = [ids[:length] for ids, length in zip(model.encode(texts[:2]), (24, 17), strict=False)]
    batch = Batch.of(pieces, model.special_ids, model.device)
    checks += [*_clamp_checks(model, sae, batch), *_exactness_checks(model, sae, batch)]
    return Report(model.name, sae.name, str(sae.site), quality, checks)


def _quality_checks(quality: Quality, sae: SAE) -> list[Check]:
    card = sae.card.get("held_out", {})
    least = max(MIN_VARIANCE, card["explained_variance"] - CARD_SLACK) if card else MIN_VARIANCE
    variance = quality.explained_variance
    return [
        Check("held-out tokens", quality.tokens),
        Check("ordinary positions", quality.ordinary_share),
        Check("explained variance", variance, f">= {least:.2f}" + (" (card)" if card else ""), variance >= least),
        Check("loss recovered", quality.loss_recovered),
        Check("loss: clean", quality.loss_clean),
        Check("loss: reconstructed", quality.loss_reconstructed),
        Check("loss: zeroed", quality.loss_zeroed),
        Check("L0", quality.l0),
        Check(f"latents never active, of {sae.d_sae}", quality.dead_features),
    ]


def _pairing_checks(model: LanguageModel, sae: SAE, batches: list[Batch]) -> list[Check]:
    stated, others = alternatives(model, sae, batches)
    most = stated + MARGIN
    return [Check(f"the same {use}", value, f"<= {most:.3f}", value <= most) for use, value in others.items()]


def _clamp_checks(model: LanguageModel, sae: SAE, batch: Batch) -> list[Check]:
    """Set the strongest latents to their largest value by a hook, and look at the stream that comes out of it."""
    stream = SuffixPass(model, batch, sae.site, first_offset=None).entering.float()
    where = Where.slice(batch, 0, batch.width, batch.width).to(stream.device)
    ordinary = batch.mask.to(stream.device) & sae.ordinary(stream)
    latents = sae.encode(stream)
    strongest = (latents * ordinary[..., None]).sum((0, 1)).topk(min(8, sae.d_sae)).indices
    features = sae.features(strongest.tolist())
    value = float(latents[ordinary][:, strongest].max())
    clamp = Clamp(features, "set", value, skip_special=False)
    after = Recorder(sae.site)
    with torch.no_grad():
        run(model, batch, [clamp.edit(), after.edit])
    scope = clamp.scope(stream, where)
    entering, clamped = stream[scope], after.states.float()[scope]

    latents = sae.encode(entering)
    wanted = latents.clone()
    wanted[:, strongest] = value
    slow = sae.decode(wanted, entering) + (entering - sae.decode(latents, entering))
    readback = relative_error(clamped, slow)
    asked = value - latents[:, strongest]
    seen = features.read(clamped).pre - features.read(entering).pre
    share = float((seen * asked).sum() / asked.square().sum())
    limit = 1e-4 if model.dtype == torch.float32 else 0.05
    return [
        Check("clamp: hook against D(clamp(z)) + error", readback, f"<= {limit:g}", readback <= limit),
        Check("clamp: share of the change read back", share, "0.5 to 1.5", 0.5 <= share <= 1.5),
        _gradient_check(clamp, stream, where),
    ]


def _gradient_check(clamp: Clamp, stream: Tensor, where: Where) -> Check:
    """Directional derivative of `<w, clamp(h)>` against central differences, `w` and the direction random.

    Positions at which a defended latent switches on or off between the two points are left out: a JumpReLU jumps there.
    """
    generator = torch.Generator().manual_seed(0)
    weight, direction = (torch.randn(stream.shape, generator=generator).to(stream.device) for _ in range(2))
    step = 1e-3 * float(stream.norm(dim=-1).median() / direction.norm(dim=-1).mean())
    points = [stream + sign * step * direction for sign in (1, -1)]
    patterns = [clamp.features.read(point).post > 0 for point in points]
    weight = weight * ((patterns[0] == patterns[1]).all(-1) & clamp.scope(stream, where))[..., None]
    leaf = stream.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((clamp.apply(leaf, where) * weight).sum(), leaf)
    analytic = float((gradient.double() * direction).sum())
    up, down = (clamp.apply(point, where).double() for point in points)
    numeric = float(((up - down) * weight).sum() / (2 * step))
    error = abs(analytic - numeric) / max(abs(analytic), abs(numeric))
    return Check("clamp: gradient against finite differences", error, "<= 1e-2", error <= 1e-2)


def _exactness_checks(model: LanguageModel, sae: SAE, batch: Batch) -> list[Check]:
    limit = LIMITS[model.dtype]
    errors = exactness(model, batch, sae.site)
    return [Check(name, error, f"<= {limit:g}", error <= limit) for name, error in errors.items()]


def _write_card(sae: SAE, quality: Quality, text: str) -> None:
    if sae.source["format"] != "saelens":
        raise UndertowError(f"{sae.name} is in a format that has no card.", "Leave --write-card out.")
    path = Path(sae.source["folder"]) / "card.json"
    held_out = {
        "text": text, "tokens": quality.tokens, "explained_variance": round(quality.explained_variance, 4),
        "loss_recovered": round(quality.loss_recovered, 4), "l0": round(quality.l0, 2),
        "dead_features": quality.dead_features, "ordinary_share": round(quality.ordinary_share, 5),
        "loss_clean": round(quality.loss_clean, 4), "loss_reconstructed": round(quality.loss_reconstructed, 4),
        "loss_zeroed": round(quality.loss_zeroed, 4),
    }  # fmt: skip
    card = {**sae.card, "held_out": held_out, "weights_sha256": sae.source["sha256"]}
    try:
        write_atomically(path, json.dumps(card, indent=2) + "\n")
    except OSError as error:
        raise UndertowError(f"{path} cannot be written ({error.strerror}).", "Copy the SAE to a folder of yours.") from error
