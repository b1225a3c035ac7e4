"""METER: a CLIP ViT and a RoBERTa, fused by two streams that attend to each other.

Source: Dou et al., arXiv:2111.02387, with ELIP's pruning of the vision tokens. There is no joint
space: an image and a text meet in the fusion only. The text is encoded first, because its first
token guides the pruning of the image.

B batch, L text tokens, M image tokens, D width of the fusion, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models.features import Fused, ImageFeatures, TextFeatures
from elip_ds.models.joint import ModelConfig
from elip_ds.towers.bert import EPS, Pairing
from elip_ds.towers.coattention import CoAttentionConfig, coattend, stream
from elip_ds.towers.layers import init_linear_and_norm, init_std
from elip_ds.towers.linear import Linear
from elip_ds.towers.pruning import KeepIndex, check_pruning
from elip_ds.towers.roberta import RoBERTa, RoBERTaConfig
from elip_ds.towers.vit import ViT, ViTConfig

RELEASED_KEEP_BASE = 49
"Patches of ViT-B/32 at 224 px, which the released code takes for any patch and image size."


def clip_without_its_last_block() -> ViTConfig:
    """METER drops the last of CLIP's twelve blocks: it serves the class token alone."""
    return ViTConfig(image_size=288, depth=11, layout="clip", activation="quick_gelu")


@dataclass(frozen=True)
class METERConfig(ModelConfig):
    name: str = "meter"
    vision: ViTConfig = field(default_factory=clip_without_its_last_block)
    text: RoBERTaConfig = field(default_factory=RoBERTaConfig)
    fusion: CoAttentionConfig = field(default_factory=CoAttentionConfig)

    def check(self, pruning: PruningConfig) -> None:
        """Raises UserError unless the parts fit each other and the pruning schedule fits them."""
        num_patches = keep_base(pruning) or self.vision.num_patches
        check_pruning(pruning, self.vision.depth, num_patches)
        if pruning.stages and self.text.width != self.vision.width:
            raise UserError(
                f"model.text.width={self.text.width} must equal model.vision.width="
                f"{self.vision.width}: METER's first text token guides the pruning unprojected"
            )


def keep_base(pruning: PruningConfig) -> int | None:
    """Patches that keep ratios refer to; None: the tower's own."""
    return RELEASED_KEEP_BASE if pruning.keep_base == "released" else None


class METER(nn.Module):
    Config = METERConfig
    gives: ClassVar = frozenset({"fusion", "words"})
    prunes_in_match: ClassVar = True  # the released code prunes by the candidate text at test, too

    def __init__(self, config: METERConfig, pruning: PruningConfig) -> None:
        super().__init__()
        self.config = config
        width = config.fusion.width
        self.visual = ViT(config.vision, pruning, keep_base=keep_base(pruning))
        self.text = RoBERTa(config.text)
        self.cross_modal_text_transform = Linear(config.text.width, width)
        self.cross_modal_image_transform = Linear(config.vision.width, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.cross_modal_text_layers = stream(config.fusion)
        self.cross_modal_image_layers = stream(config.fusion)
        self.cross_modal_text_pooler = Linear(width, width)
        self.cross_modal_image_pooler = Linear(width, width)
        self.mlm_head = UntiedMLMHead(width, config.text.vocab_size)
        for part in (
            self.cross_modal_text_transform,
            self.cross_modal_image_transform,
            self.token_type_embeddings,
            self.cross_modal_text_pooler,
            self.cross_modal_image_pooler,
            self.mlm_head,
        ):
            init_linear_and_norm(part, std=init_std(width), truncated=False)

    @property
    def pooled_width(self) -> int:
        """Of Fused.pooled: a class token of each stream."""
        return 2 * self.config.fusion.width

    @property
    def embed_dim(self) -> int:
        """Of the joint space; 0 where there is none."""
        return 0

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """input_ids, attention_mask: (B, L)."""
        states = self.text(input_ids, attention_mask)
        return TextFeatures(input_ids, attention_mask, states, states[:, 0])

    def encode_image(
        self,
        images: Tensor,
        guide: TextFeatures | None = None,
        *,
        keep_ratios: Sequence[float] | None = None,
        replay: KeepIndex | None = None,
    ) -> ImageFeatures:
        """images: (B, 3, H, W), normalised.  guide: a text for each image; None: no pruning.
        keep_ratios, replay: see towers.ViT.
        """
        text_class = None if guide is None else guide.text_class
        tokens, keep = self.visual(images, text_class, keep_ratios, replay)
        return ImageFeatures(tokens, keep)

    def fuse(
        self, text: TextFeatures, image: ImageFeatures, pairing: Pairing | None = None
    ) -> Fused:
        """Row i of the text and row i of the image read each other.

        pairing: of one text for an image, words or pooled, what is wanted; None: both.
        """
        assert pairing is None or (len(pairing.own) == 1 and pairing.others is None), pairing
        wants_words, wants_pooled = pairing is None or pairing.own[0], True
        wanted: bool | Tensor = wants_words
        if pairing is not None and wants_words:
            wants_pooled = False
            wanted = True if pairing.places is None else pairing.places
        words = self.cross_modal_text_transform(text.text_embeds)
        patches = self.cross_modal_image_transform(image.image_embeds)
        kinds = torch.arange(2, device=words.device)
        of_text, of_image = self.token_type_embeddings(kinds)
        words, patches = coattend(
            self.cross_modal_text_layers,
            self.cross_modal_image_layers,
            words + of_text,
            patches + of_image,
            text.attention_mask,
            recompute=self.config.fusion.recompute,
            training=self.training,
            words=wanted,
            pooled=wants_pooled,
        )
        if not wants_pooled:
            return Fused(words, words.new_zeros(0, self.pooled_width))
        pooled_text = self.cross_modal_text_pooler(words[:, 0]).tanh()
        pooled_image = self.cross_modal_image_pooler(patches[:, 0]).tanh()
        return Fused(words if wants_words else words[:0], torch.cat([pooled_text, pooled_image], 1))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Masked words guessed: (..., D) -> (..., V)."""
        return self.mlm_head(hidden)


class UntiedMLMHead(nn.Module):
    """Linear, GELU, norm, then a decoder of its own, plus a bias per word."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.decoder = Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden)))) + self.bias
