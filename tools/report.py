"""A report on one or several runs, with plots: what a person would send to a colleague.

examples:
  python tools/report.py runs/demo                               # runs/demo/report.html
  python tools/report.py runs/pruned runs/unpruned --out both.md # plots beside it, as both-*.svg

From metrics.jsonl, summary.json, plan.json and config.yaml of each run, also of one that still
trains or was killed. A .html file has its plots inside.
"""

import argparse
import html
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elip_ds.errors import UserError, exit_with

STYLE = "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}" + (
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}svg{max-width:100%}"
)


@dataclass(frozen=True)
class RunFiles:
    """lines: intervals of metrics.jsonl.  scores: its evaluations.  summary: of its end, or {}."""

    name: str
    lines: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    summary: dict[str, Any]
    plan: dict[str, Any]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".html or .md")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    if out.suffix not in (".html", ".md"):
        raise UserError(f"--out {out}: a name that ends in .html or .md")
    runs = [read_run(folder) for folder in args.runs]
    write = write_html if out.suffix == ".html" else write_markdown
    try:
        write(out, runs)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    print(out)


def read_run(folder: Path) -> RunFiles:
    """Raises UserError where there is nothing to report."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder} is no run that has trained: it has no metrics.jsonl")
    parsed = []
    for text in path.read_text().splitlines():
        try:
            parsed.append(json.loads(text))
        except json.JSONDecodeError:  # a kill cut it, or it is being written
            continue
    lines = [line for line in parsed if "losses" in line]
    if not lines:
        raise UserError(f"{path} has no whole line yet")
    scores = [line for line in parsed if "scores" in line]
    return RunFiles(
        folder.resolve().name, lines, scores, _json(folder, "summary"), _json(folder, "plan")
    )


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# The table.


def rows(runs: list[RunFiles]) -> list[list[str]]:
    """One for each figure, a column for each run; the first row names them."""
    table = [["", *(run.name for run in runs)]]
    for title, tell in FIGURES:
        table.append([title, *(tell(run) for run in runs)])
    for name in dict.fromkeys(name for run in runs for name in run.lines[0]["losses"]):
        table.append([f"loss {name}", *(_loss(run, name) for run in runs)])
    return table


def _loss(run: RunFiles, name: str) -> str:
    first, last = (line["losses"].get(name) for line in (run.lines[0], run.lines[-1]))
    return " -> ".join("not finite" if value is None else f"{value:.3f}" for value in (first, last))


def _mean(run: RunFiles, key: str) -> float:
    """Over the intervals but the first, which warms up, where there are more."""
    values = [line[key] for line in run.lines[1:] or run.lines if line.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")


def _batch(run: RunFiles) -> str:
    last = run.lines[-1]
    world = run.plan.get("world_size", "?")
    return f"{last['global_batch_size']}: {last['micro_batch_size']} a pass on {world} rank(s)"


def _recall(run: RunFiles) -> str:
    if not run.scores:
        return "not evaluated"
    last = run.scores[-1]["scores"]
    shown = " / ".join(f"{100 * last[f'recall_at_{k}']:.1f}" for k in (1, 5, 10))
    return f"{shown} % of {last['candidates']}"


FIGURES: list[tuple[str, Callable[[RunFiles], str]]] = [
    ("state", lambda run: run.summary.get("state", "has not come to its end")),
    ("samples seen", lambda run: f"{run.lines[-1]['samples_seen']:,}"),
    ("epochs", lambda run: f"{run.lines[-1]['epoch']:.2f}"),
    ("global batch", _batch),
    ("images/s", lambda run: f"{_mean(run, 'images_per_second'):.4g}"),
    ("TFLOP/s", lambda run: f"{_mean(run, 'tflops'):.3g}"),
    ("MFU", lambda run: f"{100 * _mean(run, 'mfu'):.2f} %"),
    (
        "tokens after each stage",
        lambda run: " -> ".join(map(str, run.lines[-1]["kept_tokens"])) or "no pruning",
    ),
    (
        "peak memory of rank 0",
        lambda run: f"{max(line['memory_peak_bytes'] for line in run.lines) / 2**30:.2f} GiB",
    ),
    ("recall@1/5/10", _recall),
    ("samples lost", lambda run: str(run.lines[-1]["bad_samples"])),
]

# The plots: title, label of the scale, and name -> value of a line.

Values = Callable[[dict[str, Any]], dict[str, float | None]]
PLOTS: list[tuple[str, str, Values]] = [
    ("losses", "loss", lambda line: line["losses"]),
    ("throughput", "images/s", lambda line: {"": line["images_per_second"]}),
    ("utilisation", "MFU", lambda line: {"": line.get("mfu")}),
    (
        "memory",
        "GiB, rank 0",
        lambda line: {name: line[f"memory_{name}_bytes"] / 2**30 for name in ("used", "peak")},
    ),
    (
        "kept tokens",
        "tokens after a stage",
        lambda line: {f"stage {i}": kept for i, kept in enumerate(line["kept_tokens"])},
    ),
    (
        "batch",
        "samples",
        lambda line: {"micro": line["micro_batch_size"], "global": line["global_batch_size"]},
    ),
    ("learning rate", "rate", lambda line: {"": line["learning_rate"]}),
    ("gradient norm", "norm", lambda line: {"": line["gradient_norm"]}),
    (
        "similarities",
        "cosine",
        lambda line: {
            name.removeprefix("similarity_"): value
            for name, value in line["logs"].items()
            if name.startswith("similarity_")
        },
    ),
]


def plot(title: str, scale: str, values: Values, runs: list[RunFiles]) -> str:
    """An SVG picture, over the samples seen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        drawn = [(line["samples_seen"], values(line)) for line in run.lines]
        for name in dict.fromkeys(name for _, value in drawn for name in value):
            points = [(x, value[name]) for x, value in drawn if value.get(name) is not None]
            label = " ".join([run.name] * (len(runs) > 1) + [name] * bool(name)) or run.name
            dashes = ("-", "--", ":", "-.")[number % 4]
            axes.plot(*zip(*points, strict=True), dashes, label=label, linewidth=1.2, marker=".",
                      markersize=3)  # fmt: skip
    axes.set(title=title, xlabel="samples seen", ylabel=scale)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def pictures(runs: list[RunFiles]) -> dict[str, str]:
    return {title: plot(title, scale, values, runs) for title, scale, values in PLOTS}


# The files.


def write_html(out: Path, runs: list[RunFiles]) -> None:
    head, *body = rows(runs)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in body:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    drawn = [svg[svg.index("<svg") :] for svg in pictures(runs).values()]
    title = html.escape(", ".join(run.name for run in runs))
    out.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><table>{''.join(lines)}</table>{''.join(drawn)}\n"
    )


def write_markdown(out: Path, runs: list[RunFiles]) -> None:
    head, *body = rows(runs)
    lines = [f"# {', '.join(run.name for run in runs)}", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    for title, svg in pictures(runs).items():
        path = out.with_name(f"{out.stem}-{title.replace(' ', '-')}.svg")
        path.write_text(svg)
        lines += ["", f"![{title}]({path.name})"]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
