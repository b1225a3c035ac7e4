"""BLIP: a ViT, a BERT that is encoder and decoder in one, and a joint space.

Source: Li et al., arXiv:2201.12086, with ELIP's pruning of the vision tokens. The text is encoded
first, because its class token guides the pruning of the image.

B batch, L text tokens, M image tokens, D width, E joint space, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from elip_ds.models.features import Fused, ImageFeatures, TextFeatures
from elip_ds.models.two_towers import TwoTowers, TwoTowersConfig
from elip_ds.towers import MED, MEDConfig, ViTConfig
from elip_ds.towers.bert import Pairing


@dataclass(frozen=True)
class BLIPConfig(TwoTowersConfig):
    name: str = "blip"
    vision: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=224))
    text: MEDConfig = field(default_factory=MEDConfig)


class BLIP(TwoTowers):
    """Texts come with [CLS] in front; fuse and decode put [ENC] and [DEC] in its place."""

    Config = BLIPConfig
    Text = MED
    gives: ClassVar = frozenset({"joint_space", "fusion", "decoder"})
    # The momentum twin encodes images and texts, each alone.
    twin_without: ClassVar = ("cross", "cross_norm", "decoder_attn", "decoder_attn_norm", "lm_head")

    def look(self, image: ImageFeatures) -> ImageFeatures:
        """With the keys and values that fuse and decode read, for several passes at once."""
        return replace(image, keys_values=self.text.look(image.image_embeds))

    def fuse(
        self, text: TextFeatures, image: ImageFeatures, pairing: Pairing | None = None
    ) -> Fused:
        """Row i of the text, read anew from its ids, reads row i of the image, unless a pairing
        says otherwise.
        """
        input_ids = _start_with(self.config.text.encoder_id, text.input_ids)
        states, pooled = self.text.fuse(input_ids, text.attention_mask, image.seen, pairing)
        return Fused(states, pooled if len(pooled) or states.ndim == 2 else states[:, 0])

    def decode(self, input_ids: Tensor, attention_mask: Tensor, image: ImageFeatures) -> Tensor:
        """input_ids, attention_mask: (B, L) -> (B, L, D), of each token what it says of the next.

        Row i of the text reads row i of the image.
        """
        input_ids = _start_with(self.config.text.decoder_id, input_ids)
        return self.text.decode(input_ids, attention_mask, image.seen)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Next words guessed: (..., D) -> (..., V)."""
        return self.text.word_logits(hidden)


def _start_with(first: int, input_ids: Tensor) -> Tensor:
    """(B, L) -> (B, L), the first id replaced."""
    return torch.cat([torch.full_like(input_ids[:, :1], first), input_ids[:, 1:]], dim=1)
