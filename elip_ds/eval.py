"""Score a checkpoint on held-out pairs.

usage: python elip_ds/eval.py RUN_OR_CHECKPOINT [--shards PATTERN] [--max-samples N] [--json]

One process, no DeepSpeed engine: every checkpoint holds whole fp32 weights, whatever ZeRO stage and
number of ranks wrote it. Images are encoded without their captions, hence unpruned.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elip_ds.config import read_config
from elip_ds.config.schema import ShardSource
from elip_ds.data import build_loaders, open_sources, read_vocabulary
from elip_ds.dist import read_ranks
from elip_ds.errors import exit_with
from elip_ds.run import CONFIG, TOKENIZER, Run, find_checkpoint
from elip_ds.tasks import build_pretrain


def main(argv: list[str]) -> None:
    words = parse_arguments(argv)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's logger; stdout is for the scores
        from elip_ds.engine import load_weights
    checkpoint = find_checkpoint(words.checkpoint)
    cfg = read_config(checkpoint / CONFIG)
    pairs = [ShardSource(words.shards)] if words.shards else cfg.data.val
    data = dataclasses.replace(cfg.data, train=pairs, val=pairs)  # training shards may be gone
    run = Run(read_ranks(), checkpoint.parent.parent, cfg.run.seed)
    vocabulary = read_vocabulary(checkpoint / TOKENIZER)
    _, held_out = build_loaders(
        data,
        open_sources(data, run),
        vocabulary,
        run,
        image_size=cfg.model.vision.pixels,
        micro_batches=(1,),
        eval_batch_size=cfg.eval.batch_size,
        max_eval=words.max_samples,
    )
    task = build_pretrain(cfg, vocabulary)
    load_weights(checkpoint, task)
    scores = task.to(run.device).evaluate(
        held_out,
        run.device,
        match_candidates=cfg.eval.match_candidates,
        prune=cfg.eval.prune,
    )
    show(checkpoint, scores, as_json=words.json)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="elip_ds/eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint of it")
    parser.add_argument("--shards", help="held-out shards; the run's own if not given")
    parser.add_argument("--max-samples", type=int, help="score only the first so many pairs")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def show(checkpoint: Path, scores: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"checkpoint": str(checkpoint), **scores}) + "\n")
        return
    table = Table("k", "text retrieval", "image retrieval", "mean", title=str(checkpoint))
    for k in (1, 5, 10):
        table.add_row(
            str(k), *(f"{100 * scores[f'{way}_at_{k}']:.1f} %" for way in ("tr", "ir", "recall"))
        )
    table.caption = f"{scores['candidates']:.0f} candidates"
    Console().print(table)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
