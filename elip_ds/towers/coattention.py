"""Co-attention: two streams of layers, text and image, each of which reads the other.

A layer is self-attention, cross-attention to the other stream, feed-forward, all post-norm.
Source: METER, Dou et al., arXiv:2111.02387, section 3.2, after Tan and Bansal (LXMERT).

B batch, L text tokens, M image tokens, D width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from elip_ds.towers.bert import BERTLayer, TextConfig
from elip_ds.towers.layers import check_heads, init_linear_and_norm, init_std
from elip_ds.towers.recompute import check_recompute, keeping


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
    recompute: str = "none"
    "What the backward pass computes again: none, cheap (norms, activations) or full (layers)."

    def __post_init__(self) -> None:
        check_heads("model.fusion", self.width, self.heads)
        check_recompute("model.fusion.recompute", self.recompute)


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
    recompute: str,
    training: bool,
    words: bool | Tensor = True,
    pooled: bool = True,
) -> tuple[Tensor, Tensor]:
    """text (B, L, D), image (B, M, D) -> both, after the two streams' layers of equal number.

    attention_mask: (B, L) of the text; no stream sees its padding.  Layer l of either stream reads
    what layer l - 1 of the other gave, so neither runs ahead.
    recompute, training: see towers.recompute.
    words: all states of the text are wanted; False: the first alone, (B, 1, D); (S,): those of the
    B * L, (S, D).
    pooled: the first state of the image is wanted, too; the last layer gives no other, (B, 1, D),
    or without pooled none, (B, 0, D).
    """
    visible = attention_mask.bool()[:, None, None, :]
    last = len(text_layers) - 1
    with keeping(recompute, training) as run:
        for number, (of_text, of_image) in enumerate(zip(text_layers, image_layers, strict=True)):
            text_asks: str | Tensor = "all"
            if number == last and words is not True:
                text_asks = "class" if words is False else words
            image_asks = "class" if number == last else "all"
            before = text
            text = run(partial(_read, of_text, text_asks), text, visible, image, None)
            if number < last or pooled:
                image = run(partial(_read, of_image, image_asks), image, None, before, visible)
            else:
                image = image[:, :0]
    return text, image


def _read(
    layer: Any,
    asks: str | Tensor,
    x: Tensor,
    visible: Tensor | None,
    other: Tensor,
    other_visible: Tensor | None,
) -> Tensor:
    seen = layer.cross.key_value(other)
    return layer(x, visible, seen, other_visible, False, None, asks)
