"""data.vocabulary -> a vocabulary: from a file, or a published one by its name, found on this
machine. Nothing is downloaded."""

import gzip
import importlib.util
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from elip_ds.data.vocabulary import KINDS, WORD_END, Entries, Vocabulary, parse_tokenizer
from elip_ds.errors import UserError

CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
CLIP_NUM_MERGES = 49152 - 256 - 2
"Of the merges in that file CLIP uses the first so many."
RENAMED = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}
"OpenAI's and Hugging Face's names for what open_clip calls otherwise."


class Published(NamedTuple):
    """repos: on the Hugging Face hub, all with this vocabulary.  files: the fewest of it to have.
    sizes: data.tokenizer -> entries.  package: an installed package that may hold it.
    """

    repos: tuple[str, ...]
    files: tuple[str, ...]
    sizes: dict[str, int]
    package: str | None = None


PUBLISHED = {
    "bert-base-uncased": Published(
        ("google-bert/bert-base-uncased", "bert-base-uncased"),
        ("vocab.txt",),
        {"albef": 30522, "bert": 30522, "blip": 30524},
    ),
    "roberta-base": Published(
        ("FacebookAI/roberta-base", "roberta-base"),
        ("vocab.json", "merges.txt"),
        {"roberta": 50265},
    ),
    "clip": Published(
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16"),
        ("vocab.json", "merges.txt"),
        {"clip": 49408},
        package="open_clip",
    ),
}

_MODELS = {
    "wordpiece": "a WordPiece vocabulary",
    "bytes": "a byte-level BPE vocabulary as RoBERTa's",
    "clip": "a BPE vocabulary as CLIP's",
}
_WANTED = {
    "wordpiece": "vocab.txt or tokenizer.json",
    "bytes": "vocab.json with merges.txt, or tokenizer.json",
    "clip": f"{CLIP_MERGES}, vocab.json with merges.txt, or tokenizer.json",
}


def load_vocabulary(name: str, kind: str, root: Path) -> Vocabulary:
    """name: a file, a folder, or a published name.  root: data.root.  kind: data.tokenizer.

    Raises UserError when it is not there, or not what its name or kind says.
    """
    published = PUBLISHED.get(name)
    if published and kind not in published.sizes:
        raise UserError(
            f"data.vocabulary={name} is not for data.tokenizer={kind}; set data.vocabulary="
            f"{_published_for(kind)}, or data.tokenizer={' or '.join(published.sizes)}"
        )
    path = find_published(name, root) if published else Path(name).expanduser()
    where = f"data.vocabulary={name}" + (f": {path}" if published else "")
    model = KINDS[kind].model
    try:
        entries = read_entries(path)
        if entries.model != model:
            raise UserError(f"it is {_MODELS[entries.model]}; set data.tokenizer to its kind")
        vocabulary = _build(kind, entries)
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise UserError(
            f"{where}: {reason}; data.tokenizer={kind} takes {_WANTED[model]}, the name "
            f"{_published_for(kind)}, or 'auto' to learn one from the training captions"
        ) from None
    if published and len(vocabulary) != published.sizes[kind]:
        raise UserError(
            f"{where} has {len(vocabulary)} entries, the published one {published.sizes[kind]}; "
            "replace the file, or give it as data.vocabulary=PATH"
        )
    return vocabulary


def _published_for(kind: str) -> str:
    return next(name for name, published in PUBLISHED.items() if kind in published.sizes)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"it cannot be read as one ({error})"


def _build(kind: str, entries: Entries) -> Vocabulary:
    ids = dict(entries.ids)
    if kind == "clip":
        ids = {RENAMED.get(entry, entry): i for entry, i in ids.items()}
    for entry in KINDS[kind].added:
        ids.setdefault(entry, len(ids))
    return Vocabulary(kind, ids, entries.merges)


def read_entries(path: Path) -> Entries:
    """A vocabulary file of any kind, or a folder with one.

    Raises OSError when it is not there, ValueError, LookupError or the like when it is broken.
    """
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(".gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = _parse_merges(file.read())[:CLIP_NUM_MERGES]
        return Entries("clip", Vocabulary.of_merges(merges, "clip").ids, merges)
    if path.name in ("vocab.json", "merges.txt"):
        ids = json.loads(path.with_name("vocab.json").read_text(encoding="utf-8"))
        merges = _parse_merges(path.with_name("merges.txt").read_text(encoding="utf-8"))
        model = "clip" if f"!{WORD_END}" in ids else "bytes"
        return Entries(model, ids, merges)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return parse_tokenizer(text)
    words = text.removesuffix("\n").split("\n")  # splitlines() would split inside some entries
    return Entries("wordpiece", {word: i for i, word in enumerate(words)})


def _parse_merges(text: str) -> tuple[tuple[str, str], ...]:
    """Two entries a line, behind a line that names the version."""
    lines = text.split("\n")
    start = 1 if "#version" in lines[0] else 0
    return tuple((a, b) for a, b in (line.split() for line in lines[start:] if line.strip()))


def _file_in(folder: Path) -> Path:
    """The vocabulary file of a folder. Raises UserError when there is none."""
    for names in (
        ("vocab.txt",),
        ("vocab.json", "merges.txt"),
        (CLIP_MERGES,),
        ("tokenizer.json",),
    ):
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    raise UserError("there is no vocabulary file in this folder")


def find_published(name: str, root: Path) -> Path:
    """Where a published vocabulary lies on this machine. Raises UserError when it lies nowhere."""
    published = PUBLISHED[name]
    own = root / "vocabularies" / name
    cache = _hub_cache()
    folders = [own]
    if published.package:
        spec = importlib.util.find_spec(published.package)
        folders += [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    for repo in published.repos:
        folders += sorted(cache.glob(f"models--{repo.replace('/', '--')}/snapshots/*"))
    for folder in folders:
        try:
            return _file_in(folder)
        except UserError:
            continue
    files = " and ".join(published.files)
    package = f", package {published.package}" if published.package else ""
    raise UserError(
        f"data.vocabulary={name} is not on this machine, neither in {own} nor in {cache}{package}; "
        f"place {files} in the first, or run: huggingface-cli download {published.repos[0]} "
        f"{' '.join(published.files)}"
    )


def _hub_cache() -> Path:
    """Hugging Face's folder of downloaded repositories."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"
