"""What every model hands to the objectives.

B batch, L text tokens, M image tokens that remain after pruning, D width, E joint space.
"""

from dataclasses import dataclass

from torch import Tensor

from elip_ds.towers import KeepIndex


@dataclass(frozen=True)
class TextFeatures:
    """text_embeds: (B, L, D) states of the text half, [CLS] first.  attention_mask: (B, L).
    text_feat: (B, E) projected [CLS], L2-normalised, fp32.
    """

    text_embeds: Tensor
    attention_mask: Tensor
    text_feat: Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """image_embeds: (B, M, D), class token first.  image_feat: (B, E) projected class token,
    L2-normalised, fp32.  keep: what pruning did.
    """

    image_embeds: Tensor
    image_feat: Tensor
    keep: KeepIndex
