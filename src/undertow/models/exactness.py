"""Is the machinery exact on this architecture? Measured on a few prompts, wherever a model is used for the first time.

An architecture may keep state that the key-value cache does not hold (recurrent and convolutional layers), use positions in a
way that padding disturbs, look ahead, or scale its logits in a way of its own. None of this would raise an error; a search
on such a model would optimise another function than the model's. Relative errors of four equalities:

1. suffix pass and full pass, outputs (with the last column perturbed);
2. the same, gradients;
3. a left-padded sample and the sample alone;
4. logits of the whole vocabulary and the network's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import run
from undertow.models.suffix import SuffixPass
from undertow.sites import Site

# Largest relative error, by type of the weights.
LIMITS = {torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.05}


def exactness(model: LanguageModel, batch: Batch, site: Site) -> dict[str, float]:
    """The four relative errors by name, for prompts of at least four tokens."""
    slots = (Slot(site, -3), Slot(site, -1))
    suffix = SuffixPass(model, batch, site, first_offset=-3)
    size = float(suffix.entering.float().norm(dim=-1).median())
    generator = torch.Generator().manual_seed(1)
    delta = 0.1 * size * torch.randn((batch.size, 2, model.d_model), generator=generator) / model.d_model**0.5
    results = []
    for fast in (True, False):
        leaf = delta.to(model.device, model.dtype).requires_grad_()
        with torch.enable_grad():
            edits = perturbation_edits(slots, leaf)
            hidden = (suffix(after=edits) if fast else run(model, batch, edits))[:, -3:]
            weight = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view(hidden.shape)
            (gradient,) = torch.autograd.grad((hidden.float() * weight).sum(), leaf)
        results.append((hidden.detach(), gradient))
    output, gradient = (relative_error(fast, full) for fast, full in zip(*results, strict=True))
    with torch.no_grad():
        shortest = int(batch.mask.sum(-1).argmin())
        alone = batch.select([shortest]).trimmed()
        hidden = run(model, batch)
        lone = run(model, alone)
        padded = hidden[shortest : shortest + 1, -alone.width :]
        own = model.network(input_ids=alone.ids, attention_mask=alone.mask.long()).logits
        logits = model.all_logits(lone)
    return {
        "suffix pass against full pass: output": output,
        "suffix pass against full pass: gradient": gradient,
        "left-padded against alone": relative_error(padded, lone),
        "logits against the network's own": relative_error(logits, own),
    }


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """`||found - wanted|| / ||wanted||`, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
