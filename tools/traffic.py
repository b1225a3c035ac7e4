"""What a rank sends in an optimizer step, in closed form.

    python tools/traffic.py preset=albef_4m --batch 16 --ranks 8 64 1024

W ranks, P trained and F frozen elements of s bytes, A micro-batches of B samples, E joint space.
Sending is that of a ring: (W - 1) / W of the whole for a gather or a scatter, twice that for an
all-reduce, which is both. DeepSpeed 0.19 as ds_configs sets it:

    ZeRO 0   all-reduce P s
    ZeRO 1   all-reduce P s, gather P s
    ZeRO 2   A all-reduces P s, gather P s: it reduces after every micro-batch, and whole buckets
             (use_multi_rank_bucket_allreduce), of which each rank then keeps its part
    ZeRO 3   A scatters P s; gathers of all weights that run, A times those above the persistence
             threshold, which stay whole from forward to backward while the reuse distance spans
             the model, and once those below it, of the twin twice: by DeepSpeed and by us
    always   A gathers of W B 2 E features in fp32, and of few bytes: the words' count of each
             micro-batch, the norm, and every ten steps or seconds flags and counts

`bench_scaling.py` holds this to counters.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elip_ds.config import load_config
from elip_ds.data.made_up import made_up_vocabulary
from elip_ds.engine import read_ds_config
from elip_ds.errors import exit_with
from elip_ds.tasks import build_pretrain

PERSISTENT = 100_000
"Elements up to which ds_configs/z3.json keeps a weight whole."
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sizes:
    """Elements. small: of the weights that ZeRO 3 keeps whole."""

    trained: int
    frozen: int
    small_trained: int
    small_frozen: int


def sizes_of(parameters: Iterable[tuple[int, bool]], persistent: int = PERSISTENT) -> Sizes:
    """parameters: elements, and whether they are trained."""
    counts = [0, 0, 0, 0]
    for size, trained in parameters:
        counts[0 if trained else 1] += size
        if size <= persistent:
            counts[2 if trained else 3] += size
    return Sizes(*counts)


@dataclass(frozen=True)
class Step:
    """batch: samples of a micro-batch on a rank.  width: of the joint space, 0 where no features
    are gathered.  gathers: of a large weight in a micro-batch at ZeRO 3; 2 and more where
    stage3_max_reuse_distance is shorter than the model.
    """

    stage: int
    world_size: int
    weight_bytes: int = 2
    accumulation: int = 1
    batch: int = 1
    width: int = 256
    gathers: float = 1.0


def sent_bytes(sizes: Sizes, step: Step, *, gloo: bool = False) -> dict[str, float]:
    """By a rank in an optimizer step: gradients, weights, features.

    gloo: its reduce-scatter sends as much as an all-reduce (measured with two ranks).
    """
    whole = sizes.trained * step.weight_bytes
    gather = (step.world_size - 1) / step.world_size
    times = step.accumulation if step.stage >= 2 else 1
    scatters = step.stage == 3 and not gloo
    weights = 0.0
    if step.stage in (1, 2):
        weights = whole
    elif step.stage == 3:
        large = step.gathers * (sizes.trained - sizes.small_trained)
        large += sizes.frozen - sizes.small_frozen
        small = sizes.small_trained + 2 * sizes.small_frozen
        weights = (step.accumulation * large + small) * step.weight_bytes
    features = step.accumulation * step.world_size * step.batch * 2 * step.width * 4
    return {
        "gradients": times * whole * gather * (1 if scatters else 2),
        "weights": weights * gather,
        "features": features * gather,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--batch", type=int, default=16, help="of a rank's micro-batch; default 16")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--weight-bytes", type=int, choices=(2, 4), default=2, help="default 2")
    args = parser.parse_args(argv)
    config = load_config(args.words)
    zero = read_ds_config(str(ROOT / "ds_configs" / "z3.json"))["zero_optimization"]
    task = build_pretrain(config, made_up_vocabulary(config))
    parameters = [(p.numel(), p.requires_grad) for p in task.parameters()]
    sizes = sizes_of(parameters, int(zero["stage3_param_persistence_threshold"]))
    print(f"trained {sizes.trained / 1e6:.1f} million, frozen {sizes.frozen / 1e6:.1f} million")
    for ranks in args.ranks:
        for stage in range(4):
            step = Step(
                stage,
                ranks,
                weight_bytes=args.weight_bytes,
                accumulation=args.accumulation,
                batch=args.batch,
                width=config.model.embed_dim,
            )
            parts = sent_bytes(sizes, step)
            told = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in parts.items())
            print(f"{ranks} ranks, ZeRO {stage}: {sum(parts.values()) / 1e6:.1f} MB ({told})")


if __name__ == "__main__":
    import sys

    exit_with(main, sys.argv[1:])
