"""What telemetry costs a training step: steps with it and without, in turns, in one process.

examples:
  OMP_NUM_THREADS=2 python tools/bench_telemetry.py preset=demo --rounds 30
  OMP_NUM_THREADS=2 python tools/bench_telemetry.py preset=demo batching.global_batch_size=128

One rank under DeepSpeed. A round is a number of steps without telemetry and as many with it, in an
order that alternates; "with" is all that Recorder.step does: counting, the end of an interval every
metrics.every, writing the series; the endpoint's process runs and is scraped once a second. Ratios
are of the clock and of the process's CPU time, which other work on the machine moves less; "by
itself" is the time that telemetry measures of its own work.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from elip_ds import dist
from elip_ds.config import load_config
from elip_ds.data import build_loaders, build_vocabulary, open_sources
from elip_ds.engine import Engine, read_ds_config
from elip_ds.errors import exit_with, leave
from elip_ds.launching import settle_batch
from elip_ds.metrics import Recorder
from elip_ds.run import join_ranks, open_run
from elip_ds.tasks import build_pretrain

SCRAPES_EVERY_SECONDS = 1.0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench_telemetry.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="preset=NAME and settings")
    parser.add_argument("--deepspeed", default="ds_configs/z2.json")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="of each kind in a round")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """plain, told: seconds of each round's steps, by the clock and of CPU time.

    own: the share that telemetry says of itself.
    """
    words = [f"run.dir={folder}", "metrics.port=0", *args.words]
    config = load_config(["--deepspeed", args.deepspeed, *words])
    tree = read_ds_config(config.engine.deepspeed)
    run = open_run(config)
    config, plan = settle_batch(config, tree, run)
    join_ranks(run, config)
    sources = open_sources(config.data, run)
    vocabulary = build_vocabulary(config.data, sources, run, config.model.text.vocab_size)
    loader, _ = build_loaders(
        config.data,
        sources,
        vocabulary,
        run,
        image_size=config.model.vision.pixels,
        micro_batches=plan.micro_batches,
        eval_batch_size=config.eval.batch_size,
        max_eval=1,
    )
    engine = Engine(config, tree, build_pretrain(config, vocabulary), plan, run)
    recorder = Recorder(config, run, engine, loader)
    operations = engine.operations
    url = recorder.telemetry.publisher.url
    assert url is not None and operations is not None
    over = threading.Event()
    threading.Thread(target=scrape, args=(url, over), daemon=True).start()
    for _ in range(4):
        recorder.step(engine.train_step(loader))
    plain: list[tuple[float, float]] = []
    told: list[tuple[float, float]] = []
    before, start = own_seconds(recorder), time.perf_counter()
    for round_ in range(args.rounds):
        for kind in ("plain", "told") if round_ % 2 else ("told", "plain"):
            began, cpu = time.perf_counter(), time.process_time()
            engine.operations = operations if kind == "told" else None
            for _ in range(args.steps):
                record = engine.train_step(loader)
                if kind == "told":
                    recorder.step(record)
            taken = time.perf_counter() - began, time.process_time() - cpu
            (told if kind == "told" else plain).append(taken)
    own = (own_seconds(recorder) - before) / (time.perf_counter() - start) * 2
    over.set()
    recorder.close()
    return {"plain": plain, "told": told, "own": own, "steps": args.steps, "config": config}


def own_seconds(recorder: Recorder) -> float:
    return recorder.telemetry.out["elip_telemetry_seconds_total"]._value.get()


def scrape(url: str, over: threading.Event) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not over.wait(SCRAPES_EVERY_SECONDS):
        with opener.open(url, timeout=10) as answer:
            answer.read()


def report(measured: dict[str, Any]) -> None:
    plain, told = measured["plain"], measured["told"]
    step = statistics.median(clock for clock, _ in plain) / measured["steps"]
    print(
        f"{measured['config'].preset}: a step without takes {1000 * step:.4g} ms (median); with it"
    )
    for i, by in enumerate(("the clock", "CPU time")):
        ratios = [with_[i] / without[i] for with_, without in zip(told, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{100 * (middle - 1):+.2f} % by {by} (median of {len(ratios)} pairs, quartiles "
            f"{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f})"
        )
    print(f"{100 * measured['own']:.3f} % by itself")


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
    dist.stop()
    leave()
