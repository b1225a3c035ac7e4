"""A plain tree of settings against the typed classes: the first misfit as one line with its key.

A shape is a type hint, or {name: shape} for a section whose classes are chosen by the settings.
"""

import dataclasses
import difflib
import math
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from elip_ds.errors import UserError

Shape = Any

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_tree(tree: Any, shape: dict[str, Shape]) -> None:
    """Raises UserError unless every setting of the tree exists and is of the kind that it must be.

    A value that refers to others by ${...} passes; OmegaConf checks it once it is known.
    """
    _check_section(tree, shape, "", sorted(_keys(shape)))


def show(value: Any) -> str:
    """A value as one would write it behind key=, cut to one short line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_section(tree: Any, shape: Shape, at: str, known: list[str]) -> None:
    """known: every key there is, to suggest one."""
    fields = _fields(shape)
    names = ", ".join(fields)
    if not isinstance(tree, dict):
        how = f"a section; write {at}.KEY=VALUE, KEY one of {names}"
        if not at or at.endswith("]"):
            how = f"wanted are settings, {{{names}}}"
        raise UserError(f"{at or 'the configuration'}={show(tree)}: {how}")
    for name, value in tree.items():
        key = f"{at}.{name}" if at else str(name)
        if name not in fields:
            raise UserError(f"{key} is not a setting; {_hint(str(name), at, fields, known)}")
        _check(value, fields[name], key, known, _default(shape, name))
    missing = [name for name in fields if name not in tree and _is_needed(shape, name)]
    if missing:
        raise UserError(f"{at}.{missing[0]} is missing; {at} needs {names}")


def _check(value: Any, shape: Shape, key: str, known: list[str], default: Any = None) -> None:
    arms = [arm for arm in _arms(shape) if arm is not NoneType]
    origin, parts = get_origin(arms[0]), get_args(arms[0])
    if shape is Any or (value is None and NoneType in _arms(shape)):
        return
    if _is_section(arms[0]):
        _check_section(value, arms[0], key, known)
    elif _refers(value):
        return
    elif origin is list and isinstance(value, list):
        for i, part in enumerate(value):
            _check(part, parts[0], f"{key}[{i}]", known)
    elif origin is dict and isinstance(value, dict):
        for name, part in value.items():
            _check(part, parts[1], f"{key}.{name}", known)
    elif origin is not None or not _fits(value, arms):
        raise UserError(f"{key}={show(value)}: {_wanted(arms, default)}")


def _fits(value: Any, kinds: list[type]) -> bool:
    """Whether OmegaConf makes a value of one of the kinds of it without changing what it means."""
    if len(kinds) > 1 or isinstance(value, bool):  # it converts nothing for a union
        return type(value) in kinds
    try:
        if kinds[0] is int:
            return isinstance(value, int | str) and abs(int(value)) < 2**63
        if kinds[0] is float:
            return isinstance(value, int | float | str) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
    # A question of three marks is OmegaConf's "no value".
    return kinds[0] is str and isinstance(value, str | int | float) and value != "???"


def _wanted(kinds: list[Shape], default: Any) -> str:
    origin, inner = get_origin(kinds[0]), (get_args(kinds[0]) or (None,))[-1]
    if origin is list and _is_section(inner):
        form = ", ".join(f"{name}: ..." for name in _fields(inner))
        return f"a list is wanted, such as [{{{form}}}]"
    what = " or ".join(
        _WANTED.get(kind, "a list" if origin is list else "a table") for kind in kinds
    )
    example = f", such as {show(default)}" if default and not _refers(default) else ""
    return f"{what} is wanted{example}"


def _refers(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _arms(shape: Shape) -> tuple[Shape, ...]:
    """The types of a union; of another shape itself."""
    return get_args(shape) if get_origin(shape) in (Union, UnionType) else (shape,)


def _is_section(shape: Shape) -> bool:
    return isinstance(shape, dict) or dataclasses.is_dataclass(shape)


def _fields(shape: Shape) -> dict[str, Shape]:
    """name -> shape of a section."""
    return shape if isinstance(shape, dict) else get_type_hints(shape)


def _keys(shape: Shape, at: str = "") -> set[str]:
    """Every section and setting of a section, with its full key."""
    keys = set()
    for name, part in _fields(shape).items():
        full = f"{at}.{name}" if at else name
        keys.add(full)
        for arm in _arms(part):
            keys |= _keys(arm, full) if _is_section(arm) else set()
    return keys


def _default(shape: Shape, name: str) -> Any:
    """What a field is if nothing is said, None when that is unknown or no plain value."""
    for field in () if isinstance(shape, dict) else dataclasses.fields(shape):
        if field.name == name:
            value = field.default
            if field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            plain = isinstance(value, str | int | float | list) and not isinstance(value, bool)
            return value if plain else None
    return None


def _is_needed(shape: Shape, name: str) -> bool:
    if isinstance(shape, dict):
        return False
    field = next(field for field in dataclasses.fields(shape) if field.name == name)
    return field.default is field.default_factory is dataclasses.MISSING


def _hint(name: str, at: str, fields: dict[str, Shape], known: list[str]) -> str:
    """'did you mean X?': the nearest name here, else that name elsewhere, else the nearest key."""
    here = difflib.get_close_matches(name, fields, n=1)
    if here:
        return f"did you mean {at}.{here[0]}?" if at else f"did you mean {here[0]}?"
    near = [key for key in known if key.rpartition(".")[2] == name][:1]
    near = near or difflib.get_close_matches(f"{at}.{name}", known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
