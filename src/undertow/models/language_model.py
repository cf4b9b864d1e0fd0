"""A decoder from transformers, frozen, with the few views of it that undertow needs.

Any causal language model works whose decoder keeps its blocks in one `ModuleList`; the list is found by trying the
names in `LAYER_PATHS`. Nothing is copied or converted: the model's own code runs, so masks, rotary embeddings, norms and
soft-capping stay those of the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from undertow.errors import UndertowError
from undertow.models.batch import Batch

# Where architectures keep their blocks, relative to the causal language model.
LAYER_PATHS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
)


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
    def wrap(cls, network: Any, tokenizer: Any = None, name: str = "model", **facts: Any) -> LanguageModel:
        """Freeze a transformers model and find its blocks.

        Raises:
            UndertowError: the blocks are not at any known path.
        """
        network.eval().requires_grad_(False)
        for path in LAYER_PATHS:
            try:
                found = network.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return cls(name, network, tokenizer, path, **facts)
        lists = [path for path, module in network.named_modules() if isinstance(module, nn.ModuleList)]
        raise UndertowError(
            f"{type(network).__name__} keeps its decoder blocks at none of {', '.join(LAYER_PATHS)}.",
            f"Its module lists are: {', '.join(lists) or 'none'}.",
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.network.get_submodule(self.layers_path)

    @property
    def decoder(self) -> nn.Module:
        """The module that maps token ids to the final, normalised hidden state."""
        return self.network.get_submodule(self.layers_path.rpartition(".")[0])

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

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        return self.network.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def special_ids(self) -> set[int]:
        """Ids of special tokens; empty without a tokenizer."""
        return set(self.tokenizer.all_special_ids) if self.tokenizer is not None else set()

    def tokens(self, texts: Sequence[str]) -> Batch:
        """Tokenise texts into one batch; see `encode`."""
        return Batch.of(self.encode(texts), self.special_ids, self.device)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, with the tokenizer's own special tokens, and a BOS in front if `prepend_bos` asks for it."""
        encoded = self.tokenizer(list(texts))["input_ids"]
        bos = self.tokenizer.bos_token_id if self.prepend_bos else None
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
