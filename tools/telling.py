"""What the benchmark found, as tables and as a picture."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stopwatch import PHASES

from elip_ds.errors import UserError
from elip_ds.launching.parts import PARTS


def print_report(report: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}; counted at "
        f"batch {report['count_batch']}"
    )
    for name, entry in report["variants"].items():
        console.print(count_table(name, entry))
    if "matmul_peak" in report:
        console.print(
            f"timed at batch {report['batch']}, medians of {report['pairs']} steps taken in turns; "
            f"matrix products reach {report['matmul_peak'] / 1e12:.3g} TFLOP/s"
        )
        console.print(time_table(report))


def count_table(name: str, entry: dict[str, Any]) -> Table:
    columns = ["GFLOP forward", "needed", "GFLOP backward", "needed", "MB kept"]
    if entry["naive"]:  # ours keeps recipes, too, which only the living storages tell
        columns.append("MB saved")
    columns.append("MB kept a step")
    table = Table(f"{name}, an image", title=" ".join(entry["words"]) or None)
    for column in columns:
        table.add_column(column, justify="right")
    for part, row in (*entry["parts"].items(), ("total", entry["total"])):
        if not any(row.values()):
            continue
        cells = [
            row[key] / 1e9 for key in ("forward", "needed_forward", "backward", "needed_backward")
        ]
        cells.append(row["kept_bytes"] / 1e6)
        if entry["naive"]:
            cells.append(row["saved_bytes"] / 1e6)
        # What grows with the batch squared leaves a small remainder of either sign.
        cells.append(max(0.0, round(row["kept_bytes_per_step"] / 1e6, 2)))
        table.add_row(part, *(f"{cell:.4g}" for cell in cells))
    total = entry["total"]
    table.caption = (
        f"forward and backward {(total['forward'] + total['backward']) / 1e9:.4g} GFLOP, needed "
        f"{(total['needed_forward'] + total['needed_backward']) / 1e9:.4g}"
    )
    return table


def time_table(report: dict[str, Any]) -> Table:
    first = next(iter(report["variants"]))
    table = Table("")
    seconds = [f"s {phase}" for phase in PHASES]
    for column in (
        "images/s",
        *seconds,
        "peak GB",
        "MFU",
        "of it needed",
        f"time / {first} (lowest..highest)",
    ):
        table.add_column(column, justify="right")
    for name, entry in report["variants"].items():
        time, ratio = entry["time"], entry["time"]["time_against_first"]
        peak = time["peak_bytes"]
        table.add_row(
            name,
            f"{time['images_per_second']:.4g}",
            *(f"{time['seconds'][phase]:.4g}" for phase in PHASES),
            "?" if peak is None else f"{peak / 1e9:.2f}",
            f"{100 * time['mfu']:.1f} %",
            f"{100 * time['needed_mfu']:.1f} %",
            f"{ratio['median']:.3f} ({ratio['lowest']:.3f}..{ratio['highest']:.3f})",
        )
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """Stacked bars, a part on top of the other: GFLOP and MB an image, for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 1.6 * len(report["variants"]), 4.5), layout="constrained")
    names = list(report["variants"])
    panels = (
        ("GFLOP an image, forward and backward", ("forward", "backward"), 1e9),
        ("MB kept for the backward, an image", ("kept_bytes",), 1e6),
    )
    for axes, (title, keys, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        bottom = [0.0] * len(names)
        for part in PARTS:
            parts = [report["variants"][name]["parts"][part] for name in names]
            heights = [sum(entry[key] for key in keys) / unit for entry in parts]
            axes.bar(names, heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for i, top in enumerate(bottom):
            axes.text(i, top, f"{top:.4g}", ha="center", va="bottom")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", rotation=20)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path}: {error}") from None
