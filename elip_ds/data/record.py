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


KINDS = (
    "decode",  # the image is damaged, or of no known format
    "size",  # the image is too large to decode, or too small to mean anything
    "image",  # there is none
    "caption",  # there is none with a word in it
    "json",
    "truncated",  # the shard ends before the sample does
    "missing",  # the shard is gone
    "slow",  # reading took longer than the limit
    "unreadable",  # the system says why
)
"The reasons that metrics tell apart."
PASSING = ("missing", "slow", "unreadable")
"Those that a file server, or a node without its mount, is to blame for."


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason, a few words. kind: one of KINDS."""

    def __init__(self, reason: str, kind: str = "decode") -> None:
        super().__init__(reason)
        assert kind in KINDS, kind
        self.kind = kind


class BadShard(BadSample):
    """None of the samples of a shard can be read, now at least."""
