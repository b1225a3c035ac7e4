"""Records in, batches out."""

from elip_ds.data.batch import Batch
from elip_ds.data.corpus import build_vocabulary, open_sources
from elip_ds.data.loader import HeldOut, TrainLoader, build_loaders
from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards
from elip_ds.data.text import Vocabulary, read_vocabulary

__all__ = [
    "Batch",
    "HeldOut",
    "Record",
    "TrainLoader",
    "Vocabulary",
    "build_loaders",
    "build_vocabulary",
    "open_sources",
    "read_vocabulary",
    "write_shards",
]
