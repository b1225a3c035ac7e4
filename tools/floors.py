"""What the mathematics of a step needs: the operations of its matrix products, in closed form.

Of one image and its caption, in the units of counts.py. The student forward and twice that
backward, where a gradient is asked for; the look-ahead and the teacher forward only. Every vector
is projected once, whoever reads it; of the look-ahead's last block only the class token's attention
row is needed; words are scored where they are guessed. Of a last layer all is needed that something
reads: where that is one token, the others' keys and values alone.

N image tokens, L text tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elip_ds.config import Config
from elip_ds.towers.pruning import keep_count, sequence_lengths

BACKWARD = 2
"A product's gradients for both factors cost a product each."


@dataclass(frozen=True)
class Floor:
    """Operations of one image, by part."""

    forward: dict[str, float]
    backward: dict[str, float]


def floor(config: Config, *, batch: int, words: float, guessed: float) -> Floor:
    """batch: samples of the micro-batch.  words: tokens of a caption.  guessed: words of a caption
    that MLM or LM guesses.
    """
    return {"albef": _albef, "blip": _blip, "meter": _meter, "clip": _clip}[config.model.name](
        config, batch, words, guessed
    )


def linear(tokens: float, wide: int, out: int) -> float:
    return 2 * tokens * wide * out


def attention(tokens: float, context: float, width: int) -> float:
    """Scores and their product with the values."""
    return 4 * tokens * context * width


def self_attention(tokens: float, width: int) -> float:
    return linear(tokens, width, 4 * width) + attention(tokens, tokens, width)


def feed_forward(tokens: float, width: int, mlp_ratio: float) -> float:
    return 2 * linear(tokens, width, int(width * mlp_ratio))


def layer(tokens: float, width: int, mlp_ratio: float) -> float:
    return self_attention(tokens, width) + feed_forward(tokens, width, mlp_ratio)


def cross_layer(tokens: float, context: float, width: int, mlp_ratio: float) -> float:
    """A layer with cross-attention, the keys and values left out."""
    cross = linear(tokens, width, 2 * width) + attention(tokens, context, width)
    return layer(tokens, width, mlp_ratio) + cross


def last_layer(tokens: float, width: int, mlp_ratio: float, read: float = 1) -> float:
    """A layer for so many tokens alone."""
    attend = linear(read, width, 2 * width) + attention(read, tokens, width)
    return linear(tokens, width, 2 * width) + attend + feed_forward(read, width, mlp_ratio)


def last_cross_layer(
    tokens: float, context: float, width: int, mlp_ratio: float, read: float = 1
) -> float:
    """A cross_layer for so many tokens alone."""
    cross = linear(read, width, 2 * width) + attention(read, context, width)
    return last_layer(tokens, width, mlp_ratio, read) + cross


def patch_embedding(vision: Any) -> float:
    return linear(vision.num_patches, 3 * vision.patch_size**2, vision.width)


def blocks(tower: Any, lengths: Sequence[float], whole: bool = True) -> float:
    """Of a tower whose blocks see so many tokens.  whole: more than one of the last are read."""
    *below, last = lengths
    size = tower.width, tower.mlp_ratio
    return sum(layer(n, *size) for n in below) + (layer if whole else last_layer)(last, *size)


def vision_lengths(config: Config, pruned: bool = True) -> list[int]:
    """Tokens that each block of the ViT sees."""
    vision = config.model.vision
    pruning = config.pruning if pruned else replace(config.pruning, stages=[])
    return sequence_lengths(pruning, vision.depth, vision.num_patches, keep_base(config))


def keep_base(config: Config) -> int | None:
    """Patches that keep ratios refer to; None: the image's own."""
    released = {"meter": 49, "clip": 197}.get(config.model.name)
    return released if config.pruning.keep_base == "released" else None


def look_ahead(config: Config) -> float:
    """Whole blocks at the length before a stage, then one row of attention."""
    vision, lengths = config.model.vision, vision_lengths(config)
    total, width = 0.0, vision.width
    for stage in config.pruning.stages:
        before = lengths[stage.layer - 1] if stage.layer else 1 + vision.num_patches
        count = keep_count(stage.keep_ratio, keep_base(config) or vision.num_patches)
        if count >= before - 1 and config.pruning.empty_stage == "skip":
            continue
        total += (stage.lookahead - 1) * layer(before, width, vision.mlp_ratio)
        total += linear(1 + before, width, width) + 2 * before * width
    return total


class _Sum:
    """Forward and backward of the parts, added up."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.forward: dict[str, float] = {}
        self.backward: dict[str, float] = {}

    def add(self, part: str, operations: float, backward: float = BACKWARD) -> None:
        self.forward[part] = self.forward.get(part, 0.0) + operations
        self.backward[part] = self.backward.get(part, 0.0) + backward * operations

    def see(self, times: int = 1, whole: bool = True) -> int:
        """The student's images, so many times.  Returns the tokens that remain."""
        vision, lengths = self.config.model.vision, vision_lengths(self.config)
        self.add("vision", times * blocks(vision, lengths, whole))
        self.add("vision", times * patch_embedding(vision), backward=1)  # none for the pixels
        self.add("look-ahead", times * look_ahead(self.config), backward=0)
        return lengths[-1]

    def teach(self, text: float, whole: bool = True) -> int:
        """The teacher's image, and what it makes of texts.  Returns the image's tokens."""
        vision, prune = self.config.model.vision, self.config.teacher.prune
        lengths = vision_lengths(self.config, prune != "off")
        ahead = look_ahead(self.config) if prune == "own" else 0.0
        seen = blocks(vision, lengths, whole) + patch_embedding(vision) + ahead
        self.add("teacher", seen + text, backward=0)
        return lengths[-1]

    def contrast(self, batch: int) -> None:
        """Projections and ITC, the student's and the teacher's; keys carry no gradient."""
        model, itc = self.config.model, self.config.objectives.get("itc")
        project = linear(1, model.vision.width + model.text.width, model.embed_dim)
        self.add("heads", project)
        if itc is not None:
            scores = 2 * linear(1, model.embed_dim, batch + itc.queue_size)
            self.add("heads", scores, backward=1)
            self.add("heads", scores, backward=0)
            self.add("teacher", project, backward=0)

    def floor(self) -> Floor:
        return Floor(self.forward, self.backward)


