"""Co-attention: two streams of layers, text and image, each of which reads the other.

A layer is self-attention, cross-attention to the other stream, feed-forward, all post-norm.
Source: METER, Dou et al., arXiv:2111.02387, section 3.2, after Tan and Bansal (LXMERT).

B batch, L text tokens, M image tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elip_ds.towers.bert import BERTLayer, TextConfig
from elip_ds.towers.layers import check_heads, init_linear_and_norm, init_std, recomputed


@dataclass(frozen=True)
class CoAttentionConfig:
    width: int = 768
    "Of both streams."
    depth: int = 6
    "Layers of each stream."
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    "On hidden states and attention weights."
    recompute: bool = False
    "Activation checkpointing of every layer."

    def __post_init__(self) -> None:
        check_heads("model.fusion", self.width, self.heads)


def stream(config: CoAttentionConfig) -> nn.ModuleList:
    """The layers of one stream."""
    layer = TextConfig(
        width=config.width,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        dropout=config.dropout,
    )
    layers = nn.ModuleList(BERTLayer(layer, config.width) for _ in range(config.depth))
    init_linear_and_norm(layers, std=init_std(config.width), truncated=False)
    return layers


def coattend(
    text_layers: nn.ModuleList,
    image_layers: nn.ModuleList,
    text: Tensor,
    image: Tensor,
    attention_mask: Tensor,
    *,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """text (B, L, D), image (B, M, D) -> both, after the two streams' layers of equal number.

    attention_mask: (B, L) of the text; no stream sees its padding.  Layer l of either stream reads
    what layer l - 1 of the other gave, so neither runs ahead.
    recompute: activation checkpointing, in training.
    """
    visible = attention_mask.bool()[:, None, None, :]
    recompute = recompute and torch.is_grad_enabled()
    for text_layer, image_layer in zip(text_layers, image_layers, strict=True):
        text_inputs = text, visible, image
        image_inputs = image, None, text, visible
        if recompute:
            text, image = (
                recomputed(text_layer, *text_inputs),
                recomputed(image_layer, *image_inputs),
            )
        else:
            text, image = text_layer(*text_inputs), image_layer(*image_inputs)
    return text, image
