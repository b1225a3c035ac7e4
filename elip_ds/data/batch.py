"""Batch: what the loader hands to a task."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from elip_ds.data.augment import MEAN, STD


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why. source: as the config names it.  key: "" where the
    shard does not even tell its samples' names.  kind: one of record.KINDS.
    """

    source: str
    shard: str
    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """images: (B, 3, H, W), uint8 from the loader, normalised floats after to().
    input_ids, attention_mask: (B, L), int64, the class token first. L may differ between batches
    (see data.pad).
    sample_key: (B,), int64, a stable hash of source and key.
    keys: the samples' names.  skipped: what was left out on the way here.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    sample_key: Tensor
    keys: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On the device, with the images normalised in fp32 and then rounded to dtype.

        From pinned memory the host does not wait for the copies.
        """
        moved = self._each(lambda x: x.to(device, non_blocking=True))
        return replace(moved, images=normalise(moved.images).to(dtype))

    def pin_memory(self) -> "Batch":
        """All that to() copies; the DataLoader calls it."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: Any) -> None:
        """Keep the memory of all tensors until what is queued on this CUDA stream is done."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def shortened(self, length: int) -> "Batch":
        """With texts of so many tokens; what is cut off is padding."""
        ids, mask = self.input_ids[:, :length], self.attention_mask[:, :length]
        return replace(self, input_ids=ids.contiguous(), attention_mask=mask.contiguous())

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(x) for name, x in self._tensors().items()}
        return replace(self, **changed)


PAD_MULTIPLE = 8
"Shortened texts have a multiple of so many tokens: few shapes, and those that matrix units like."


def shortest_length(attention_mask: Tensor) -> int:
    """Tokens of the longest text, rounded up to a multiple of 8, not above L. (B, L), on the host.

    Where a text ends is where its last token is: one that spells the padding has gaps before.
    """
    ends = attention_mask * torch.arange(1, attention_mask.shape[1] + 1)
    longest = int(ends.max())
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, attention_mask.shape[1])


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> fp32 with CLIP's mean and deviation per channel taken out."""
    mean, std = (_per_channel(values, images.device) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """(3, 1, 1). Filled on the device: a list that is copied there makes the host wait."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def stable_hash(text: str) -> int:
    """A signed 64-bit number that is the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
