"""Durations in samples or epochs, so that a change of batch size changes no schedule."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from elip_ds.errors import UserError

_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*(samples?|epochs?)\s*")


def check_duration(key: str, text: str, *, above_zero: bool = False) -> None:
    """Raises UserError with the key unless text reads like '2 epochs' or '640000 samples'."""
    match = _FORM.fullmatch(str(text))
    if not match:
        raise UserError(
            f"{key}={text!r}: write a number and a unit, '2 epochs' or '640000 samples'"
        )
    number = float(match[1])
    if not math.isfinite(number):
        raise UserError(f"{key}={text!r} is too long")
    if match[2].startswith("sample") and number % 1:
        raise UserError(f"{key}={text!r}: samples are whole; parts of an epoch may be given")
    if above_zero and number == 0:
        raise UserError(f"{key}={text!r}: more than 0")


def check_ascending(key: str, durations: Sequence[str]) -> None:
    """Raises UserError unless each lies behind the one before it. key: as 'section.list[{}].field'.

    All have passed check_duration. They must have one unit: how many samples an epoch has is not
    known yet when a configuration is read.
    """
    for i, (before, after) in enumerate(pairwise(durations), start=1):
        a, b = (_FORM.fullmatch(str(text)) for text in (before, after))
        assert a and b, durations
        if a[2][0] != b[2][0]:
            raise UserError(
                f"{key.format(i)}={after!r} follows {before!r}: give all of them in samples, or "
                "all in epochs"
            )
        if float(b[1]) <= float(a[1]):
            raise UserError(f"{key.format(i)}={after!r} does not come after {before!r} before it")


def duration_in_samples(text: str, samples_per_epoch: int) -> int:
    """'1.5 epochs' -> whole samples, at least 1 unless it is 0. text has passed check_duration."""
    match = _FORM.fullmatch(text)
    assert match, text
    number = float(match[1])
    if match[2].startswith("epoch"):
        number *= samples_per_epoch
    return max(1, round(number)) if number else 0
