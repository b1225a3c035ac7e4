"""Guessed words: losses at chosen positions, in pieces, without logits that outlive their piece.

The logits of a word are V numbers in fp32: those of a batch would outweigh a tower. So a piece of
the positions is decoded, judged and forgotten, and decoded again in the backward pass.

S positions, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24
"Numbers in a piece's logits: 64 MB in fp32, enough for matrix products at full speed."

Judge = Callable[..., tuple[Tensor, ...]]


def room_for(probability: float, count: int) -> int:
    """How many of count positions to compute so that a random selection of them fits.

    The mean and six standard deviations: a selection exceeds it once in a billion steps, and then
    loses its last positions. A fixed number, since asking the device for the true one stalls it.
    """
    spread = 6 * math.sqrt(count * probability * (1 - probability))
    return min(count, math.ceil((count * probability + spread) / 8) * 8)


def first_of(selected: Tensor, room: int) -> Tensor:
    """Row numbers of the selected ones of (R,) bool, in order, filled up with others to (room,)."""
    return selected.to(torch.uint8).argsort(descending=True, stable=True)[:room]


def in_pieces(judge: Judge, vocab_size: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """judge(*rows), tensors of (S,), computed piece by piece; rows: (S, ...) each."""
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    pieces = [_again(judge, *piece) for piece in zip(*(x.split(size) for x in rows), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _again(judge: Judge, *rows: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return judge(*rows)
    return torch.utils.checkpoint.checkpoint(
        judge, *rows, use_reentrant=False, preserve_rng_state=False
    )
