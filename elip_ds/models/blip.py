"""BLIP: a ViT, a BERT that is encoder and decoder in one, and a joint space.

Source: Li et al., arXiv:2201.12086, with ELIP's pruning of the vision tokens. The text is encoded
first, because its class token guides the pruning of the image.

B batch, L text tokens, M image tokens, D width, E joint space, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models.features import Fused, ImageFeatures, TextFeatures
from elip_ds.models.joint import ModelConfig, Temperature, unit
from elip_ds.towers import MED, MEDConfig, ViT, ViTConfig, check_stages


@dataclass(frozen=True)
class BLIPConfig(ModelConfig):
    name: str = "blip"
    vision: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=224))
    text: MEDConfig = field(default_factory=MEDConfig)
    embed_dim: int = 256
    "Width of the joint space."
    temperature: float = 0.07
    "Start of the learned temperature, held in 0.001..0.5."

    def check(self, pruning: PruningConfig) -> None:
        """Raises UserError unless the parts fit each other and the pruning schedule fits them."""
        check_stages(pruning.stages, self.vision.depth, self.vision.num_patches)
        if pruning.stages and self.text.width != self.vision.width:
            raise UserError(
                f"model.text.width={self.text.width} must equal model.vision.width="
                f"{self.vision.width}: BLIP's text class token guides the pruning unprojected"
            )


class BLIP(nn.Module):
    """Texts come with [CLS] in front; fuse and decode put [ENC] and [DEC] in its place."""

    Config = BLIPConfig
    gives: ClassVar = frozenset({"joint_space", "fusion", "decoder"})
    prunes_in_match: ClassVar = False  # at test the released code encodes images without text
    # The momentum twin encodes images and texts, each alone.
    twin_without: ClassVar = ("cross", "cross_norm", "decoder_attn", "decoder_attn_norm", "lm_head")

    def __init__(self, config: BLIPConfig, pruning: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision, pruning)
        self.text = MED(config.text, image_width=config.vision.width)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.temperature = Temperature(config.temperature)

    @property
    def pooled_width(self) -> int:
        """Of Fused.pooled; 0 where the model fuses nothing."""
        return self.config.text.width

    @property
    def embed_dim(self) -> int:
        """Of the joint space; 0 where there is none."""
        return self.config.embed_dim

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """input_ids, attention_mask: (B, L)."""
        states = self.text.encode(input_ids, attention_mask)
        feat = unit(self.text_proj(states[:, 0]))
        return TextFeatures(input_ids, attention_mask, states, states[:, 0], feat)

    def encode_image(self, images: Tensor, guide: TextFeatures | None = None) -> ImageFeatures:
        """images: (B, 3, H, W), normalised.  guide: each image's own caption; None: no pruning."""
        tokens, keep = self.visual(images, None if guide is None else guide.text_class)
        return ImageFeatures(tokens, keep, unit(self.vision_proj(tokens[:, 0])))

    def fuse(self, text: TextFeatures, image: ImageFeatures) -> Fused:
        """Row i of the text, read anew from its ids, reads row i of the image."""
        input_ids = _start_with(self.config.text.encoder_id, text.input_ids)
        states = self.text.fuse(input_ids, text.attention_mask, image.image_embeds)
        return Fused(states, states[:, 0])

    def decode(self, input_ids: Tensor, attention_mask: Tensor, image: ImageFeatures) -> Tensor:
        """input_ids, attention_mask: (B, L) -> (B, L, D), of each token what it says of the next.

        Row i of the text reads row i of the image.
        """
        input_ids = _start_with(self.config.text.decoder_id, input_ids)
        return self.text.decode(input_ids, attention_mask, image.image_embeds)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Next words guessed: (..., D) -> (..., V)."""
        return self.text.word_logits(hidden)


def _start_with(first: int, input_ids: Tensor) -> Tensor:
    """(B, L) -> (B, L), the first id replaced."""
    return torch.cat([torch.full_like(input_ids[:, :1], first), input_ids[:, 1:]], dim=1)
