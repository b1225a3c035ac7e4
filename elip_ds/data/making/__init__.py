"""Raw data sets -> tar shards: plan, worker processes, resume, report."""

from elip_ds.data.making.job import Made, make_shards
from elip_ds.data.making.listing import list_items
from elip_ds.data.making.one_shard import Job
from elip_ds.data.making.showing import Showing

__all__ = ["Job", "Made", "Showing", "list_items", "make_shards"]
