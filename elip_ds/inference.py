"""Features for those who want no more than features: load a model, encode, match.

In: a run, a checkpoint, converted or published weights, or the name of a preset.  Out: features of
images and texts, and whether they belong together. Neither DeepSpeed nor a configuration is needed.

B images or texts, L text tokens, E joint space.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from elip_ds import registry
from elip_ds.config import Config, config_for_model, load_config, read_config
from elip_ds.data import Preprocessor, Vocabulary, named_vocabulary, read_vocabulary
from elip_ds.errors import UserError
from elip_ds.models import ImageFeatures, TextFeatures
from elip_ds.run import CONFIG, TOKENIZER, find_checkpoint
from elip_ds.tasks import match
from elip_ds.weights import Source, open_source

HEAD = "objectives.itm.head."


class LanguageImageModel:
    """A model with the transform and the tokenizer that belong to it.

    model: in evaluation mode, without gradients.  head: reads a fused pair; None where the weights
    hold no such head, or the model fuses nothing.
    transform: Pillow images -> (B, 3, H, W).  tokenize: captions -> input_ids, attention_mask.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear | None,
        preprocessor: Preprocessor,
        device: torch.device,
    ) -> None:
        # Any, because to a type checker every attribute of an nn.Module may be a tensor.
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.head = head and head.to(device).eval().requires_grad_(False)
        self.device = device
        self.transform, self.tokenize = preprocessor.images, preprocessor.texts

    @torch.no_grad()
    def encode_image(
        self, images: Sequence[Image.Image] | Tensor, text: Sequence[str] | None = None
    ) -> ImageFeatures:
        """image_feat (B, E) is what to compare; image_embeds are all tokens.

        images: Pillow images, or (B, 3, H, W) as transform gives them.
        text: a caption for each, which then guides the pruning; None: no token is pruned.
        """
        guide = None if text is None else self.encode_text(text)
        return self.model.encode_image(self._pixels(images), guide)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> TextFeatures:
        """text_feat (B, E) is what to compare; text_embeds (B, L, D) are all tokens."""
        input_ids, attention_mask = self.tokenize(texts)
        return self.model.encode_text(input_ids.to(self.device), attention_mask.to(self.device))

    @torch.no_grad()
    def match(self, images: Sequence[Image.Image] | Tensor, texts: Sequence[str]) -> Tensor:
        """(B,): does text i belong to image i? Higher is likelier.

        The matching head's logit; of a model that has none, the cosine in the joint space.
        Raises UserError when there are not as many texts as images.
        """
        pixels = self._pixels(images)
        if len(pixels) != len(texts):
            raise UserError(f"{len(pixels)} images, {len(texts)} texts: a text for each is wanted")
        if self.head is None and "joint_space" not in self.model.gives:
            raise UserError("these weights hold no matching head (objectives.itm.head)")
        return match(self.model, self.head, pixels, self.encode_text(texts))

    def _pixels(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        pixels = images if isinstance(images, Tensor) else self.transform(images)
        return pixels.to(self.device)


def load(
    source: str | Path, *, vocabulary: str | Path | None = None, device: str | None = None
) -> LanguageImageModel:
    """source: a run's folder, a checkpoint of one, a file that tools/convert_weights.py wrote, a
    published file as it is, or the name of a preset, whose weights are then random.

    vocabulary: a file, or a name as in data.vocabulary; None: the one that the source keeps or its
    preset names.  device: None: the accelerator if there is one, else the CPU.
    Raises UserError for anything that cannot be read, or lacks weights.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    chosen = found if device is None else torch.device(device)
    path, weights = Path(source), None
    if path.is_dir():
        path = find_checkpoint(path)
    if path.exists():
        weights = open_source(path)
        weights.report.check()
        config = _config_of(path, weights)
    else:
        try:
            config = load_config([f"preset={source}"])
        except UserError as error:
            raise UserError(f"{source} is no file or folder, and as a preset: {error}") from None
    if vocabulary is not None:
        data = dataclasses.replace(config.data, vocabulary=str(vocabulary))
        config = dataclasses.replace(config, data=data)
    kept = path / TOKENIZER if vocabulary is None else None
    words = read_vocabulary(kept) if kept and kept.is_file() else _find_vocabulary(config)
    torch.manual_seed(config.run.seed)
    build_model = registry.resolve(registry.MODELS, config.model.name, "model.name")
    model = build_model(config.model, config.pruning)
    head = _fill(path, model, weights) if weights else None
    preprocessor = Preprocessor(config.data, words, config.model.vision.pixels)
    return LanguageImageModel(model, head, preprocessor, chosen or torch.device("cpu"))


def _config_of(path: Path, weights: Source) -> Config:
    """A checkpoint keeps its configuration; of other files only the model is known."""
    if (path / CONFIG).is_file():
        return read_config(path / CONFIG)
    if weights.model is None or weights.tree is None:
        raise UserError(f"{path} holds a part of a model; load() wants a whole one")
    return config_for_model(weights.tree)


def _find_vocabulary(config: Config) -> Vocabulary | UserError:
    """Images can be encoded without one."""
    try:
        return named_vocabulary(config.data, config.model.text.vocab_size)
    except UserError as error:
        return error


def _fill(path: Path, model: nn.Module, weights: Source) -> nn.Linear | None:
    """Copy weights into a model; returns the matching head, if they have one."""
    state = {
        name.removeprefix("model."): weight.read()
        for name, weight in weights.weights.items()
        if name.startswith("model.")
    }
    missing = sorted(model.state_dict().keys() - state)
    if missing:
        raise UserError(f"{path} lacks model.{missing[0]} ({len(missing)} in all)")
    model.load_state_dict(state)
    if f"{HEAD}weight" not in weights.weights:
        return None
    parts = [weights.weights[f"{HEAD}{part}"].read() for part in ("weight", "bias")]
    head = nn.Linear(parts[0].shape[1], 2)
    head.load_state_dict(dict(zip(("weight", "bias"), parts, strict=True)))
    return head
