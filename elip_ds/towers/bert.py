"""Text tower of ALBEF: BERT whose lower layers read text alone and whose upper ones see images too.

Post-norm BERT (Devlin et al.), with a cross-attention between self-attention and feed-forward in
the fusion layers (ALBEF, Li et al. 2021, `xbert`). The masked-word head shares the word embeddings.

B batch, L text tokens, M image tokens, D width, C image width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.towers.layers import (
    MLP,
    CrossAttention,
    Dropout,
    Readers,
    SelfAttention,
    check_heads,
    init_linear_and_norm,
    init_std,
    pick,
)
from elip_ds.towers.linear import Linear
from elip_ds.towers.recompute import Run, again, check_recompute, keeping
from elip_ds.towers.word_table import WordEmbedding

EPS = 1e-12


@dataclass(frozen=True)
class TextConfig:
    """What every BERT-like tower has."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    max_positions: int = 512
    dropout: float = 0.1
    "On hidden states and attention weights."
    recompute: str = "none"
    "What the backward pass computes again: none, cheap (norms, activations) or full (layers)."

    def __post_init__(self) -> None:
        check_heads("model.text", self.width, self.heads)
        check_recompute("model.text.recompute", self.recompute)

    @property
    def max_length(self) -> int:
        """Tokens that the longest text may have."""
        return self.max_positions


@dataclass(frozen=True)
class BERTConfig(TextConfig):
    fusion_layer: int = 6
    "First layer that attends to the image; the layers below read text alone."

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fusion_layer < self.depth:
            raise UserError(
                f"model.text.fusion_layer={self.fusion_layer} must lie between 0 and "
                f"depth={self.depth}, both left out"
            )


class Pairing(NamedTuple):
    """Which texts read which of B images, and what is wanted of them.

    own: for each text that image i is read by, of which there are as many for every image, whether
    its words are wanted; the rows of the texts are image by image, in this order.
    others: (B * G,) or None: the images that further texts read; their class token is wanted.
    places: (S,) or None: of the states of the texts whose words are wanted, B * words * L in a row,
    those that are read, each once; None: all.
    """

    own: tuple[bool, ...] = (True,)
    others: Tensor | None = None
    places: Tensor | None = None


class BERT(nn.Module):
    def __init__(self, config: BERTConfig, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            BERTLayer(config, image_width if i >= config.fusion_layer else None)
            for i in range(config.depth)
        )
        self.mlm_head = MLMHead(config)
        init_linear_and_norm(self, std=init_std(config.width), truncated=False)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The text half: input_ids, attention_mask (B, L) -> (B, L, D)."""
        visible = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        with keeping(self.config.recompute, self.training) as run:
            for layer in self.layers[: self.config.fusion_layer]:
                x = run(layer, x, visible)
        return x

    def fuse(
        self,
        text: Tensor,
        attention_mask: Tensor,
        image: Tensor | Sequence[Tensor],
        pairing: Pairing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fusion half: text (R, L, D) from encode, attention_mask (R, L), image (B, M, C) ->
        see read_images.
        """
        layers = list(self.layers[self.config.fusion_layer :])
        with keeping(self.config.recompute, self.training) as run:
            return read_images(layers, run, text, attention_mask, image, pairing or Pairing())

    def decode(self, hidden: Tensor) -> Tensor:
        """Word logits: (..., D) -> (..., V)."""
        return self.mlm_head(hidden, self.embeddings.word)


