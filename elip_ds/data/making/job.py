"""The whole of making shards: plan, find duplicates, make what is missing, index, report.

Any end of it, a kill included, leaves whole shards and nothing half-written among them; the same
command goes on.
"""

import contextlib
import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from elip_ds.data.making.crew import run_tasks
from elip_ds.data.making.duplicates import find_duplicates
from elip_ds.data.making.listing import Listing, list_items, shard_ranges
from elip_ds.data.making.one_shard import Job, ShardMaker, Task, reason_of, write_whole
from elip_ds.data.making.showing import Showing
from elip_ds.data.shards import INDEX, read_index
from elip_ds.errors import UserError

SKIPPED = "skipped.jsonl"
PLANNED = ("kind", "per_shard", "short_side", "quality", "check", "dedup")
"What of a job decides the bytes of its shards, beside the listing."


@dataclass(frozen=True)
class Made:
    """What is there in the end, of this start and earlier ones.

    listed: samples of the raw data set.  samples, bytes: in the shards.
    new_shards: that this start has made.  skipped: reason -> samples.  renamed: keys that came
    twice and got a number.
    """

    listed: int
    shards: int
    new_shards: int
    samples: int
    captions: int
    bytes: int
    skipped: Counter[str]
    renamed: tuple[str, ...]


def make_shards(job: Job, workers: int = 0, show: Callable[..., Showing] = Showing) -> Made:
    """Make the shards that are missing. workers: processes beside this one, or 0.

    Raises UserError when the folder holds shards of another plan, or cannot be written to.
    """
    try:
        job.state.mkdir(parents=True, exist_ok=True)
        with _locked(job.state, f"--out {job.folder}: another process makes {job.prefix}-*.tar"):
            _remove(job.state.glob("*.partial"))  # of a start that was killed
            try:
                made = _make(job, _plan(job), workers, show)
            finally:  # of workers that were ended: on a full disk their space is wanted
                _remove([job.listing, *job.state.glob("*.partial")])
            _remove(job.state.glob("*.npy"))
            return made
    except OSError as error:
        raise UserError(f"--out {job.folder}: {error.strerror or error}") from None


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path, refusal: str = "") -> Iterator[None]:
    """Alone with what a hidden folder is of; with a refusal as its error's text, not waiting."""
    # A file's lock reaches other nodes of NFS; a folder's does not.
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _plan(job: Job) -> Listing:
    """Lists the source anew. Raises UserError unless that is what an earlier start has listed."""
    with job.listing.open("wb") as out:
        listing = list_items(job.open_source(), out)
    if listing.samples == 0:
        raise UserError(f"{job.kind}: the data set lists no sample")
    plan = {name: getattr(job, name) for name in PLANNED}
    plan |= {"samples": listing.samples, "digest": listing.digest}
    path = job.state / "plan.json"
    old = json.loads(path.read_bytes()) if path.is_file() else None
    series = re.compile(re.escape(job.prefix) + r"-[0-9]+\.tar")  # a-1-000000.tar is not one of a's
    found = sorted(path for path in job.folder.glob("*.tar") if series.fullmatch(path.name))
    if not found:  # an earlier start went no further than its faults
        hashes = [] if old == plan else job.state.glob("*.npy")
        _remove([*job.state.glob("*.json"), *hashes])
        write_whole(path, json.dumps(plan, indent=1).encode())
    elif old is None:
        raise UserError(
            f"--out {job.folder} holds {found[0].name} already, and not its plan; name another "
            "folder or --prefix"
        )
    elif old != plan:
        _refuse(job, old, plan)
    return listing


def _refuse(job: Job, old: dict[str, Any], new: dict[str, Any]) -> NoReturn:
    changed = [f"{k} was {old.get(k)}, is {new[k]}" for k in PLANNED if old.get(k) != new[k]]
    if not changed:
        changed = [f"other samples are listed: {old.get('samples')} then, {new['samples']} now"]
    raise UserError(
        f"--out {job.folder}: its {job.prefix}-*.tar are of another plan ({changed[0]}); give what "
        "was given then, or another folder or --prefix"
    )


def _make(job: Job, listing: Listing, workers: int, show: Callable[..., Showing]) -> Made:
    ranges = shard_ranges(listing.samples, job.per_shard)
    missing = [i for i in range(len(ranges)) if not _is_done(job, i)]
    duplicates: dict[int, str] = {}
    if job.dedup and missing:
        with closing(show("reading", listing.samples)) as shown:
            duplicates = find_duplicates(job, listing, ranges, workers, shown.advance)
    tasks = [_task(i, ranges[i], listing, duplicates) for i in missing]
    if tasks:
        with closing(show("making", listing.samples)) as shown:
            shown.skip(listing.samples - sum(len(task.samples) for task in tasks))
            with closing(run_tasks(ShardMaker(job), tasks, workers, shown.advance)) as done:
                for _ in done:
                    pass
    return _finish(job, listing, len(ranges), len(tasks))


def _is_done(job: Job, number: int) -> bool:
    """Raises UserError for a finished shard that is no longer what it was."""
    if not job.report(number).is_file():
        return False
    entry, path = json.loads(job.report(number).read_bytes())["entry"], job.shard(number)
    if entry is None:
        return True
    if path.is_file() and path.stat().st_size != entry["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, made were {entry['bytes']}; delete it, and "
            "it is made anew"
        )
    return path.is_file()


def _task(number: int, samples: range, listing: Listing, duplicates: dict[int, str]) -> Task:
    here = {i - samples.start: duplicates[i] for i in samples if i in duplicates}
    return Task(number, samples, int(listing.starts[samples.start]), here)


def _finish(job: Job, listing: Listing, shards: int, new_shards: int) -> Made:
    """The index and the list of what was skipped, of all that is there."""
    reports = [json.loads(job.report(i).read_bytes()) for i in range(shards)]
    entries = {job.shard(i).name: r["entry"] for i, r in enumerate(reports) if r["entry"]}
    skipped = [line for report in reports for line in report["skipped"]]
    if not entries:
        raise UserError(
            f"{job.kind}: no sample can be used; the first, {skipped[0]['where']}: "
            f"{skipped[0]['reason']}"
        )
    with _locked(job.folder / ".index.making"):  # other prefixes may be finishing, too
        index = read_index(job.folder) | entries
        write_whole(job.folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        _write_skipped(job, skipped, {job.shard(i).name for i in range(shards)})
    return Made(
        listed=listing.samples,
        shards=len(entries),
        new_shards=new_shards,
        samples=sum(entry["samples"] for entry in entries.values()),
        captions=sum(entry["captions"] for entry in entries.values()),
        bytes=sum(entry["bytes"] for entry in entries.values()),
        skipped=Counter(map(reason_of, skipped)),
        renamed=listing.renamed,
    )


def _write_skipped(job: Job, skipped: list[dict[str, Any]], ours: set[str]) -> None:
    """Our lines in place of our older ones; those of other prefixes stay."""
    path, others = job.folder / SKIPPED, []
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        others = [line for line in lines if json.loads(line)["shard"] not in ours]
    lines = [*others, *(json.dumps(line) for line in skipped)]
    if lines or path.is_file():
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
