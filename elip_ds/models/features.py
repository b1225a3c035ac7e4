"""What every model hands to the objectives.

B batch, L text tokens, M image tokens that remain after pruning, D width of the text tower, W of
the vision tower, E joint space, P what a matching head reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elip_ds.towers import KeepIndex


@dataclass(frozen=True)
class TextFeatures:
    """input_ids, attention_mask: (B, L).  text_embeds: (B, L, D) states of the text alone.
    text_class: (B, W) guides the pruning of an image.
    text_feat: (B, E) in the joint space, L2-normalised, fp32; None where the model has no such.
    """

    input_ids: Tensor
    attention_mask: Tensor
    text_embeds: Tensor
    text_class: Tensor
    text_feat: Tensor | None = None

    def take(self, rows: Tensor) -> "TextFeatures":
        """The samples of these row numbers, in that order, any of them several times."""
        return TextFeatures(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.text_embeds[rows],
            self.text_class[rows],
            None if self.text_feat is None else self.text_feat[rows],
        )

    @staticmethod
    def pile(own: Sequence["TextFeatures"], others: Sequence["TextFeatures"]) -> "TextFeatures":
        """Row 0 of each of own, then row 1 of each, ...; then the others, one behind the other.

        Only what a fusion reads: input_ids, attention_mask, text_embeds and text_class.
        """
        parts = []
        for name in ("input_ids", "attention_mask", "text_embeds", "text_class"):
            by_image = torch.stack([getattr(text, name) for text in own], dim=1).flatten(0, 1)
            parts.append(torch.cat([by_image, *(getattr(text, name) for text in others)]))
        return TextFeatures(*parts)


@dataclass(frozen=True)
class ImageFeatures:
    """image_embeds: (B, M, W), class token first.  keep: what pruning did.
    image_feat: (B, E) in the joint space, L2-normalised, fp32; None where the model has no such.
    keys_values: (B, M, 2D) for each layer that reads the image, where several passes share them.
    """

    image_embeds: Tensor
    keep: KeepIndex
    image_feat: Tensor | None = None
    keys_values: tuple[Tensor, ...] = ()

    @property
    def seen(self) -> Tensor | tuple[Tensor, ...]:
        """What a fusion reads of the images."""
        return self.keys_values or self.image_embeds

    def take(self, rows: Tensor) -> "ImageFeatures":
        """The samples of these row numbers, in that order, any of them several times."""
        return ImageFeatures(
            self.image_embeds[rows],
            self.keep.take(rows),
            None if self.image_feat is None else self.image_feat[rows],
            tuple(x[rows] for x in self.keys_values),
        )


class Fused(NamedTuple):
    """text: (R, L, D) text states that have seen the image, of pairs whose words are wanted; (S, D)
    where only some of their states are (Pairing.places).
    pooled: (R', P) for a matching head, of all other pairs; where there are none, of those.
    """

    text: Tensor
    pooled: Tensor
