"""Published checkpoints in and out: one two-way table of names per family."""

from elip_ds.weights.convert import FROM, TO, open_file, save_own, save_published
from elip_ds.weights.source import Source, open_own, open_source
from elip_ds.weights.start import check_paths, saved_name, start_from

__all__ = [
    "FROM",
    "TO",
    "Source",
    "check_paths",
    "open_file",
    "open_own",
    "open_source",
    "save_own",
    "save_published",
    "saved_name",
    "start_from",
]
