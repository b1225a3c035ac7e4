"""ALBEF, BLIP, METER and CLIP on weights by name: specification sections 1.3 and 2.

B batch, L text tokens, M image tokens, D width, E joint space, P what a matching head reads,
V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import PruningConfig
from elip_ds.launching.parts import part
from naive.layers import (
    Weights,
    bert_layer,
    causal_mask,
    linear,
    norm,
    padding_mask,
    pre_norm_block,
)
from naive.vision import Tokens, project, vit

EPS = 1e-12


@dataclass(frozen=True)
class Text:
    """ids, mask: (B, L).  states: (B, L, D).  guide: (B, D).  feat: (B, E) or None."""

    ids: Tensor
    mask: Tensor
    states: Tensor
    guide: Tensor
    feat: Tensor | None = None


@dataclass(frozen=True)
class Image:
    """seen: what pruning left.  feat: (B, E) or None."""

    seen: Tokens
    feat: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        return self.seen.tokens


class Model:
    """w: the model's weights.  training: whether dropout is on."""

    keep_base: int | None = None
    match_norm = False

    def __init__(self, w: Weights, config: Any, pruning: PruningConfig, training: bool) -> None:
        self.w, self.config, self.pruning = w, config, pruning
        rate = getattr(config.text, "dropout", 0.0)
        self.dropout = rate if training else 0.0

    def see(self, images: Tensor, guide: Text | None) -> Tokens:
        with part("vision"):
            return vit(
                self.w.under("visual"),
                self.config.vision,
                self.pruning,
                images,
                None if guide is None else guide.guide,
                keep_base=self.keep_base,
                match_norm=self.match_norm,
            )

    def embed(self, ids: Tensor, *, token_type: bool, first: int = 0, eps: float = EPS) -> Tensor:
        """(B, L) -> (B, L, D).  first: row of the position table that the first token reads."""
        w = self.w.under("text.embeddings")
        x = F.embedding(ids, w["word.weight"])
        x = x + w["position.weight"][first : first + ids.shape[1]]
        if token_type:
            x = x + w["token_type.weight"][0]
        return F.dropout(norm(w, "norm", x, eps), self.dropout)

    def bert(self, layer: int, x: Tensor, mask: Tensor, eps: float = EPS, **more: Any) -> Tensor:
        return bert_layer(
            self.w.under(f"text.layers.{layer}"),
            x,
            mask,
            heads=self.config.text.heads,
            eps=eps,
            dropout=self.dropout,
            **more,
        )

    def temperature(self) -> Tensor:
        """(1,), clamped, the gradient passing straight through."""
        value = self.w["temperature.temperature"].float()
        return value + (value.clamp(0.001, 0.5) - value).detach()

    def words(self, head: str, states: Tensor) -> Tensor:
        """(..., D) -> (..., V), the decoder being the word table."""
        w = self.w.under(head)
        with part("heads"):
            hidden = norm(w, "norm", F.gelu(linear(w, "dense", states)), EPS)
            return hidden @ self.w["text.embeddings.word.weight"].T + w["bias"]


class ALBEF(Model):
    def encode_text(self, ids: Tensor, mask: Tensor) -> Text:
        with part("text"):
            x = self.embed(ids, token_type=True)
            for layer in range(self.config.text.fusion_layer):
                x = self.bert(layer, x, padding_mask(mask, x.dtype))
            return Text(ids, mask, x, x[:, 0], project(self.w, "text_proj", x[:, 0]))

    def encode_image(self, images: Tensor, guide: Text | None) -> Image:
        seen = self.see(images, guide)
        return Image(seen, project(self.w, "vision_proj", seen.tokens[:, 0]))

    def fuse(self, text: Text, image: Tensor) -> tuple[Tensor, Tensor]:
        """image: (B, M, D) -> states (B, L, D), and what the matching head reads (B, D)."""
        with part("fusion"):
            x, mask = text.states, padding_mask(text.mask, text.states.dtype)
            for layer in range(self.config.text.fusion_layer, self.config.text.depth):
                x = self.bert(layer, x, mask, context=image)
            return x, x[:, 0]

    def word_logits(self, states: Tensor) -> Tensor:
        return self.words("text.mlm_head", states)


