"""CLIP's text tower: a causal transformer, read where the text ends.

Source: Radford et al., arXiv:2103.00020, as open_clip builds and initialises it. The end of a text
is its highest id: the vocabulary gives the end mark the last one, and what follows is padding,
which a causal tower never shows to the tokens before.

B batch, L text tokens, D width.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.towers.layers import ACTIVATIONS, PreNormBlock, Table, check_heads
from elip_ds.towers.recompute import check_recompute, keeping

EPS = 1e-5


@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    max_positions: int = 77
    activation: str = "gelu"
    "gelu, or quick_gelu as in OpenAI's weights."
    recompute: str = "none"
    "What the backward pass computes again: none, cheap (norms, activations) or full (blocks)."

    def __post_init__(self) -> None:
        check_heads("model.text", self.width, self.heads)
        check_recompute("model.text.recompute", self.recompute)
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"model.text.activation={self.activation!r}: choose {' or '.join(ACTIVATIONS)}"
            )

    @property
    def max_length(self) -> int:
        """Tokens that the longest text may have, begin and end mark included."""
        return self.max_positions


class CLIPText(nn.Module):
    """ends_only, False at first: the last block runs for the end marks alone. It is for a step that
    reads no other token of it.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config, self.ends_only = config, False
        words = nn.Embedding(config.vocab_size, config.width)
        self.embeddings = nn.ModuleDict({"word": words})
        self.position = Table(config.max_positions, config.width)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                config.width,
                config.heads,
                int(config.width * config.mlp_ratio),
                eps=EPS,
                activation=config.activation,
                causal=True,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self._init_weights()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids: (B, L), the end mark the highest of each row.

        Returns the states after the final norm (B, L, D), or with ends_only (B, 1, D), and those at
        the end marks (B, D).
        """
        x = self.embeddings["word"](input_ids) + self.position()[:, : input_ids.shape[1]]
        ends = input_ids.argmax(dim=1)
        with keeping(self.config.recompute, self.training) as run:
            for block in self.blocks[:-1]:
                x = run(block, x)
            x = run(self.blocks[-1], x, ends if self.ends_only else None)
        x = self.norm(x)
        if self.ends_only:
            return x, x[:, 0]
        return x, x[torch.arange(len(x), device=x.device), ends]

    def _init_weights(self) -> None:
        """open_clip's: what adds to the residual stream starts smaller, the deeper the tower."""
        width, depth = self.config.width, self.config.depth
        nn.init.normal_(cast(nn.Embedding, self.embeddings["word"]).weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)
        for block in cast(list[PreNormBlock], self.blocks):
            for linear, std in (
                (block.attn.qkv, width**-0.5),
                (block.attn.proj, (2 * width * depth) ** -0.5),
                (block.mlp.fc1, (2 * width) ** -0.5),
                (block.mlp.fc2, (2 * width * depth) ** -0.5),
            ):
                nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)
