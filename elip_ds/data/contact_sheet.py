"""Samples to look at: pictures with their captions, as one HTML file or one PNG."""

import base64
import html
import io
import random
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from elip_ds.data.decode import decode_image
from elip_ds.data.record import BadSample, BadShard, Record
from elip_ds.data.shards import ShardReader, scan_shard
from elip_ds.errors import UserError

SIDE = 224  # pixels of a thumbnail's longer side
COLUMNS = 5
MOST_CAPTIONS = 5  # of one picture
LETTERS, LINES, LINE_HEIGHT = 36, 8, 14  # of the text below a picture in a PNG

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px/1.35 sans-serif; margin: 1.5em; color: #222; }}
main {{ display: grid; gap: 1.5em; }}
main {{ grid-template-columns: repeat(auto-fill, minmax({side}px, 1fr)); }}
figure {{ margin: 0; overflow-wrap: anywhere; }}
img {{ max-width: 100%; background: #eee; }}
small {{ color: #888; }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
"""


def draw_samples(shards: Sequence[Path], number: int, seed: int = 0) -> list[Record]:
    """Readable samples drawn at random over all shards, in their order; fewer if there are fewer.

    Raises UserError if there is none.
    """
    places: list[tuple[Path, int]] = []
    for path in shards:
        with suppress(BadShard):  # a damaged one, which the inspection names
            places += [(path, i) for i in range(len(scan_shard(path).entries))]
    chosen = sorted(random.Random(seed).sample(range(len(places)), min(number, len(places))))
    records = []
    for path, i in (places[j] for j in chosen):
        with suppress(BadSample):  # likewise
            record = ShardReader(path).read(i)
            decode_image(record.image)
            records.append(record)
    if not records:
        raise UserError(f"--sheet: none of {len(chosen)} samples can be shown")
    return records


def write_sheet(records: Sequence[Record], path: Path, title: str) -> None:
    """path: .html or .png. Raises UserError for another, and if it cannot be written."""
    if path.suffix not in (".html", ".png"):
        raise UserError(f"--sheet {path}: a name that ends in .html or .png")
    try:
        if path.suffix == ".html":
            path.write_text(html_sheet(records, title), encoding="utf-8")
        else:
            png_sheet(records).save(path, "PNG")
    except OSError as error:
        raise UserError(f"--sheet {path}: {error.strerror}") from None


def html_sheet(records: Sequence[Record], title: str) -> str:
    """A page that needs no other file."""
    figures = "\n".join(_figure(record) for record in records)
    return _PAGE.format(title=html.escape(title), side=SIDE, figures=figures)


def _figure(record: Record) -> str:
    buffer = io.BytesIO()
    _thumbnail(record).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    captions = "".join(f"<br>{html.escape(text)}" for text in _captions(record))
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
        f"<figcaption><small>{html.escape(record.key)}</small>{captions}</figcaption></figure>"
    )


def png_sheet(records: Sequence[Record]) -> Image.Image:
    """A grid of cells, COLUMNS wide."""
    cell = (SIDE + 16, SIDE + (LINES + 1) * LINE_HEIGHT + 16)
    rows = -(-len(records) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(records)) * cell[0], rows * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, record in enumerate(records):
        left, top = (i % COLUMNS) * cell[0] + 8, (i // COLUMNS) * cell[1] + 8
        sheet.paste(_thumbnail(record), (left, top))
        lines = [record.key, *(x for text in _captions(record) for x in _wrap(text))]
        for j, line in enumerate(lines[:LINES]):
            colour = "gray" if j == 0 else "black"
            draw.text((left, top + SIDE + 4 + j * LINE_HEIGHT), line, colour, font)
    return sheet


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, LETTERS)


def _captions(record: Record) -> tuple[str, ...]:
    more = len(record.captions) - MOST_CAPTIONS
    rest = (f"... and {more} more",) if more > 0 else ()
    return record.captions[:MOST_CAPTIONS] + rest


def _thumbnail(record: Record) -> Image.Image:
    image = decode_image(record.image)
    image.thumbnail((SIDE, SIDE))
    return image
