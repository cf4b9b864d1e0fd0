"""Shared fixtures: tiny random models, and the packaged one for tests marked `real`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Shapes in annotations are checked in every call that a test makes.
_hook = install_import_hook("undertow", "typechecker.check")
_hook.__enter__()

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.saes.activations import JumpReLU
from undertow.saes.sae import SAE
from undertow.sites import Site

torch.set_num_threads(1)

D, LAYERS, VOCAB = 32, 4, 64


def tiny_llama(seed: int = 0, layers: int = LAYERS, d: int = D, vocab: int = VOCAB) -> LanguageModel:
    """A random Llama with large weights, so that every layer matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LanguageModel.wrap(LlamaForCausalLM(config), name="tiny")


def tiny_gpt2(seed: int = 0) -> LanguageModel:
    """A random GPT-2: learned positions, biases, another layout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=128, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return LanguageModel.wrap(GPT2LMHeadModel(config), name="tiny-gpt2")


def tiny_sae(seed: int = 0, site: Site | None = None, d: int = D, latents: int = 96, scale: float = 1.0) -> SAE:
    """A random JumpReLU SAE whose encoder and decoder are not each other's transpose."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, d, generator=generator), dim=-1)
    encoder = decoder.T + 0.1 * torch.randn(d, latents, generator=generator)
    return SAE(
        "tiny", site or Site.post(1), scale * encoder, 0.1 * torch.randn(latents, generator=generator), decoder / scale,
        0.1 * torch.randn(d, generator=generator), JumpReLU(torch.full((latents,), 0.2)),
    )  # fmt: skip


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 7), vocab: int = VOCAB) -> Batch:
    """Random prompts of different length."""
    generator = torch.Generator().manual_seed(seed)
    return Batch.of([torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths], set())


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny(request) -> LanguageModel:
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]()


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The packaged model; fetched and dequantised on first use."""
    from undertow.models.load import load_model

    torch.set_num_threads(2)
    return load_model("smollm2")
