"""Batch: what the loader hands to a task."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elip_ds.data.augment import MEAN, STD


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """images: (B, 3, H, W), uint8 from the loader, normalised floats after to().
    input_ids, attention_mask: (B, L), int64, the class token first.
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
        """On the device, with the images normalised in fp32 and then rounded to dtype."""
        return replace(
            self,
            images=normalise(self.images.to(device, non_blocking=True)).to(dtype),
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            sample_key=self.sample_key.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory())


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> fp32 with CLIP's mean and deviation per channel taken out."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def stable_hash(text: str) -> int:
    """A signed 64-bit number that is the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
