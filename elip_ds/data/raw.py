"""Raw data sets: what every source of elip_ds/data/sources has in common.

A source lists its samples cheaply, as Items, and reads one image when it is asked to: listing goes
through the data set once, in one process, reading is shared among many.
"""

import abc
import dataclasses
import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_origin, get_type_hints

import yaml

from elip_ds import registry
from elip_ds.config.shape import check_tree
from elip_ds.data.record import BadSample, Record
from elip_ds.errors import UserError


@dataclass(frozen=True)
class Item:
    """One sample of a raw data set, its image not yet read.

    key: as the source names it, any text.  where: the file that holds the image.
    at: which sample of that file, None where the image is the file.
    captions: as the source has them; empty where read() finds them beside the image.
    meta: serialises to JSON.
    """

    key: str
    where: str
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    at: int | None = None


class RawSource(abc.ABC):
    """A kind of raw data set. Its Config holds what `key=value` words may say."""

    Config: type

    def __init__(self, config: Any) -> None:
        self.config = config

    @abc.abstractmethod
    def items(self) -> Iterator[Item]:
        """All samples, in the same order every time. Raises UserError for files of another form."""

    def read(self, item: Item) -> Record:
        """The sample with its image, in whatever format that is. Raises BadSample."""
        data = read_bytes(item.where)
        return Record(item.key, data, Path(item.where).suffix[1:], item.captions, item.meta)


def open_raw(kind: str, words: Iterable[str]) -> RawSource:
    """words: key=value, for the kind's Config. Raises UserError for what it does not know."""
    source = registry.resolve(registry.SOURCES, kind, "kind")
    hints = get_type_hints(source.Config)
    tree: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not key=value; {kind} knows {', '.join(hints)}")
        tree[name] = _value(text, hints.get(name), f"{kind}.{name}")
    check_tree({kind: tree}, {kind: source.Config})
    return source(source.Config(**tree))


def _value(text: str, hint: Any, key: str) -> Any:
    if hint is str:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text}: the brackets or quotes do not fit") from None
    if get_origin(hint) is list:
        return [str(part) for part in (value if isinstance(value, list) else [value])]
    return value


def settings(source: type[RawSource]) -> str:
    """'files=... images=. ' for a help text: every setting with its default."""
    words = []
    for part in dataclasses.fields(source.Config):
        value = part.default
        if part.default_factory is not dataclasses.MISSING:
            value = "[" + ",".join(part.default_factory()) + "]"
        words.append(f"{part.name}={'...' if value is dataclasses.MISSING else value}")
    return " ".join(words)


# Reading files and what is in them.


def find_files(patterns: Iterable[str], key: str) -> list[Path]:
    """Paths and globs -> files in order. Raises UserError for one that is not there."""
    found: list[Path] = []
    for pattern in map(os.path.expanduser, patterns):
        is_glob = glob.has_magic(pattern) and not os.path.exists(pattern)
        matches = sorted(glob.glob(pattern)) if is_glob else [pattern]
        if not matches:
            raise UserError(f"{key}: no file matches {pattern}")
        found += map(Path, matches)
    for path in found:
        if not path.is_file():
            how = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"{key}: {path} {how}; name a file")
    return found


def find_folder(name: str, key: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}: there is no folder {path}")
    return path


def read_bytes(path: str) -> bytes:
    """A sample's file. Raises BadSample."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BadSample("no such file", "missing") from None
    except (OSError, ValueError) as error:  # a NUL in a path
        raise BadSample(f"cannot be read: {getattr(error, 'strerror', error)}") from None


def read_json(path: Path) -> Any:
    """Raises UserError that names the file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def as_list(value: Any, where: str) -> list[Any]:
    """Raises UserError if it is no list."""
    if not isinstance(value, list):
        has = f", it has {_names(value)}" if isinstance(value, dict) else ""
        raise UserError(f"{where} is {_name(value)}{has}; a list is wanted")
    return value


def field_of(entry: Any, name: str, where: str, kind: type = object) -> Any:
    """entry[name]. Raises UserError that says what is there instead, and where."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {_name(entry)}; an object with {name!r} is wanted")
    if name not in entry:
        raise UserError(f"{where} has no {name!r}; it has {_names(entry)}")
    if not isinstance(entry[name], kind):
        raise UserError(f"{where}: {name!r} is {_name(entry[name])}; wanted is {_NAMES[kind]}")
    return entry[name]


def as_captions(value: Any) -> tuple[str, ...]:
    """A caption or a list of them; what is no text is left out."""
    parts = value if isinstance(value, list) else [value]
    return tuple(part for part in parts if isinstance(part, str))


_NAMES = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


def _name(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), f"a {type(value).__name__}")


def _names(entry: dict[Any, Any]) -> str:
    names = [str(name) for name in entry]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


# Items


def grouped(items: Iterable[Item]) -> Iterator[Item]:
    """One item for each file, at the place of its first: all captions, the first's key and meta."""
    first: dict[str, Item] = {}
    captions: dict[str, list[str]] = {}
    for item in items:
        first.setdefault(item.where, item)
        captions.setdefault(item.where, []).extend(item.captions)
    for where, item in first.items():
        yield dataclasses.replace(item, captions=tuple(captions[where]))


def key_of(path: str) -> str:
    """The last two parts of a path, which mostly are unique: 'train2014_COCO_train2014_000000'."""
    return "_".join(PurePosixPath(path).with_suffix("").parts[-2:])
