"""Durations in samples or epochs, so that a change of batch size changes no schedule."""

import math
import re

from elip_ds.errors import UserError

_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*(samples?|epochs?)\s*")


def check_duration(key: str, text: str) -> None:
    """Raises UserError with the key unless text reads like '2 epochs' or '640000 samples'."""
    if not _FORM.fullmatch(str(text)):
        raise UserError(f"{key}={text!r}: write a number and a unit, '2 epochs' or '640000 samples'")


def duration_in_samples(text: str, samples_per_epoch: int) -> int:
    """'1.5 epochs' -> samples, rounded to whole ones. text has passed check_duration."""
    match = _FORM.fullmatch(text)
    assert match, text
    number, unit = float(match[1]), match[2]
    return round(number * samples_per_epoch) if unit.startswith("epoch") else math.floor(number)
