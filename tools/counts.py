"""What a training step computes and keeps, by part of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("vision", "look-ahead", "teacher", "text", "fusion", "heads")

_entered: list[str] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """What runs inside belongs to this part, unless a part inside says otherwise; the teacher's
    parts are all one.
    """
    _entered.append(name)
    try:
        yield
    finally:
        _entered.pop()


def current_part() -> str:
    """The part that runs now; what is in none are the heads and their losses."""
    if "teacher" in _entered:
        return "teacher"
    return _entered[-1] if _entered else "heads"
