"""A batch of prompts, padded on the left, and where in it a running pass stands.

Padding on the left puts the last prompt token of every sample into the same column, whatever the lengths; the first
generated token follows in the next one. Places are therefore named by their *offset* from the end of the prompt: -1 is the
last prompt token, 0 the first generated token. Offsets do not change when samples are batched differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def token_windows(ids: Sequence[int], size: int, bos: int | None = None) -> list[list[int]]:
    """A token sequence cut into windows of up to `size`; a BOS at its start is put at the start of every window."""
    if bos is None or ids[:1] != [bos]:
        return [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [[bos, *ids[start : start + size - 1]] for start in range(1, len(ids), size - 1)]


@dataclass(frozen=True)
class Batch:
    """Left-padded token ids.

    Attributes:
        ids: `[batch, pos]` token ids.
        mask: `[batch, pos]` true at real tokens.
        special: `[batch, pos]` true at special tokens (BOS, EOS, chat markers).
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    special: Bool[Tensor, "batch pos"]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], special_ids: set[int], device: str | torch.device = "cpu") -> Batch:
        """Pad token sequences of any lengths on the left. Padding reuses id 0; the mask hides it.

        Raises:
            ValueError: no sequence, or an empty one.
        """
        if not sequences or not all(sequences):
            raise ValueError("a batch needs at least one sequence, and none may be empty")
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
        mask = torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in sequences], device=device)
        special = torch.isin(ids, torch.tensor(sorted(special_ids), device=device, dtype=ids.dtype)) & mask
        return cls(ids, mask, special)

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """Number of columns, padding included."""
        return self.ids.shape[1]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Position of every token in its own prompt; 0 in the padding."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def select(self, rows: Tensor | Sequence[int]) -> Batch:
        """The samples at `rows`, in the same columns."""
        index = torch.as_tensor(rows, device=self.ids.device)
        return Batch(self.ids[index], self.mask[index], self.special[index])

    def trimmed(self) -> Batch:
        """The same samples without columns that are padding in all of them."""
        first = int(self.mask.any(0).int().argmax())
        return Batch(self.ids[:, first:], self.mask[:, first:], self.special[:, first:])

    def extended(self, tokens: Int[Tensor, "batch new"]) -> Batch:
        """This batch with tokens appended, as in decoding; appended tokens count as real and not special."""
        return Batch(
            torch.cat([self.ids, tokens], 1),
            torch.cat([self.mask, torch.ones_like(tokens, dtype=torch.bool)], 1),
            torch.cat([self.special, torch.zeros_like(tokens, dtype=torch.bool)], 1),
        )


@dataclass(frozen=True)
class Where:
    """The columns that a pass is computing now. With a key-value cache a pass sees only a slice: edits index by offset.

    Attributes:
        start: offset of the slice's first column from the end of the prompt (negative inside the prompt).
        mask: `[batch, slice]` true at real tokens.
        special: `[batch, slice]` true at special tokens.
    """

    start: int
    mask: Bool[Tensor, "batch slice"]
    special: Bool[Tensor, "batch slice"]

    @classmethod
    def slice(cls, batch: Batch, first: int, last: int, prompt_width: int) -> Where:
        """The columns `first` to `last` (exclusive) of a batch whose prompt fills `prompt_width` columns."""
        return cls(first - prompt_width, batch.mask[:, first:last], batch.special[:, first:last])

    def to(self, device: torch.device) -> Where:
        """The same columns, for a stream on another device."""
        return self if self.mask.device == device else Where(self.start, self.mask.to(device), self.special.to(device))

    @property
    def offsets(self) -> Int[Tensor, " slice"]:
        """Offset of every column of the slice."""
        return torch.arange(self.start, self.start + self.mask.shape[1], device=self.mask.device)
