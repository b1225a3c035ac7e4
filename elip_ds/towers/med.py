"""Text tower of BLIP: one BERT that encodes a text, fuses it with an image, or decodes it.

Source: BLIP, Li et al. 2022, arXiv:2201.12086 (`med`, the mixture of encoder and decoder). Encoder
and decoder share everything but self-attention; every layer can attend to the image.

B batch, L text tokens, M image tokens, D width, C image width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from elip_ds.towers.bert import (
    BERTLayer,
    Embeddings,
    MLMHead,
    Pairing,
    TextConfig,
    read_images,
)
from elip_ds.towers.layers import init_linear_and_norm, init_std
from elip_ds.towers.recompute import keeping


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
        visible = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        with keeping(self.config.recompute, self.training) as run:
            for layer in self.layers:
                x = run(layer, x, visible)
        return x

    def look(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, M, C) -> every layer's keys and values, (B, M, 2D) each, for fuse and decode."""
        layers = cast(list[BERTLayer], self.layers)
        return tuple(layer.cross.key_value(image) for layer in layers)

    def fuse(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | Sequence[Tensor],
        pairing: Pairing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask: (R, L).  image: (B, M, C), or what look gave for it.

        Every layer sees the image. Returns as towers.bert.read_images does.
        """
        x = self.embeddings(input_ids)
        pairing = pairing or Pairing()
        with keeping(self.config.recompute, self.training) as run:
            return read_images(list(self.layers), run, x, attention_mask, image, pairing)

    def decode(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Each token sees the image, itself and what is before it: (B, L, D)."""
        length = input_ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        visible = attention_mask.bool()[:, None, None, :] & past  # (B, 1, L, L)
        x = self.embeddings(input_ids)
        with keeping(self.config.recompute, self.training) as run:
            for layer, seen in zip(self.layers, self._seen(image), strict=True):
                x = run(layer, x, visible, seen, None, True)
        return x

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden, self.embeddings.word)

    def _seen(self, image: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        return self.look(image) if isinstance(image, Tensor) else image