class BLIP(Model):
    """[ENC] and [DEC], the last two words, take the place of [CLS] where an image is read."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Text:
        with part("text"):
            x = self.read(ids, padding_mask(mask, self.w["text_proj.weight"].dtype))
            return Text(ids, mask, x, x[:, 0], project(self.w, "text_proj", x[:, 0]))

    def encode_image(self, images: Tensor, guide: Text | None) -> Image:
        seen = self.see(images, guide)
        return Image(seen, project(self.w, "vision_proj", seen.tokens[:, 0]))

    def fuse(self, text: Text, image: Tensor) -> tuple[Tensor, Tensor]:
        with part("fusion"):
            ids = start_with(self.config.text.vocab_size - 1, text.ids)
            x = self.read(ids, padding_mask(text.mask, image.dtype), context=image)
            return x, x[:, 0]

    def decode(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """(B, L) -> (B, L, D), of each token what it says of the next."""
        with part("fusion"):
            ids = start_with(self.config.text.vocab_size - 2, ids)
            past = padding_mask(mask, image.dtype) + causal_mask(ids.shape[1], image)
            return self.read(ids, past, context=image, attn="decoder_attn")

    def word_logits(self, states: Tensor) -> Tensor:
        return self.words("text.lm_head", states)

    def read(self, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
        x = self.embed(ids, token_type=False)
        for layer in range(self.config.text.depth):
            x = self.bert(layer, x, mask, **more)
        return x


def start_with(first: int, ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, 0] = first
    return ids


class METER(Model):
    def __init__(self, w: Weights, config: Any, pruning: PruningConfig, training: bool) -> None:
        super().__init__(w, config, pruning, training)
        self.fusion_dropout = config.fusion.dropout if training else 0.0
        self.keep_base = 49 if pruning.keep_base == "released" else None

    def encode_text(self, ids: Tensor, mask: Tensor) -> Text:
        roberta = self.config.text.variant == "roberta"
        eps = 1e-5 if roberta else EPS
        with part("text"):
            x = self.embed(ids, token_type=True, first=2 if roberta else 0, eps=eps)
            for layer in range(self.config.text.depth):
                x = self.bert(layer, x, padding_mask(mask, x.dtype), eps=eps)
            return Text(ids, mask, x, x[:, 0])

    def encode_image(self, images: Tensor, guide: Text | None) -> Image:
        return Image(self.see(images, guide))

    def fuse(self, text: Text, image: Tensor) -> tuple[Tensor, Tensor]:
        """Two streams, each of whose layers reads what the other's layer before gave."""
        with part("fusion"):
            mask = padding_mask(text.mask, text.states.dtype)
            of_text, of_image = self.w["token_type_embeddings.weight"]
            words = linear(self.w, "cross_modal_text_transform", text.states) + of_text
            patches = linear(self.w, "cross_modal_image_transform", image) + of_image
            for i in range(self.config.fusion.depth):
                words, patches = (
                    self.co(f"cross_modal_text_layers.{i}", words, mask, patches, None),
                    self.co(f"cross_modal_image_layers.{i}", patches, None, words, mask),
                )
            pooled = [
                linear(self.w, f"cross_modal_{kind}_pooler", states[:, 0]).tanh()
                for kind, states in (("text", words), ("image", patches))
            ]
            return words, torch.cat(pooled, dim=1)

    def co(
        self, name: str, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None
    ) -> Tensor:
        return bert_layer(
            self.w.under(name),
            x,
            mask,
            heads=self.config.fusion.heads,
            eps=EPS,
            dropout=self.fusion_dropout,
            context=other,
            context_mask=other_mask,
        )

    def word_logits(self, states: Tensor) -> Tensor:
        w = self.w.under("mlm_head")
        with part("heads"):
            hidden = norm(w, "norm", F.gelu(linear(w, "dense", states)), EPS)
            return linear(w, "decoder", hidden) + w["bias"]


class CLIP(Model):
    def __init__(self, w: Weights, config: Any, pruning: PruningConfig, training: bool) -> None:
        super().__init__(w, config, pruning, training)
        self.keep_base = 197 if pruning.keep_base == "released" else None
        self.match_norm = config.guide == "rescaled"

    def encode_text(self, ids: Tensor, mask: Tensor) -> Text:
        """Read at the end of the text, which has the highest id."""
        w, config = self.w.under("text"), self.config.text
        with part("text"):
            x = F.embedding(ids, w["embeddings.word.weight"])
            x = x + w["position.weight"][:, : ids.shape[1]]
            past = causal_mask(ids.shape[1], x)
            for i in range(config.depth):
                block = w.under(f"blocks.{i}")
                x, _ = pre_norm_block(block, x, config.heads, 1e-5, config.activation, past)
            x = norm(w, "norm", x, 1e-5)
            end = torch.stack([row[i] for row, i in zip(x, ids.argmax(dim=1), strict=True)])
            feat = self.joint(end, "text_projection.weight")
            guide = end.detach()
            if self.config.guide != "unprojected":
                with part("heads"):
                    guide = feat.detach().to(end.dtype) @ self.w["visual_proj.weight"].detach().T
        return Text(ids, mask, x, guide, feat)

    def encode_image(self, images: Tensor, guide: Text | None) -> Image:
        seen = self.see(images, guide)
        return Image(seen, self.joint(seen.tokens[:, 0], "visual_proj.weight"))

    def joint(self, x: Tensor, matrix: str) -> Tensor:
        with part("heads"):
            return F.normalize((x @ self.w[matrix]).float(), dim=-1)

    def temperature(self) -> Tensor:
        value = self.w["logit_scale.logit_scale"].float()
        return 1 / (value + (value.clamp(0, math.log(100)) - value).detach()).exp()


MODELS = {"albef": ALBEF, "blip": BLIP, "meter": METER, "clip": CLIP}
