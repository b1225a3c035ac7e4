"""Text tower of ALBEF: BERT whose lower layers read text alone and whose upper ones see images too.

Post-norm BERT (Devlin et al.), with a cross-attention between self-attention and feed-forward in
the fusion layers (ALBEF, Li et al. 2021, `xbert`). The masked-word head shares the word embeddings.

B batch, L text tokens, M image tokens, D width, C image width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.towers.layers import (
    MLP,
    CrossAttention,
    SelfAttention,
    check_heads,
    init_linear_and_norm,
    init_std,
    recomputed,
)

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
    recompute: bool = False
    "Activation checkpointing of every layer."

    def __post_init__(self) -> None:
        check_heads("model.text", self.width, self.heads)

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
        x = self.embeddings(input_ids)
        for layer in self.layers[: self.config.fusion_layer]:
            x = self._run(layer, x, attention_mask, None)
        return x

    def fuse(self, text: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
        """The fusion half: text (B, L, D) from encode, image (B, M, C) -> (B, L, D)."""
        x = text
        for layer in self.layers[self.config.fusion_layer :]:
            x = self._run(layer, x, attention_mask, image)
        return x

    def decode(self, hidden: Tensor) -> Tensor:
        """Word logits: (..., D) -> (..., V)."""
        return self.mlm_head(hidden, self.embeddings.word)

    def _run(self, layer: nn.Module, x: Tensor, mask: Tensor, image: Tensor | None) -> Tensor:
        visible = mask.bool()[:, None, None, :]
        if self.config.recompute and self.training and torch.is_grad_enabled():
            return recomputed(layer, x, visible, image)
        return layer(x, visible, image)


class WordEmbedding(nn.Embedding):
    """Ids to vectors, and, being the decoder's matrix too, vectors to word scores."""

    def forward(self, x: Tensor, decode: bool = False) -> Tensor:
        """x: ids (B, L) -> (B, L, D); with decode (..., D) -> (..., V)."""
        return F.linear(x, self.weight) if decode else super().forward(x)


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
        self.dropout = nn.Dropout(config.dropout)

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
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None,
        context: Tensor | None = None,
        context_visible: Tensor | None = None,
        decode: bool = False,
    ) -> Tensor:
        """x: (B, L, D).  visible: bool, (B, 1, 1, L) or (B, 1, L, L); None: all.
        context: (B, M, C) or None.  context_visible: (B, 1, 1, M) bool; None: all of it.
        decode: by the decoder's self-attention.
        """
        attn, norm = self.attn, self.attn_norm
        if decode:
            attn, norm = self.decoder_attn, self.decoder_attn_norm
        x = norm(x + self.dropout(attn(x, visible)))
        if context is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, context, context_visible)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class MLMHead(nn.Module):
    """Linear, GELU, norm, then the word embeddings as decoder, plus a bias per word."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word: WordEmbedding) -> Tensor:
        """(..., D) -> (..., V)."""
        return word(self.norm(F.gelu(self.dense(hidden))), decode=True) + self.bias
