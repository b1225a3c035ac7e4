"""Images and captions from outside a run, prepared as a run prepares its held-out pairs.

B images or captions, L tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elip_ds.config.schema import DataConfig
from elip_ds.data.augment import eval_image
from elip_ds.data.batch import normalise
from elip_ds.data.decode import to_rgb
from elip_ds.data.learn import learn_vocabulary
from elip_ds.data.sources.synthetic import scenes
from elip_ds.data.text import CaptionTokenizer
from elip_ds.data.vocabulary import Vocabulary
from elip_ds.data.vocabulary_files import load_vocabulary
from elip_ds.errors import UserError

SCENES = 500
"Built-in scenes whose captions have every word of theirs."


class Preprocessor:
    """image_size: height, width.  vocabulary: or why there is none, raised when a caption comes."""

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary | UserError,
        image_size: tuple[int, int],
    ) -> None:
        self.image_size, self._resize = image_size, config.resize
        self._vocabulary = vocabulary
        if isinstance(vocabulary, Vocabulary):
            self._tokenizer = CaptionTokenizer(vocabulary, config.text_length)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pillow images of any mode and size -> (B, 3, H, W), fp32, normalised."""
        pixels = [eval_image(to_rgb(image), self.image_size, self._resize) for image in images]
        return normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> input_ids and attention_mask, each (B, L), int64."""
        if isinstance(self._vocabulary, UserError):
            raise self._vocabulary
        ids = np.stack([self._tokenizer(caption) for caption in captions])
        return torch.from_numpy(ids), torch.from_numpy(self._tokenizer.attention_mask(ids))


def named_vocabulary(config: DataConfig, size: int) -> Vocabulary:
    """What data.vocabulary names; for 'auto', what the built-in scenes' captions teach.

    Raises UserError when it is not on this machine.
    """
    if config.vocabulary != "auto":
        return load_vocabulary(config.vocabulary, config.tokenizer, Path(config.root))
    records = scenes("train", SCENES, image_size=config.builtin.image_size)
    return learn_vocabulary(
        (caption for record in records for caption in record.captions), size, config.tokenizer
    )
