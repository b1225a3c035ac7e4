"""What became of every name of a file: for people a table, for programs the lists."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.table import Table

from elip_ds.errors import UserError
from elip_ds.weights.table import general


@dataclass
class Report:
    """source: the file.  direction: "from ALBEF", "to ALBEF".
    renamed: (name before, name after) of what keeps its shape.
    reshaped: (before, after, the two shapes) of what does not.
    ignored: (name, why) of what has no counterpart, as it should be.
    absent: names that such a file may lack.
    missing, left_over: errors.  misshapen: (name, shapes), errors too.
    """

    source: str
    direction: str
    renamed: list[tuple[str, str]] = field(default_factory=list)
    reshaped: list[tuple[str, str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, str]] = field(default_factory=list)

    def note(self, before: tuple[str, ...], after: tuple[str, ...], shapes: list) -> None:
        """Names stacked on either side, and the shapes of one of them before and after."""
        if len(before) == len(after) == 1 and shapes[0] == shapes[1]:
            self.renamed.append((before[0], after[0]))
        else:
            shown = " -> ".join(str(tuple(shape)) for shape in shapes)
            self.reshaped.append((braced(before), braced(after), shown))

    def check(self) -> None:
        """Raises UserError if anything is missing, left over or of another shape."""
        wrong = [f"{name} is {shapes}" for name, shapes in self.misshapen]
        for names, what in (
            (self.missing, "missing"),
            (self.left_over, "left over"),
            (wrong, "of a shape that does not fit the others"),
        ):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise UserError(f"{self.source}, {self.direction}: {what}: {shown} ({len(names)})")

    def table(self) -> Table:
        """One line for each kind of name, those of all layers together."""
        table = Table(title=f"{self.source}, {self.direction}")
        for column in ("", "name", "", "count"):
            table.add_column(column, overflow="fold")
        table.add_row("renamed", "", "", str(len(self.renamed)))
        for (before, after, shapes), count in _kinds(self.reshaped):
            table.add_row("reshaped", before, f"{after} {shapes}", str(count))
        for why in dict.fromkeys(why for _, why in self.ignored):
            names = [name for name, reason in self.ignored if reason == why]
            others = " and others" if len(names) > 1 else ""
            table.add_row("ignored", f"{names[0]}{others}", why, str(len(names)))
        for what, names in (
            ("absent", self.absent),
            ("MISSING", self.missing),
            ("LEFT OVER", self.left_over),
            ("MISSHAPEN", [f"{name} is {shapes}" for name, shapes in self.misshapen]),
        ):
            for (name,), count in _kinds((name,) for name in names):
                table.add_row(what, name, "", str(count))
        return table


def braced(names: tuple[str, ...]) -> str:
    """a.x.w and a.y.w -> a.{x,y}.w"""
    columns = zip(*(name.split(".") for name in names), strict=True)
    parts = (list(dict.fromkeys(column)) for column in columns)
    return ".".join(part[0] if len(part) == 1 else "{" + ",".join(part) + "}" for part in parts)


def _kinds(rows: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Rows that differ in the layer's number only, as one, and how many they are."""
    counted = Counter(tuple(general(part)[0] for part in row) for row in rows)
    return list(counted.items())