def _albef(config: Config, batch: int, words: float, guessed: float) -> Floor:
    total, model, losses = _Sum(config), config.model, config.objectives
    text, width = model.text, model.text.width
    itm, mlm = losses.get("itm"), losses.get("mlm")
    encode = text.fusion_layer * layer(words, width, text.mlp_ratio)
    upper = text.depth - text.fusion_layer

    def fuse(whole: int, pooled: int, tokens: int) -> float:
        """So many texts of which guessed words are read, and so many of which the class token."""
        sizes = words, tokens, width, text.mlp_ratio
        below = (upper - 1) * (whole + pooled) * cross_layer(*sizes)
        last = whole * last_cross_layer(*sizes, guessed) + pooled * last_cross_layer(*sizes)
        return below + last + upper * linear(tokens, model.vision.width, 2 * width)

    tokens = total.see()
    total.add("text", encode * (2 if mlm else 1))
    total.contrast(batch)
    if itm or mlm:
        total.add("fusion", fuse(1 if mlm else 0, 3 if itm else 0, tokens))
    if itm:
        total.add("heads", 3 * linear(1, width, 2))
    guess = guessed * (linear(1, width, width) + linear(1, width, text.vocab_size))
    if mlm:
        total.add("heads", guess)
    if "itc" in losses or (mlm and mlm.alpha > 0):
        seen = total.teach(encode)
        if mlm and mlm.alpha > 0:
            total.add("teacher", encode + fuse(1, 0, seen) + guess, backward=0)
    return total.floor()


def _blip(config: Config, batch: int, words: float, guessed: float) -> Floor:
    total, model, losses = _Sum(config), config.model, config.objectives
    text, width = model.text, model.text.width
    itm, lm = losses.get("itm"), losses.get("lm")
    tokens = total.see()
    encode = text.depth * layer(words, width, text.mlp_ratio)
    total.add("text", encode)
    total.contrast(batch)
    sizes = words, tokens, width, text.mlp_ratio
    if itm or lm:
        total.add("fusion", text.depth * linear(tokens, model.vision.width, 2 * width))
    if itm:
        total.add("fusion", 3 * (text.depth - 1) * cross_layer(*sizes))
        total.add("fusion", 3 * last_cross_layer(*sizes))
    if lm:
        total.add("fusion", text.depth * cross_layer(*sizes))
    if itm:
        total.add("heads", 3 * linear(1, width, 2))
    if lm:
        total.add("heads", guessed * linear(1, width, width + text.vocab_size))
    if "itc" in losses:
        total.teach(encode, whole=False)
    return total.floor()


def _meter(config: Config, batch: int, words: float, guessed: float) -> Floor:
    total, model, losses = _Sum(config), config.model, config.objectives
    text, fusion, width = model.text, model.fusion, model.fusion.width
    itm, mlm = losses.get("itm"), losses.get("mlm")
    passes = (1 if itm else 0) + (1 if mlm else 0)
    tokens = total.see(passes)
    total.add("text", passes * text.depth * layer(words, text.width, text.mlp_ratio))

    def stream(own: float, other: float, last: str) -> float:
        """last: of the last layer guessed words are read, one token, or nothing."""
        sizes = own, other, width, fusion.mlp_ratio
        keys = linear(other, width, 2 * width)
        ends = {
            "words": last_cross_layer(*sizes, guessed) + keys,
            "one": last_cross_layer(*sizes) + keys,
        }
        return (fusion.depth - 1) * (cross_layer(*sizes) + keys) + ends.get(last, 0.0)

    start = linear(words, text.width, width) + linear(tokens, model.vision.width, width)
    matched = start + stream(words, tokens, "one") + stream(tokens, words, "one")
    guessing = start + stream(words, tokens, "words") + stream(tokens, words, "nothing")
    total.add("fusion", (matched if itm else 0.0) + (guessing if mlm else 0.0))
    if itm:  # the poolers
        total.add("fusion", linear(2, width, width))
    if itm:
        total.add("heads", linear(1, 2 * width, 2))
    guess = guessed * linear(1, width, width + text.vocab_size)
    if mlm:
        total.add("heads", guess)
    if mlm and mlm.alpha > 0:
        encode = text.depth * layer(words, text.width, text.mlp_ratio)
        total.teach(encode + guessing + guess)
    return total.floor()


def _clip(config: Config, batch: int, words: float, guessed: float) -> Floor:
    total, model = _Sum(config), config.model
    text = model.text
    total.see(whole=False)
    total.add("text", blocks(text, [words] * text.depth, whole=False))
    total.add("heads", linear(1, model.vision.width + text.width, model.embed_dim))
    total.add("heads", linear(1, model.embed_dim, batch))  # one matrix serves both directions
    if config.pruning.stages and model.guide != "unprojected":  # the text, taken to the images
        total.add("heads", linear(1, model.embed_dim, model.vision.width), backward=0)
    return total.floor()
