"""The built-in scenes as shards on disk: written on first use, by one rank of each node."""

import os
import secrets
import shutil
from pathlib import Path

from elip_ds.config.schema import BuiltinConfig
from elip_ds.data.shards import write_shards
from elip_ds.data.sources.synthetic import scenes
from elip_ds.errors import UserError
from elip_ds.run import Run


def builtin_shards(config: BuiltinConfig, run: Run) -> dict[str, list[Path]]:
    """split -> shards. The folder's name says what is in it, so other sizes live beside it.

    Raises UserError when they cannot be written, or are gone from their folder.
    """
    folder = Path(config.dir) / f"{config.image_size}px-{config.train}-{config.val}"
    if run.first_on_node and not folder.is_dir():
        try:
            write_builtin(config, folder)
        except OSError as error:
            raise UserError(f"data.builtin.dir={config.dir}: {error.strerror}") from None
    run.wait()
    shards = {split: sorted(folder.glob(f"scenes-{split}-*.tar")) for split in ("train", "val")}
    for split, found in shards.items():
        if not found:
            raise UserError(
                f"data.builtin.dir: {folder} lacks its {split} shards; delete the folder, and it "
                "is written anew"
            )
    return shards


def write_builtin(config: BuiltinConfig, folder: Path) -> None:
    """Write both splits; the folder appears when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    partial.mkdir()  # which others may read, as tempfile's may not
    for split, count in (("train", config.train), ("val", config.val)):
        write_shards(scenes(split, count, image_size=config.image_size), partial, f"scenes-{split}")
    try:
        os.rename(partial, folder)
    except OSError:  # another node wrote it meanwhile; the same scenes
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise
