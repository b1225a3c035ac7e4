"""The table of contents."""

import pytest

from elip_ds import registry
from elip_ds.errors import UserError

TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and name != "Any"}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]]
)
def test_every_name_has_something_behind_it(table: str, name: str) -> None:
    found = registry.resolve(TABLES[table], name, table.lower())
    assert callable(found) or table == "WEIGHTS"  # those are tables of names


def test_importing_the_page_costs_nothing() -> None:
    assert all(isinstance(target, str) for table in TABLES.values() for target in table.values())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        registry.resolve(registry.OBJECTIVES, "mml", "objectives")
    known = ", ".join(sorted(registry.OBJECTIVES))
    assert str(caught.value) == (
        f"objectives='mml' is not known; did you mean 'mlm'? known: {known}"
    )


def test_a_long_list_of_names_is_cut() -> None:
    known = [f"name{i:02d}" for i in range(20)]
    assert registry.suggest("xyz", known) == f"known: {', '.join(known[:12])}, ..."
