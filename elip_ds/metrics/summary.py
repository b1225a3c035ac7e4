"""The closing table of a run, and the same figures as summary.json."""

import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elip_ds.metrics.recorder import METRICS, Recorder
from elip_ds.run import Run

log = logging.getLogger(__name__)

SUMMARY = "summary.json"


def close_run(run: Run, recorder: Recorder, checkpoint: Path | None, state: str) -> None:
    """Write summary.json and print the table, on rank 0. state: 'done' or 'stopped'."""
    recorder.close()
    if not run.first:
        return
    path = run.dir / SUMMARY
    before = json.loads(path.read_text()) if path.exists() else {}
    summary = {
        "state": state,
        "run": str(run.dir),
        # A start that found nothing left to train keeps the figures of the one that trained.
        "images_per_second": recorder.images_per_second or before.get("images_per_second", 0.0),
        "world_size": run.world_size,
        "device": run.device.type,
        "kept_tokens": list(recorder.kept_tokens) or before.get("kept_tokens", []),
        "losses_start": recorder.losses_start,
        "losses_end": recorder.losses_end or before.get("losses_end", {}),
        **{key: recorder.last_scores.get(key) for key in _SCORES},
        "checkpoint": str(checkpoint) if checkpoint else None,
        "metrics": str(run.dir / METRICS),
    }
    try:
        run.write_text(path, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        log.error("%s is not written: %s", path, error.strerror)
    Console(highlight=False, soft_wrap=True).print(_table(summary))


_SCORES = ("recall_at_1", "recall_at_5", "recall_at_10", "candidates")


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"run {summary['run']}: {summary['state']}", show_header=False)
    where = f"{summary['world_size']} rank(s) on {summary['device']}"
    table.add_row("throughput", f"{summary['images_per_second']:.0f} images/s, {where}")
    kept = " -> ".join(str(n) for n in summary["kept_tokens"]) or "no pruning"
    table.add_row("tokens after each stage", kept)
    for name, start in summary["losses_start"].items():
        end = summary["losses_end"].get(name, float("nan"))
        table.add_row(f"loss {name}", f"{start:.3f} -> {end:.3f}")
    if summary["candidates"]:
        recalls = " / ".join(f"{100 * summary[key]:.1f} %" for key in _SCORES[:3])
        chance = f"chance@1 {100 / summary['candidates']:.2f} %"
        table.add_row("recall@1/5/10", f"{recalls} of {summary['candidates']}, {chance}")
    table.add_row("checkpoint", str(summary["checkpoint"]))
    table.add_row("metrics", summary["metrics"])
    return table
