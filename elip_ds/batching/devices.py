"""Devices that a plan knows by name, and those that are given by their memory alone."""

import re
from dataclasses import dataclass

from elip_ds.batching.sizes import is_size, parse_bytes
from elip_ds.errors import UserError

GIB = 2**30
OUTSIDE_BYTES = int(1.6 * GIB)
"Of a GPU, out of the allocator's sight: context, communicators, library workspaces. Not measured."
KAPPA = 1.08
"What the allocator reserves for each byte that a plan counts. Not measured."

USABLE_GIB = {
    # What the driver reports as total, which is less than what is printed on the box; rounded down.
    "A5000": 23.7,
    "RTX 4090": 23.6,
    "V100-16": 15.7,
    "V100-32": 31.7,
    "A100-40": 39.5,
    "A100-80": 79.1,
    "H100": 79.1,
    "H100 NVL": 93.5,
    "H200": 139.8,
    "MI250": 63.9,  # one of its two dies: each is a device of its own
}
ALIASES = {"h10080": "H100", "h200141": "H200", "h200nvl": "H200", "mi250x": "MI250"}
# Left out of what was asked, so that the driver's own names do: "NVIDIA A100-SXM4-80GB".
_DECORATION = re.compile(
    r"nvidia|geforce|tesla|amd|instinct|rtx|sxm\d?|pcie|hbm\d?e?|(?<=\d)gi?b?\b|[^a-z0-9]"
)


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of where a rank runs.

    memory_bytes: usable, all of it.  outside_bytes: of these, what no plan counts.  kappa: bytes
    taken for each byte that the plan counts.  tested: whether the figures were measured on such a
    device; otherwise a plan that no probe confirmed keeps a larger reserve.
    """

    name: str
    memory_bytes: int
    outside_bytes: int
    kappa: float
    tested: bool


def find_device(text: str, key: str = "batching.device_memory") -> Device:
    """'a5000', 'A100 80GB', the driver's own name; '24GiB' a GPU of that size; 'cpu:16GiB'.

    Raises UserError, which lists the known ones.
    """
    if text.lower().startswith("cpu:"):
        return Device(text, parse_bytes(text[4:], key), outside_bytes=0, kappa=1.0, tested=False)
    if is_size(text) and _plain(text) not in _NAMES:
        return _gpu(text, parse_bytes(text, key))
    name = _NAMES.get(_plain(text))
    if name is None:
        raise UserError(
            f"{key}={text!r} is no device that is known: {', '.join(USABLE_GIB)}; "
            "a size such as 24GiB or cpu:16GiB does as well"
        )
    return _gpu(name, int(USABLE_GIB[name] * GIB))


def _gpu(name: str, memory_bytes: int) -> Device:
    return Device(name, memory_bytes, OUTSIDE_BYTES, KAPPA, tested=False)


def _plain(text: str) -> str:
    return _DECORATION.sub("", text.lower())


_NAMES = {_plain(name): name for name in USABLE_GIB} | ALIASES
