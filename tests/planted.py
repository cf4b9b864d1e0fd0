"""Models whose answer is known: every route by which the behaviour can come back is put there by hand.

A Llama whose blocks write nothing carries the embedding of the last token to the unembedding. The behaviour's score is the
final (RMS-normed) stream times a read-out direction, so which perturbations bring it back is a matter of geometry:

- `one_route`: the read-out is the clamped feature's own direction. Forbidding that direction forbids recovery.
- `error_route`: the read-out also has a part that no latent reads or writes: a second route, through the SAE's error.
- `undo_route`: the feature reads along `u` but writes partly along `w`, which is what the behaviour reads. Encoder
  orthogonality leaves `w` free; encoder-and-decoder orthogonality does not (P5).
"""

from dataclasses import dataclass

import torch
from conftest import random_batch
from transformers import LlamaConfig, LlamaForCausalLM

from undertow.behaviours.logit_difference import LogitDifference
from undertow.config import RunConfig
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.runlog import RunLog
from undertow.saes.activations import ReLU
from undertow.saes.sae import SAE
from undertow.setting import assemble
from undertow.sites import Site
from undertow.tasks.base import Split, TaskData
from undertow.tasks.ioi import IOIData

D, VOCAB, FIRST_CONTENT = 24, 80, 40


@dataclass(frozen=True)
class Plant:
    """Directions of a planted case: what the feature reads, what it writes, what the behaviour reads."""

    encoder: torch.Tensor
    decoder: torch.Tensor
    readout: torch.Tensor
    content: torch.Tensor


def _axes(seed: int) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))
    return basis


def one_route(seed: int) -> Plant:
    u = _axes(seed)[0]
    return Plant(u, u, u, u)


def error_route(seed: int) -> Plant:
    u, v = _axes(seed)[:2]
    return Plant(u, u, u + v, u)


def undo_route(seed: int) -> Plant:
    u, w = _axes(seed)[:2]
    return Plant(u, u + w, w, u + w)


def planted_model(plant: Plant, seed: int) -> LanguageModel:
    """Blocks that write nothing; content tokens carry `plant.content` and noise off all planted directions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    spanned = torch.linalg.qr(torch.stack([plant.encoder, plant.decoder, plant.readout]).T)[0]
    noise = torch.randn(VOCAB, D)
    noise -= (noise @ spanned) @ spanned.T
    with torch.no_grad():
        for block in network.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        strength = 1.5 + torch.rand(VOCAB, 1)
        network.model.embed_tokens.weight.copy_(noise + strength * plant.content)
        network.lm_head.weight.zero_()
        network.lm_head.weight[1], network.lm_head.weight[2] = plant.readout, -plant.readout
    return LanguageModel.wrap(network, name="planted")


def planted_sae(plant: Plant) -> SAE:
    """One planted latent, and unrelated ones that read nothing."""
    encoder, decoder = torch.zeros(D, 4), torch.zeros(4, D)
    encoder[:, 0], decoder[0] = plant.encoder, plant.decoder
    return SAE("planted", Site.post(0), encoder, torch.zeros(4), decoder, torch.zeros(D), ReLU())


def planted_data(seed: int, samples: int = 24) -> TaskData:
    def split(name: str, offset: int) -> Split:
        lengths = tuple(3 + i % 4 for i in range(samples))
        batch: Batch = random_batch(seed + offset, lengths, VOCAB)
        wanted, other = torch.full((samples,), 1), torch.full((samples,), 2)
        return Split(
            [f"{name}-{i}" for i in range(samples)], [f"c{i % 8}" for i in range(samples)], batch,
            LogitDifference(wanted, other),
        )  # fmt: skip

    return TaskData(split("selection", 0), split("evaluation", 1000))


def planted_config(seed: int = 0, **fields: dict) -> RunConfig:
    raw = {
        "task": "ioi", "seed": seed, "data": {}, "features": {"method": "given", "indices": (0,)},
        # Just below zero, so that a flip does not hang on the sign of a rounding error.
        "clamp": {"rule": "set", "value": -0.5},
        "attack": {"budgets": (0.25, 1.0), "steps": 20, "published_steps": 40, "published_learning_rate": 0.1},
        "audit": {"batch_size": 24, "resamples": 100}, "threads": 1,
    }  # fmt: skip
    for section, values in fields.items():
        raw[section] = {**raw[section], **values}
    return RunConfig[IOIData].model_validate(raw)


def planted_setting(plant: Plant, seed: int = 0, **fields: dict):
    return assemble(planted_config(seed, **fields), planted_model(plant, seed), planted_sae(plant), planted_data(seed))


def planted_audit(plant: Plant, folder, seed: int = 0, **fields: dict) -> RunLog:
    from undertow.audit import audit

    setting = planted_setting(plant, seed, **fields)
    log = RunLog(folder, {"command": "test", "config": setting.config.model_dump(mode="json")})
    return audit(setting, log)
