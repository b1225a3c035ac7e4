"""Record: one image with its captions, as every source hands it over and every shard stores it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """key: unique within its source, no dot and no slash-leading part (it names the tar members).
    image: encoded bytes.  extension: of the encoding, without the dot ("jpg", "png").
    captions: at least one, raw text as the source has it.
    meta: anything worth keeping that serialises to JSON (licence, objects, questions).
    """

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason, a few words."""
