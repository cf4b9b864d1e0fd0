"""A decoder from transformers, frozen, with the few views of it that undertow needs.

Any causal language model works whose decoder keeps its blocks in one `ModuleList`; the list is found by trying the
names in `LAYER_PATHS`, or under the name that the user gives. Nothing is copied or converted: the model's own code runs, so
masks, rotary embeddings, norms and soft-capping stay those of the architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from undertow.errors import UndertowError
from undertow.models.batch import Batch
from undertow.sites import Site

# Where architectures keep their blocks, relative to the causal language model.
LAYER_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)
# Architectures on which the suffix pass, padding, generation with a cache and site names are proven exact by the tests; others
# that keep the layout work too, and `undertow check` measures whether they do.
TESTED_FAMILIES = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral (mixture of experts)",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE (mixture of experts)",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi3": "Phi-3",
    "opt": "OPT",
    "olmo2": "OLMo 2",
    "gptj": "GPT-J",
    "gpt_neo": "GPT-Neo (TinyStories)",
    "bloom": "BLOOM",
    "falcon": "Falcon",
}


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model.

    Attributes:
        name: what the user called it.
        network: the transformers model, in eval mode, no parameter requiring a gradient.
        tokenizer: its tokenizer; `None` for models built in tests.
        layers_path: dotted name of the blocks' `ModuleList` inside `network`.
        prepend_bos: put a BOS before every text to which the tokenizer adds none.
        source: facts for the run log: resolved folder or hub id, revision, digest.
    """

    name: str
    network: Any
    tokenizer: Any
    layers_path: str
    prepend_bos: bool = False
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def wrap(
        cls, network: Any, tokenizer: Any = None, name: str = "model", *, layers_path: str | None = None, **facts: Any
    ) -> LanguageModel:
        """Freeze a transformers model and find its blocks.

        Args:
            network: the model.
            tokenizer: its tokenizer.
            name: what to call it.
            layers_path: dotted name of the `ModuleList` of blocks, for architectures that keep it at an unusual place.
            facts: further attributes.

        Raises:
            UndertowError: the blocks are at no known path, or not at the given one.
        """
        network.eval().requires_grad_(False)
        lists = {path for path, module in network.named_modules() if isinstance(module, nn.ModuleList)}
        found = [path for path in ((layers_path,) if layers_path else LAYER_PATHS) if path in lists]
        if not found:
            where = f"at {layers_path!r}" if layers_path else f"at any of {', '.join(LAYER_PATHS)}"
            raise UndertowError(
                f"{type(network).__name__} does not keep its decoder blocks {where}.",
                f"Give the dotted name with --layers-path; its module lists are: {', '.join(sorted(lists)) or 'none'}.",
            )
        return cls(name, network, tokenizer, found[0], **facts)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.network.get_submodule(self.layers_path)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that maps token ids to the final, normalised hidden state: the nearest one around the blocks that takes
        `input_ids`."""
        path = self.layers_path
        while path:
            path = path.rpartition(".")[0]
            module = self.network.get_submodule(path)
            if path and "input_ids" in inspect.signature(module.forward).parameters:
                return module
        raise UndertowError(
            f"no module around {self.layers_path} in {type(self.network).__name__} takes input_ids.",
            "undertow needs a decoder module below the language-model head, as transformers' models have.",
        )

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.network.config.get_text_config()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    def device_at(self, site: Site) -> torch.device:
        """Device on which the stream arrives at a site; differs between sites when layers are spread over devices."""
        if not site.boundary:
            return self.device
        block = self.layers[site.boundary - 1]
        placed = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
        return next(block.parameters()).device if placed is None else torch.device(placed)

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        embedding = self.network.get_input_embeddings()
        placed = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if placed is None else torch.device(placed)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def special_ids(self) -> set[int]:
        """Ids of special tokens; empty without a tokenizer."""
        return set(self.tokenizer.all_special_ids) if self.tokenizer is not None else set()

    @property
    def bos_id(self) -> int | None:
        """Id of the token that marks the beginning of a text, where the tokenizer has one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    def tokens(self, texts: Sequence[str]) -> Batch:
        """Tokenise texts into one batch; see `encode`."""
        return Batch.of(self.encode(texts), self.special_ids, self.device)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, with the tokenizer's own special tokens, and a BOS in front if `prepend_bos` asks for it."""
        encoded = self.tokenizer(list(texts))["input_ids"]
        bos = self.bos_id if self.prepend_bos else None
        return encoded if bos is None else [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]

    def single_token(self, text: str) -> int:
        """The id of a text that must be one token.

        Raises:
            UndertowError: the text is several tokens.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise UndertowError(
                f"{text!r} is {len(ids)} tokens for {self.name} ({' '.join(pieces)}), and must be one.",
                "Choose a word that the tokenizer holds whole, with its leading space.",
            )
        return ids[0]

    def logits(self, hidden: Float[Tensor, "batch d"], ids: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """Logits of `k` chosen tokens for each sample: only those rows of the unembedding are read (E5).

        Equal to `network.lm_head(hidden)` at those ids, with the architecture's soft-capping and scaling.
        """
        head = self.network.get_output_embeddings()
        if head.weight.is_meta:
            # The head is off-loaded: its rows cannot be picked, and it brings its weights in by itself.
            logits = self.all_logits(hidden)
            return logits.gather(-1, ids.to(logits.device))
        ids = ids.to(head.weight.device)
        rows = head.weight[ids]
        logits = torch.einsum("bkd,bd->bk", rows, hidden.to(rows.dtype).to(rows.device))
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[ids]
        return self._finished(logits)

    def all_logits(self, hidden: Float[Tensor, "*place d"]) -> Float[Tensor, "*place vocabulary"]:
        """Logits of the whole vocabulary."""
        return self._finished(self.network.get_output_embeddings()(hidden))

    def _finished(self, logits: Tensor) -> Tensor:
        """Scaling and soft-capping, where the architecture has them."""
        logits = logits * (getattr(self.config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits
