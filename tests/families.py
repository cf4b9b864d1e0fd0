"""Tiny random models of every architecture that undertow claims, built from transformers' own configurations.

Weights are large, so that every layer matters; windows of sliding attention are shorter than the prompts, soft caps low enough
to bend, rotary bases of global and local layers different, and experts few enough that tokens go to different ones.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from undertow.models.language_model import LanguageModel

D, LAYERS, VOCAB, WINDOW = 32, 4, 64, 4

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

# model_type: configuration class, arguments.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {**_GROUPED, **_EXPERTS, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 16,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 16,
         "rope_parameters": {
             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
             "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
         }},
    ),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": WINDOW}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 2 * D, "word_embed_proj_dim": D, "init_std": 0.2}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": VOCAB, "hidden_size": D, "num_layers": LAYERS, "num_heads": 4, "window_size": WINDOW,
         "attention_types": [[["global", "local"], LAYERS // 2]], "max_position_embeddings": 128},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": D, "n_layer": LAYERS, "n_head": 4}),
    "falcon": ("FalconConfig", _COMMON),
}  # fmt: skip


def tiny_model(model_type: str, seed: int = 0, **facts: Any) -> LanguageModel:
    """A random model of an architecture."""
    torch.manual_seed(seed)
    name, arguments = CONFIGS[model_type]
    config = getattr(transformers, name)(**arguments)
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            # Norms start at one and biases at zero; nothing may be so special that a mistake would not show.
            parameter.add_((0.1 if parameter.ndim < 2 else 0.15) * torch.randn_like(parameter))
    return LanguageModel.wrap(network, name=model_type, **facts)
