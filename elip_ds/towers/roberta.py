"""Text tower of METER: RoBERTa, or BERT, from which it differs in a few numbers.

Post-norm layers that read text alone. Source: Liu et al., arXiv:1907.11692, and Devlin et al., as
METER takes them: all layers, no pooler.

B batch, L text tokens, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.towers.bert import EPS, BERTLayer, Embeddings, TextConfig
from elip_ds.towers.layers import init_linear_and_norm, init_std
from elip_ds.towers.recompute import keeping


class Variant(NamedTuple):
    """token_types: segments in the table.  first_position: row of the position table that the first
    token reads.  eps: of all norms.
    """

    token_types: int
    first_position: int
    eps: float


VARIANTS = {
    "roberta": Variant(token_types=1, first_position=2, eps=1e-5),
    "bert": Variant(token_types=2, first_position=0, eps=EPS),
}


@dataclass(frozen=True)
class RoBERTaConfig(TextConfig):
    vocab_size: int = 50265
    "RoBERTa-base has 50265 words, BERT-base 30522."
    max_positions: int = 514
    "Rows of the position table: 514 in RoBERTa-base, which uses 512 of them, 512 in BERT-base."
    variant: str = "roberta"
    "roberta, or bert: the numbers of segments and of unused positions, and the norms' eps."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise UserError(f"model.text.variant={self.variant!r}: choose {' or '.join(VARIANTS)}")

    @property
    def max_length(self) -> int:
        """Tokens that the longest text may have."""
        return self.max_positions - VARIANTS[self.variant].first_position


class RoBERTa(nn.Module):
    """# differs from transformers' RoBERTa, which counts positions by the ids that are not padding:
    here a word that masking replaced by [PAD] does not shift the words behind it.
    """

    def __init__(self, config: RoBERTaConfig) -> None:
        super().__init__()
        self.config = config
        token_types, first_position, eps = VARIANTS[config.variant]
        self.embeddings = Embeddings(
            config, token_types=token_types, first_position=first_position, eps=eps
        )
        self.layers = nn.ModuleList(BERTLayer(config, None, eps=eps) for _ in range(config.depth))
        init_linear_and_norm(self, std=init_std(config.width), truncated=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, L) -> (B, L, D)."""
        visible = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        with keeping(self.config.recompute, self.training) as run:
            for layer in self.layers:
                x = run(layer, x, visible)
        return x
