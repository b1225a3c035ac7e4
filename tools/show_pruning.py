"""Draw what pruning kept and merged: one PNG per image and stage, and a table.

Draws the first held-out pairs, each image pruned by its own caption. Kept patches stay clear,
merged ones go dark, the darker the less of them is in their merged token. Stages count from 1. A
merged token may survive a later stage in a patch's place, so images may keep different numbers of
patches.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from elip_ds import registry
from elip_ds.config import Config, read_config
from elip_ds.data import Batch, read_vocabulary
from elip_ds.data.augment import eval_image
from elip_ds.data.corpus import build_fetcher
from elip_ds.data.decode import decode_image
from elip_ds.data.record import BadSample, Record
from elip_ds.data.shards import ShardReader, expand_shards
from elip_ds.data.sources.synthetic import scenes
from elip_ds.data.text import CaptionTokenizer
from elip_ds.engine import load_weights
from elip_ds.errors import UserError, exit_with
from elip_ds.run import find_checkpoint
from elip_ds.tasks import build_pretrain
from elip_ds.towers import KeepIndex
from elip_ds.towers.pruning import settled

PICTURE = 320
"Smallest side of a drawn image, pixels."
TINT = (0, 0, 70)
"What a merged patch fades to, RGB."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    config, models, tokenizer = load_models(checkpoint)
    out = make_folder(args.out or args.checkpoint / "pruning")
    shown = []
    for record, image in islice(read_pairs(config, args.shards), args.count):
        caption, stages = record.captions[0], []
        batch = make_batch(image, caption, config.model.vision.pixels, tokenizer)
        for number, keep in enumerate(prune_by_stage(models, batch), start=1):
            light = brightness(keep)
            kept = int((light == 1).sum())
            merged = len(light) - kept
            at = config.pruning.stages[number - 1].layer
            title = f"stage {number}, before block {at}: {kept} patches kept, {merged} merged"
            file = out / f"{record.key.replace('/', '_')}-stage{number}.png"
            draw(image, light, [title, caption]).save(file)
            stages.append({"stage": number, "kept": kept, "merged": merged, "file": str(file)})
        shown.append({"image": record.key, "caption": caption, "stages": stages})
    if not shown:
        raise UserError("there is nothing to show: not one sample of the shards can be used")
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint), "images": shown}))
    else:
        print_table(shown, out)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="show_pruning.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder, or step-..."
    )
    parser.add_argument("--shards", metavar="PATTERN", help="other pairs than the held-out ones")
    parser.add_argument("--count", type=int, default=4, help="how many images; default 4")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="default: RUN_OR_CHECKPOINT/pruning"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count {args.count}: 1 or more")
    return args


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be made: {error.strerror}") from None
    return path


def load_models(checkpoint: Path) -> tuple[Config, list[Any], CaptionTokenizer]:
    """The model once per stage s, with the first s stages only, all on the same weights.

    A later stage changes nothing before it, so the short schedules show exactly what the whole one
    does on its way.
    """
    config = read_config(checkpoint / "config.yaml")
    config = dataclasses.replace(config, pruning=settled(config.pruning))
    stages = config.pruning.stages
    if not stages:
        raise UserError(f"{checkpoint} was trained with pruning.stages=[]: nothing to show")
    vocabulary = read_vocabulary(checkpoint / "tokenizer.json")
    task = build_pretrain(config, vocabulary)
    load_weights(checkpoint, task)
    build = registry.resolve(registry.MODELS, config.model.name, "model.name")
    models = []
    for number in range(1, len(stages) + 1):
        pruning = dataclasses.replace(config.pruning, stages=stages[:number])
        model = build(config.model, pruning)
        model.load_state_dict(task.model.state_dict(), assign=True)
        models.append(model.eval())
    return config, models, CaptionTokenizer(vocabulary, config.data.text_length)


def read_pairs(config: Config, shards: str | None) -> Iterator[tuple[Record, Image.Image]]:
    """Held-out records in order, with their images; what cannot be used is named on stderr."""
    fetcher = build_fetcher(config.data)
    patterns = [shards] if shards else [entry.shards for entry in config.data.val]
    for pattern in patterns:
        if pattern == "builtin":  # drawn anew: the same, wherever the run kept its shards
            builtin = config.data.builtin
            for record in scenes("val", builtin.val, image_size=builtin.image_size):
                yield record, decode_image(record.image)
            continue
        for path in expand_shards(pattern, "--shards" if shards else "data.val"):
            reader = ShardReader(fetcher.local(path))
            for i in range(len(reader)):
                try:
                    record = reader.read(i)
                    image = decode_image(record.image)
                except BadSample as error:
                    print(f"skipped {reader.key(i)} of {path}: {error}", file=sys.stderr)
                else:
                    yield record, image
            reader.close()


def make_batch(
    image: Image.Image, caption: str, size: tuple[int, int], tokenizer: CaptionTokenizer
) -> Batch:
    """A batch of one, as a held-out pair comes to the model."""
    ids = tokenizer(caption)[None]
    return Batch(
        images=torch.from_numpy(eval_image(image, size)).permute(2, 0, 1)[None],
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(tokenizer.attention_mask(ids)),
        sample_key=torch.zeros(1, dtype=torch.int64),
    ).to(torch.device("cpu"), torch.float32)


@torch.inference_mode()
def prune_by_stage(models: list[Any], batch: Batch) -> list[KeepIndex]:
    """What pruning has done to the image after each stage."""
    guide = models[0].encode_text(batch.input_ids, batch.attention_mask)
    return [model.encode_image(batch.images, guide).keep for model in models]


def brightness(keep: KeepIndex) -> np.ndarray:
    """How bright to draw each patch of the one image, (N,): 1 if kept, else 0.1 to 0.5.

    Within a merged token the patch with the largest share gets 0.5.
    """
    owner, share, origin = keep.owner[0], keep.share[0], keep.origin[0]
    largest = torch.zeros(len(origin)).scatter_reduce(0, owner, share, "amax")
    part = share / largest[owner].clamp_min(1e-12)
    return torch.where(origin[owner] >= 0, 1.0, 0.1 + 0.4 * part).numpy()


def draw(image: Image.Image, light: np.ndarray, lines: list[str]) -> Image.Image:
    """The image as the model sees it, square, its patches as bright as light (N,) says.

    The light that is lost turns blue, so that a merged patch shows on black as well.
    """
    grid = math.isqrt(len(light))
    cell = -(-PICTURE // grid)
    side = grid * cell
    light = light.reshape(grid, grid).repeat(cell, 0).repeat(cell, 1)[..., None]
    pixels = eval_image(image, (side, side)) * light + np.array(TINT) * (1 - light)
    font = ImageFont.load_default(size=13)
    text = "\n".join(row for line in lines for row in wrap(line, font, side - 8))
    height = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)[3]
    canvas = Image.new("RGB", (side, side + int(height) + 12), "white")
    canvas.paste(Image.fromarray(pixels.astype(np.uint8)))
    ImageDraw.Draw(canvas).multiline_text((4, side + 4), text, "black", font)
    return canvas


def wrap(line: str, font: Any, width: int) -> list[str]:
    """Rows no wider than width pixels, broken between words."""
    rows = [""]
    for word in line.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def print_table(shown: list[dict[str, Any]], out: Path) -> None:
    table = Table("image", "stage", "kept", "merged")
    for image in shown:
        for i, stage in enumerate(image["stages"]):
            table.add_row(
                image["image"] if i == 0 else "",
                *(str(stage[k]) for k in ("stage", "kept", "merged")),
            )
    console = Console()
    console.print(table)
    console.print(f"drawn in {out}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
