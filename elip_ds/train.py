"""Pre-train: the algorithm on one page. Usage: deepspeed elip_ds/train.py --help"""

import sys
from pathlib import Path

from elip_ds import dist
from elip_ds.config import Config, duration_in_samples, load_config
from elip_ds.data import build_loaders, build_vocabulary, check_inputs, open_sources
from elip_ds.engine import Engine, due, leave_when_out_of_memory, read_ds_config
from elip_ds.errors import leave_with
from elip_ds.launching import settle_batch
from elip_ds.metrics import Recorder, check_metrics, close_run
from elip_ds.run import Run, join_ranks, open_run, tell_job
from elip_ds.tasks import build_pretrain, min_micro_batch
from elip_ds.weights import check_paths


def check_reads(cfg: Config, run: Run) -> None:
    """Raises UserError where shards, vocabulary or weights are not there."""
    check_inputs(cfg.data)
    check_paths([] if run.resumes else [Path(path) for path in cfg.model.init_from])


def main(argv: list[str]) -> None:
    cfg = load_config(argv)  # preset + key=value, typed and frozen
    ds_tree = read_ds_config(cfg.engine.deepspeed)
    check_metrics(cfg.metrics)  # packages, files and folders are there
    run = open_run(cfg)  # who is who, folder, stop signal
    cfg, plan = settle_batch(cfg, ds_tree, run, check_reads)  # given, remembered, or measured now
    join_ranks(run, cfg)
    leave_when_out_of_memory(run, plan, min_micro_batch(cfg))
    sources = open_sources(cfg.data, run)
    vocabulary = build_vocabulary(cfg.data, sources, run, cfg.model.text.vocab_size)
    loader, held_out = build_loaders(
        cfg.data,
        sources,
        vocabulary,
        run,
        image_size=cfg.model.vision.pixels,
        micro_batches=plan.micro_batches,
        eval_batch_size=cfg.eval.batch_size,
        max_eval=cfg.eval.max_samples,
    )
    engine = Engine(cfg, ds_tree, build_pretrain(cfg, vocabulary), plan, run)
    engine.resume(loader)  # newest checkpoint, else cfg's weights, else fresh
    recorder = Recorder(cfg, run, engine, loader)

    total = engine.total_samples(loader)
    save_every = duration_in_samples(cfg.checkpoint.every, loader.samples_per_epoch)
    eval_every = cfg.eval.every and duration_in_samples(cfg.eval.every, loader.samples_per_epoch)
    while engine.samples_seen < total and not run.stopping:
        record = engine.train_step(loader)  # accumulate, reduce, update: one optimizer step
        recorder.step(record)
        run.agree_to_stop(engine.step)
        loader.check(engine.step)
        if eval_every and due(engine.samples_seen, plan.global_batch_size, eval_every):
            recorder.scores(engine.evaluate(held_out))
        if run.saving or due(engine.samples_seen, plan.global_batch_size, save_every):
            recorder.saved(engine.save(loader))
    checkpoint = engine.save(loader)
    done = engine.samples_seen >= total
    if done and cfg.run.on_finish == "evaluate":
        recorder.scores(engine.evaluate(held_out))
    state = "done" if done else "stopped"
    close_run(run, recorder, checkpoint, state)
    dist.stop()
    if checkpoint is None:
        raise SystemExit(1)  # the log says why the last checkpoint could not be written
    tell_job(state)


if __name__ == "__main__":
    leave_with(main, sys.argv[1:])  # all is on disk
