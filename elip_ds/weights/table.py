"""Two-way tables of weight names: one rule per kind of tensor, read in either direction.

A rule pairs a name of ours with what a published file calls it, and, where the two are laid out
differently, with a change of shape that can be undone. `{i}` stands for the number of a layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from elip_ds.errors import UserError


class Weight(NamedTuple):
    """A tensor that read() will give."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Form(NamedTuple):
    """A change of shape and its inverse."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.t(), lambda x: x.t())
BATCHED = Form(lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))
CLASS_TOKEN = Form(lambda x: x.reshape(1, 1, -1), lambda x: x.reshape(-1))
SCALAR = Form(lambda x: x.reshape(1), lambda x: x.reshape(()))
COUNTER = Form(lambda x: x.reshape(()), lambda x: x.reshape(1))

Names = str | Sequence[str]


@dataclass(frozen=True)
class Rule:
    """ours: the name here.  theirs: the names there; each entry is one place where the tensor is
    stored, as the names whose tensors lie above each other. All entries hold the same values.
    """

    ours: str
    theirs: tuple[tuple[str, ...], ...]
    form: Form = SAME

    def at(self, number: str) -> "Rule":
        """The rule of one layer."""
        places = tuple(tuple(n.replace("{i}", number) for n in place) for place in self.theirs)
        return Rule(self.ours.replace("{i}", number), places, self.form)


def rule(ours: str, *theirs: Names, form: Form = SAME) -> Rule:
    places = tuple((t,) if isinstance(t, str) else tuple(t) for t in theirs)
    return Rule(ours, places, form)


def linear(ours: str, *theirs: Names) -> list[Rule]:
    """The weight and the bias of a linear layer, a convolution or a norm."""
    places = [(t,) if isinstance(t, str) else tuple(t) for t in theirs]
    return [
        rule(f"{ours}.{end}", *(tuple(f"{name}.{end}" for name in place) for place in places))
        for end in ("weight", "bias")
    ]


@dataclass(frozen=True)
class Family:
    """A published way of naming. Patterns are regular expressions that must match a whole name.

    title: for people.  model: the model it holds, by its registered name; None: a part of one.
    recognise: the names of a file -> what tells this family by them, empty if it is another.
    tidy: spelling variants -> the table's names.
    ignored: their names that have no counterpart here, and why; they may be there.
    refused: their names that make a file one that cannot be read, and why.
    optional: beginnings of our names; all that begin so may be absent together.
    dropped: our names that have no counterpart there, and why.
    filled: rules that only export uses, for what the published file holds twice; written if a
    teacher is.
    wrap: the key that the published pickle keeps its weights under; None: none.
    """

    title: str
    model: str | None
    recognise: Callable[[set[str]], str]
    rules: tuple[Rule, ...]
    tidy: Callable[[str], str] = str
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[Rule, ...] = ()
    wrap: str | None = None


def general(name: str) -> tuple[str, str]:
    """A name -> the same with {i} for its first number, and that number, empty if there is none."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, ""
    return f"{name[: found.start(1)]}{{i}}{name[found.end(1) :]}", found[1]


def reason(name: str, patterns: Mapping[str, str]) -> str | None:
    """What the first pattern that matches the name says."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)


class Match(NamedTuple):
    """made: each name on the far side, its rule, and the tensor.  missing: names without which a
    stack is incomplete.  left_over: names that no rule reads.
    """

    made: dict[str, tuple[Rule, Weight]]
    missing: list[str]
    left_over: list[str]


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Tensor], source: object = "the file"
) -> Match:
    """Published names and tensors -> ours, floats as fp32. Nothing is read before it is asked for.

    source: to speak of.
    Raises UserError for tensors that cannot be stacked; reading does when two that must be one
    differ.
    """
    numbers: dict[str, set[str]] = {}
    for name in theirs:
        pattern, number = general(name)
        numbers.setdefault(pattern, set()).add(number)
    made: dict[str, tuple[Rule, Weight]] = {}
    missing: list[str] = []
    used: set[str] = set()
    for each in rules:
        parts = {name for place in each.theirs for name in place}
        for number in sorted(set().union(*(numbers.get(name, ()) for name in parts))):
            here = each.at(number)
            whole = [place for place in here.theirs if all(name in theirs for name in place)]
            for place in here.theirs:
                used.update(place)
                if place not in whole and any(name in theirs for name in place):
                    missing += [name for name in place if name not in theirs]
            if whole:
                made[here.ours] = here, _weight(here, whole, theirs, source)
    return Match(made, missing, sorted(theirs.keys() - used))


def _weight(
    here: Rule, places: list[tuple[str, ...]], theirs: Mapping[str, Tensor], source: object
) -> Weight:
    flat = [torch.empty_like(theirs[name], device="meta") for name in places[0]]
    try:
        shape = tuple(here.form.to_ours(_stack(flat)).shape)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(theirs[name].shape)}" for name in places[0])
        raise UserError(f"{source}: {shapes} do not make {here.ours}") from None
    dtype = torch.float32 if flat[0].is_floating_point() else flat[0].dtype
    return Weight(shape, dtype, partial(_read, here, places, theirs, source))


def _read(
    here: Rule, places: list[tuple[str, ...]], theirs: Mapping[str, Tensor], source: object
) -> Tensor:
    for place in places[1:]:
        for first, other in zip(places[0], place, strict=True):
            if not torch.equal(theirs[first], theirs[other]):
                raise UserError(
                    f"{source}: {first} and {other} differ, but here they are one tensor"
                )
    value = here.form.to_ours(_stack([theirs[name] for name in places[0]]))
    return value.float() if value.is_floating_point() else value


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Weight]) -> Match:
    """The inverse: our names and tensors -> published ones, in every place where they are kept."""
    known: dict[str, Rule] = {each.ours: each for each in rules}
    made: dict[str, tuple[Rule, Weight]] = {}
    left_over = []
    for name, weight in ours.items():
        pattern, number = general(name)
        if pattern not in known:
            left_over.append(name)
            continue
        here = known[pattern].at(number)
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        for place in here.theirs:
            for i, their_name in enumerate(place):
                cut = partial(_cut, here, i, len(place))
                shape = tuple(cut(empty).shape)
                read = partial(lambda cut, weight: cut(weight.read()), cut, weight)
                made[their_name] = here, Weight(shape, weight.dtype, read)
    return Match(made, [], left_over)


def _cut(here: Rule, i: int, count: int, value: Tensor) -> Tensor:
    value = here.form.to_theirs(value)
    return value if count == 1 else value.chunk(count)[i]


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Tensors as they are."""
    return {
        name: Weight(tuple(tensor.shape), tensor.dtype, partial(lambda x: x, tensor))
        for name, tensor in tensors.items()
    }
