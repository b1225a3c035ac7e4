"""Anything that holds weights -> the same weights under our names, checked against a model.

Names are those of a task: model.*, objectives.*, teacher.*, and for what is no parameter
itc.image_queue and the like.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from elip_ds import registry
from elip_ds.config import read_config
from elip_ds.errors import UserError
from elip_ds.run import CONFIG, STATE, WEIGHTS, find_checkpoint
from elip_ds.weights.container import Container, read_container
from elip_ds.weights.report import Report
from elip_ds.weights.sizes import (
    CORE,
    Shapes,
    Tree,
    from_metadata,
    infer,
    tree_shapes,
)
from elip_ds.weights.table import (
    Family,
    Match,
    Weight,
    general,
    plain,
    reason,
    to_ours,
    to_theirs,
)


@dataclass(frozen=True)
class Source:
    """family: the registered table it was read by; for our own what it was converted from, or ''.
    model: registered name of the model, None: a part of one, or unknown.
    tree: of the model's configuration, as far as it is known.
    """

    path: Path
    family: str
    model: str | None
    tree: Tree | None
    weights: dict[str, Weight]
    report: Report

    @property
    def shapes(self) -> Shapes:
        return {name: weight.shape for name, weight in self.weights.items()}


def open_source(
    path: Path,
    *,
    families: Iterable[str] = (),
    head_width: int | None = None,
    activation: str | None = None,
) -> Source:
    """A run or a checkpoint of ours, a converted file, or a published file.

    families: those that the file is said to be of, or 'elip_ds'; none: whatever it looks like.
    head_width: of one attention head, activation: of CLIP's towers; None: a guess (sizes.infer).
    The caller reads the report; its check() is not done here.
    Raises UserError for a file that cannot be read, of another family, or with sizes that no model
    has.
    """
    wanted = tuple(families)
    if path.is_dir():
        _expect(path, "elip_ds", "it is a folder of this project", wanted)
        return open_own(find_checkpoint(path))
    container = read_container(path)
    names = set(container.tensors)
    if _is_own(names):
        _expect(path, "elip_ds", "its names are this project's", wanted)
        return _own_file(path, container)
    name, evidence = detect(path, names)
    _expect(path, name, f"has {evidence}", wanted)
    if name == "clip" and container.kind == "torchscript":
        activation = activation or "quick_gelu"  # only OpenAI's come so
    return _published(path, name, container, head_width, activation)


def detect(path: Path, names: set[str]) -> tuple[str, str]:
    """The family that names belong to, and the name that tells it."""
    for name in registry.WEIGHTS:
        evidence = family_of(name).recognise(names)
        if evidence:
            return name, evidence
    some = ", ".join(sorted(names)[:3])
    raise UserError(
        f"{path} is of no known family ({some}, ...); known: {', '.join(registry.WEIGHTS)}"
    )


def family_of(name: str) -> Family:
    return registry.resolve(registry.WEIGHTS, name, "family")


def _expect(path: Path, found: str, evidence: str, wanted: tuple[str, ...]) -> None:
    if wanted and found not in wanted:
        title = "elip_ds" if found == "elip_ds" else family_of(found).title
        named = " or ".join("elip_ds" if w == "elip_ds" else family_of(w).title for w in wanted)
        raise UserError(f"{path} is not {named}; this looks like {title}: {evidence}")


def _is_own(names: set[str]) -> bool:
    return any(name.startswith(("model.visual.", "model.text.")) for name in names)


def open_own(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Source:
    """A checkpoint folder. tensors: its weights, where its own file of them is gone."""
    if tensors is None and not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}; tools/convert_weights.py --from deepspeed {folder} "
            "--to elip_ds --out FILE.safetensors makes one of DeepSpeed's files"
        )
    tensors = dict(read_container(folder / WEIGHTS).tensors if tensors is None else tensors)
    if (folder / STATE).is_file():
        tensors |= read_container(folder / STATE).tensors
    return _own(folder, tensors, "", _tree_beside(folder / WEIGHTS))


def _own_file(path: Path, container: Container) -> Source:
    family, tree = from_metadata(container.metadata)
    return _own(path, container.tensors, family, tree or _tree_beside(path))


def _tree_beside(path: Path) -> Tree | None:
    """Of the configuration that a checkpoint keeps beside its weights, less what it began with."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return None
    return dataclasses.asdict(read_config(config).model) | {"init_from": []}


def _own(path: Path, tensors: Mapping, family: str, tree: Tree | None) -> Source:
    model = (tree or {}).get("name")
    report = Report(str(path), "from elip_ds", renamed=[(name, name) for name in tensors])
    return Source(path, family, model, tree, plain(tensors), report)


