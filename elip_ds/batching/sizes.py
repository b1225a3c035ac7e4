"""Bytes as people write and read them."""

import re

from elip_ds.errors import UserError

UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_FACTORS = {unit.lower(): factor for unit, factor in UNITS.items()}


def is_size(text: str) -> bool:
    """Whether it reads as a number and a unit, known or not."""
    return _split(text) is not None


def parse_bytes(text: str, key: str) -> int:
    """'24GiB', '512 MB', '1.5gib': a number and a unit of UNITS, in any case.

    key: what the value was given for, named in the UserError.  A bare number is refused: 24 would
    be bytes to us and gibibytes to whoever wrote it.
    """
    parts = _split(text)
    if parts is None or parts[1] not in _FACTORS:
        raise UserError(
            f"{key}={text!r} is not a size: a number and one of {', '.join(UNITS)}, such as 24GiB"
        )
    number, unit = parts
    return int(number * _FACTORS[unit])


def show_bytes(count: float) -> str:
    """'23.70 GiB', below one GiB '512.0 MiB'."""
    if abs(count) < 2**30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"


def _split(text: str) -> tuple[float, str] | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    return (float(found[1]), found[2]) if found else None