class Embeddings(nn.Module):
    """Words, positions and, with token_types > 0, the segment, of which every text here is 0.

    first_position: number of the first token's position (RoBERTa: 2).
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        token_types: int = 2,
        first_position: int = 0,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.first_position = first_position
        self.word = WordEmbedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(token_types, config.width) if token_types else None
        self.norm = nn.LayerNorm(config.width, eps=eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions + self.first_position)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(positions))
        return self.dropout(self.norm(x))


class BERTLayer(nn.Module):
    """Post-norm layer: self-attention, where context_width is given cross-attention, feed-forward.

    context_width: of the sequence it attends to, None for a layer that reads text alone.
    decoder: it has a second self-attention, which looks only backwards; all else is shared (BLIP).
    """

    def __init__(
        self,
        config: TextConfig,
        context_width: int | None,
        *,
        decoder: bool = False,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads, config.dropout)
        self.attn_norm = nn.LayerNorm(width, eps=eps)
        if decoder:
            self.decoder_attn = SelfAttention(width, config.heads, config.dropout)
            self.decoder_attn_norm = nn.LayerNorm(width, eps=eps)
        if context_width is not None:
            self.cross = CrossAttention(width, context_width, config.heads, config.dropout)
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None,
        context: Tensor | None = None,
        context_visible: Tensor | None = None,
        decode: bool = False,
        readers: Readers | None = None,
        asks: str | Tensor = "all",
    ) -> Tensor:
        """x: (R, L, D) -> (R, L, D).  visible: bool, (R, 1, 1, L) or (R, 1, L, L); None: all.
        context: None, or the keys and values (B, M, 2D) that self.cross.key_value gives for one.
        context_visible: (B, 1, 1, M) bool; None: all of it.  readers: who reads which context.
        decode: by the decoder's self-attention.  asks: class gives token 0 alone, (R, 1, D);
        (S,), places among the R * L tokens, give these, (S, D).
        """
        attn, norm = self.attn, self.attn_norm
        if decode:
            attn, norm = self.decoder_attn, self.decoder_attn_norm
        asking, places, among = None, None, None
        if isinstance(asks, Tensor):
            asking, places, among = pick(x, asks), asks, (asks, x.shape[:2])
        elif asks == "class":
            asking = x[:, :1]
        seen = attn(x, visible, asking=asking, places=places)
        x = again(norm, (x if asking is None else asking) + self.dropout(seen))
        if context is not None:
            seen = self.cross(x, context, context_visible, readers, among)
            x = again(self.cross_norm, x + self.dropout(seen))
        return again(self.mlp_norm, x + self.dropout(self.mlp(x)))


def read_images(
    layers: Sequence[Any],
    run: Run,
    text: Tensor,
    attention_mask: Tensor,
    image: Tensor | Sequence[Tensor],
    pairing: Pairing,
) -> tuple[Tensor, Tensor]:
    """Texts through layers that read images, all pairs in one pass.

    text: (R, L, D).  attention_mask: (R, L).  image: (B, M, C), or each layer's keys and values.
    Returns the states of the texts whose words are wanted (B * words, L, D), or those at the
    pairing's places, (S, D), and the class tokens of all others (R - B * words, D), each in the
    order of the pairing. The last layer runs for what is wanted alone.
    """
    own = len(pairing.own)
    visible = attention_mask.bool()[:, None, None, :]
    x, readers = text, Readers(own, pairing.others)
    for number, layer in enumerate(layers):
        seen = layer.cross.key_value(image) if isinstance(image, Tensor) else image[number]
        if number < len(layers) - 1:
            x = run(layer, x, visible, seen, None, False, readers)

    last, batch = layers[-1], len(seen)
    words = [i for i, wanted in enumerate(pairing.own) if wanted]
    rest = [i for i, wanted in enumerate(pairing.own) if not wanted]
    states, pooled = text.new_zeros(0, *text.shape[1:]), text.new_zeros(0, text.shape[2])
    if words:
        rows, see = (_texts(part, batch, own, words) for part in (x, visible))
        asks = "all" if pairing.places is None else pairing.places
        states = run(last, rows, see, seen, None, False, Readers(len(words)), asks)
    if rest or pairing.others is not None:
        rows, see = (
            torch.cat([_texts(part, batch, own, rest), part[batch * own :]])
            for part in (x, visible)
        )
        few = Readers(len(rest), pairing.others)
        pooled = run(last, rows, see, seen, None, False, few, "class").squeeze(1)
    return states, pooled


def _texts(x: Tensor, batch: int, own: int, which: list[int]) -> Tensor:
    """Of rows that are image by image, own for each, those of which: (B * len(which), ...)."""
    x = x[: batch * own]
    if len(which) == own:
        return x
    per_image = x.unflatten(0, (batch, own))
    return torch.stack([per_image[:, i] for i in which], dim=1).flatten(0, 1) if which else x[:0]


class MLMHead(nn.Module):
    """Linear, GELU, norm, then the word embeddings as decoder, plus a bias per word."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word: WordEmbedding) -> Tensor:
        """(..., D) -> (..., V)."""
        return word(self.norm(F.gelu(self.dense(hidden))), decode=True) + self.bias