def _published(
    path: Path, name: str, container: Container, head_width: int | None, activation: str | None
) -> Source:
    family = family_of(name)
    for raw in container.tensors:
        why = reason(raw, family.refused)
        if why:
            raise UserError(f"{path} ({raw}) is {why}")
    theirs = {family.tidy(raw): value for raw, value in container.tensors.items()}
    found = to_ours(family.rules, theirs, path)
    weights = {ours: weight for ours, (_, weight) in found.made.items()}
    report = Report(str(path), f"from {family.title}")
    for ours, (here, weight) in found.made.items():
        place = next(place for place in here.theirs if place[0] in theirs)
        report.note(place, (ours,), [theirs[place[0]].shape, weight.shape])
    for left in found.left_over:
        why = reason(left, family.ignored)
        report.left_over.append(left) if why is None else report.ignored.append((left, why))
    shapes = {ours: weight.shape for ours, weight in weights.items()}
    report.missing = _absent(family, set(CORE), found, theirs)
    if report.missing:
        return Source(path, name, family.model, None, weights, report)
    try:
        tree = infer(family.model, shapes, head_width=head_width, activation=activation)
        wanted = tree_shapes(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (IndexError, ValueError, TypeError, RuntimeError):
        raise UserError(f"{path} has shapes that make no model") from None
    _compare(report, family, wanted, found, theirs)
    return Source(path, name, family.model, tree, weights, report)


def _compare(
    report: Report,
    family: Family,
    wanted: Shapes,
    found: Match,
    theirs: Mapping[str, Tensor],
) -> None:
    """What was found beside the shapes of the model that it makes: all of it, and nothing else.

    Of a twin and of heads, which a file may lack, what is there in part must be there whole.
    """
    known = {each.ours for each in family.rules}
    wanted = {name: shape for name, shape in wanted.items() if general(name)[0] in known}
    if any(name.startswith("teacher.") for name in found.made):
        twin = {f"teacher.{n.removeprefix('model.')}": shape for n, shape in wanted.items()}
        wanted |= {name: shape for name, shape in twin.items() if general(name)[0] in known}
    expected = set(wanted)
    for group in ("objectives.itm.", "itc."):
        if any(name.startswith(group) for name in found.made):
            expected |= {name for name in known if name.startswith(group)}
    for start in family.optional:
        of_group = {name for name in expected if general(name)[0].startswith(start)}
        if not of_group & found.made.keys():
            report.absent += sorted(of_group)
            expected -= of_group
    report.missing = sorted({*found.missing, *_absent(family, expected, found, theirs)})
    for name, (here, weight) in found.made.items():
        if name not in expected:
            report.left_over += here.theirs[0]
        elif name in wanted and weight.shape != wanted[name]:
            report.misshapen.append((name, f"{weight.shape}, not {wanted[name]}"))


def _absent(
    family: Family, expected: Iterable[str], found: Match, theirs: Mapping[str, Tensor]
) -> list[str]:
    """Their names for what is expected, known to the table and not there."""
    known = {each.ours: each for each in family.rules}
    absent: set[str] = set()
    for name in set(expected) - found.made.keys():
        pattern, number = general(name)
        if pattern in known:
            place = known[pattern].at(number).theirs[0]
            absent |= {part for part in place if part not in theirs}
    return sorted(absent)


def export(source: Source, name: str) -> tuple[dict[str, Weight], Report]:
    """Our weights under the names of a family, and the report, unchecked.

    Raises UserError if they are another model's.
    """
    family = family_of(name)
    report = Report(str(source.path), f"to {family.title}")
    if source.model != family.model:
        raise UserError(
            f"{source.path} is model.name={source.model}, which cannot become {family.title}"
        )
    found = to_theirs(family.rules, source.weights)
    for here in {here.ours: here for here, _ in found.made.values()}.values():
        for place in here.theirs:
            shapes = [source.weights[here.ours].shape, found.made[place[0]][1].shape]
            report.note((here.ours,), place, shapes)
    for left in found.left_over:
        why = reason(left, family.dropped)
        report.left_over.append(left) if why is None else report.ignored.append((left, why))
    weights = {theirs: weight for theirs, (_, weight) in found.made.items()}
    if any(ours.startswith("teacher.") for ours in source.weights):
        filled = to_theirs(family.filled, source.weights).made
        weights |= {theirs: weight for theirs, (_, weight) in filled.items()}
    return weights, report
