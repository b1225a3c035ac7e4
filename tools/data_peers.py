"""Two ways in which others feed such models, to compare our loader with: the samples of the
webdataset package's plain pipeline, and of a json list and image files as ALBEF's code reads them.

Both decode with Pillow, transform with torchvision, tokenize in the worker and hand over normalised
floats. RandAugment, where the configuration has it, is ours.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from elip_ds.config.schema import DataConfig
from elip_ds.data.augment import MEAN, STD
from elip_ds.data.corpus import Source
from elip_ds.data.rand_augment import rand_augment
from elip_ds.data.shards import ShardReader
from elip_ds.data.text import CaptionTokenizer
from elip_ds.errors import UserError

SHUFFLED = 1000
"Samples in webdataset's buffer."
PASSES = 10**6
"Over the samples: as many as are asked for."


class Ours:
    """RandAugment as a torchvision transform."""

    def __init__(self, config: DataConfig) -> None:
        self._changes, self._rng = config.rand_augment, np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> Image.Image:
        assert self._changes is not None
        pixels = rand_augment(np.asarray(image), self._rng, **vars(self._changes))
        return Image.fromarray(pixels)


def transforms(config: DataConfig, size: tuple[int, int]) -> Any:
    """The published transforms of the configuration. Raises UserError without torchvision."""
    try:
        from torchvision import transforms as tv
    except ImportError:
        raise UserError("the peers need torchvision: pip install 'elip_ds[tools]'") from None
    bicubic, changes = tv.InterpolationMode.BICUBIC, config.rand_augment
    steps: list[Any] = []
    if config.crop_scale is not None:
        steps.append(tv.RandomResizedCrop(size, tuple(config.crop_scale), interpolation=bicubic))
    elif config.resize == "squash":
        steps.append(tv.Resize(size, bicubic))
    else:
        steps += [tv.Resize(min(size), bicubic), tv.CenterCrop(size)]
    if config.flip:
        steps.append(tv.RandomHorizontalFlip())
    if changes is not None:
        steps.insert(0 if changes.kind == "meter" else len(steps), Ours(config))
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(MEAN, STD)])


class JsonDataset(Dataset):
    """A list of {image, caption}, caption being a string or several, and the files it names."""

    def __init__(self, path: Path, transform: Any, tokenizer: CaptionTokenizer) -> None:
        self._entries = json.loads(path.read_text())
        self._transform, self._tokenizer = transform, tokenizer

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        entry = self._entries[i]
        image = self._transform(Image.open(entry["image"]).convert("RGB"))
        caption = entry["caption"]
        caption = random.choice(caption) if isinstance(caption, list) else caption
        return image, torch.from_numpy(self._tokenizer(caption))


def json_loader(
    path: Path, transform: Any, tokenizer: CaptionTokenizer, batch_size: int
) -> DataLoader:
    """With one worker, without an end."""
    dataset = JsonDataset(path, transform, tokenizer)
    sampler = RandomSampler(dataset, num_samples=PASSES * len(dataset))
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=1)


def webdataset_loader(
    shards: Sequence[Path], transform: Any, tokenizer: CaptionTokenizer, batch_size: int
) -> DataLoader:
    """With one worker, without an end."""
    names = [str(path) for path in shards]
    pipeline = (
        webdataset.WebDataset(names, shardshuffle=len(names), seed=0)
        .shuffle(SHUFFLED)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "txt")
        .map_tuple(transform, lambda caption: torch.from_numpy(tokenizer(caption)))
        .batched(batch_size, partial=False)
        .repeat(PASSES)
    )
    return DataLoader(pipeline, batch_size=None, num_workers=1)


def write_files(sources: Sequence[Source], folder: Path) -> Path:
    """The samples of the shards as image files, and the json list of them, which it returns."""
    entries = []
    for i, source in enumerate(sources):
        for path in map(Path, source.shards):
            reader = ShardReader(path)
            for at in range(len(reader)):
                record = reader.read(at)
                image = (
                    folder / f"{i}-{path.stem}-{record.key.replace('/', '-')}.{record.extension}"
                )
                image.write_bytes(record.image)
                caption = list(record.captions)
                entries.append({"image": str(image), "caption": caption})
    listed = folder / "train.json"
    listed.write_text(json.dumps(entries))
    return listed
