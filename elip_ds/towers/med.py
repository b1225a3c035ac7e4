"""Text tower of BLIP: one BERT that encodes a text, fuses it with an image, or decodes it.

Source: BLIP, Li et al. 2022, arXiv:2201.12086 (`med`, the mixture of encoder and decoder). Encoder
and decoder share everything but self-attention; every layer can attend to the image.

B batch, L text tokens, M image tokens, D width, C image width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elip_ds.towers.bert import BERTLayer, Embeddings, MLMHead, TextConfig
from elip_ds.towers.layers import init_linear_and_norm, init_std, recomputed


@dataclass(frozen=True)
class MEDConfig(TextConfig):
    vocab_size: int = 30524
    "Rows of the word table; the last two are [DEC] and [ENC], however many words exist."

    @property
    def decoder_id(self) -> int:
        """[DEC], with which a text starts that is to be decoded."""
        return self.vocab_size - 2

    @property
    def encoder_id(self) -> int:
        """[ENC], with which a text starts that is to be fused with an image."""
        return self.vocab_size - 1


class MED(nn.Module):
    """One layer holds both self-attentions, so that what is shared exists once.

    # differs from BLIP, which builds two BERTs and ties their weights by name.
    """

    def __init__(self, config: MEDConfig, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, token_types=0)
        self.layers = nn.ModuleList(
            BERTLayer(config, image_width, decoder=True) for _ in range(config.depth)
        )
        self.lm_head = MLMHead(config)
        init_linear_and_norm(self, std=init_std(config.width), truncated=False)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The text alone: input_ids, attention_mask (B, L) -> (B, L, D)."""
        return self._run(input_ids, attention_mask.bool()[:, None, None, :])

    def fuse(self, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
        """Every layer sees the image, (B, M, C) -> (B, L, D)."""
        return self._run(input_ids, attention_mask.bool()[:, None, None, :], image)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, image: Tensor) -> Tensor:
        """As fuse, but each token sees only itself and what is before it."""
        length = input_ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        visible = attention_mask.bool()[:, None, None, :] & past  # (B, 1, L, L)
        return self._run(input_ids, visible, image, decode=True)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden, self.embeddings.word)

    def _run(
        self, input_ids: Tensor, visible: Tensor, image: Tensor | None = None, decode: bool = False
    ) -> Tensor:
        x = self.embeddings(input_ids)
        recompute = self.config.recompute and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x, visible, image, None, decode)
            x = recomputed(layer, *inputs) if recompute else layer(*inputs)
        return x
