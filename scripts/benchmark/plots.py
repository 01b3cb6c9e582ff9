"""Draws figures.json: ``plots.py FIGURES DIRECTORY``. Runs with the bench's own interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#c8442b", "#5b7083"
LINES = ("#5b7083", "#2b8cbe", "#31a354", "#9467bd", "#8c6d31", "#17becf", "#7f7f7f", "#bcbd22")
SHOWN = ("true", "python3 -c 'print(1)'")
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.hashsalt": "sandboxd",
        "figure.constrained_layout.use": True,
    }
)


def latency(found: dict[str, Any]) -> Any:
    """Bars at the median, a line up to p99, fastest on top."""
    tables = {name: one for name, one in found["tables"].items() if name in SHOWN and one}
    figure, axes = plt.subplots(1, len(tables), figsize=(5.2 * len(tables), 4.6), squeeze=False)
    for axis, (name, taken) in zip(axes[0], tables.items(), strict=True):
        ordered = sorted(taken.items(), key=lambda item: item[1]["p50"], reverse=True)
        for at, (one, figures) in enumerate(ordered):
            color = OURS if one.startswith("sandboxd") else OTHERS
            axis.barh(at, figures["p50"], color=color, height=0.62)
            axis.plot([figures["p50"], figures["p99"]], [at, at], color="#333333", linewidth=1.2)
            axis.annotate(
                f"{figures['p50']:.1f}", (figures["p99"], at), (5, 0), textcoords="offset points", va="center"
            )
        axis.set_yticks(range(len(ordered)), [one for one, _ in ordered])
        axis.set_xscale("log")
        axis.set_xlim(right=axis.get_xlim()[1] * 1.9)
        axis.grid(visible=False, axis="y")
        axis.set_title(name, family="monospace", fontsize=10)
        axis.set_xlabel("ms, p50 (line: to p99)")
    return figure


def throughput(found: dict[str, Any]) -> Any:
    """Lines over the number of callers, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    others = iter(LINES)
    for name, one in found["rates"].items():
        if not one:
            continue
        callers = sorted(map(int, one))
        ours = name.startswith("sandboxd")
        style = {"color": OURS, "linewidth": 2.4} if ours else {"color": next(others, OTHERS)}
        dash = "--" if ours and "cold" in name else "-"
        rates = [one[str(number)]["rate"] for number in callers]
        axis.plot(callers, rates, dash, marker="o", markersize=4, label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    every = sorted({int(n) for one in found["rates"].values() for n in one})
    axis.set_xticks(every, [str(n) for n in every])
    lowest, highest = axis.get_ylim()
    ticks = [one for one in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if lowest <= one <= highest]
    axis.set_yticks(ticks, [str(one) for one in ticks])
    axis.minorticks_off()
    axis.set_xlabel("callers at once")
    axis.set_ylabel("calls of true a second")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _pair(across: list[int], left: list[float], right: list[float], names: tuple[str, str, str]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    for axis, values, name in zip(axes, (left, right), names[1:], strict=True):
        axis.plot(across, values, marker="o", color=OURS)
        axis.set_xlabel(names[0])
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=min(0, *values), top=max(values) * 1.25 or 1)
    return figure


def alive(found: dict[str, Any]) -> Any:
    """Memory of each and time of a call."""
    levels = found["levels"]
    names = ("sandboxes alive", "MiB of the host for each, beyond the tool", "ms, p50 of a call among them")
    figure = _pair(
        [one["alive"] for one in levels],
        [one["mib_each"] for one in levels],
        [one["p50"] for one in levels],
        names,
    )
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.set_xticks([one["alive"] for one in levels], [str(one["alive"]) for one in levels])
        axis.minorticks_off()
    return figure


def row(found: dict[str, Any]) -> Any:
    """Memory of the daemon and time of a call."""
    steps = found["steps"]
    across = [one["calls"] for one in steps]
    return _pair(
        across, [one["rss_mib"] for one in steps], [one["p50"] for one in steps],
        ("calls", "MiB, daemon RSS", "ms, p50"),
    )  # fmt: skip


DRAWN = {"sequential": latency, "throughput": throughput, "alive": alive, "row": row}


def main() -> None:
    """Draw what there is."""
    found, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, draw in DRAWN.items():
        if name not in found or "error" in found[name]:
            continue
        figure = draw(found[name])
        figure.savefig(directory / f"{draw.__name__}.png", dpi=130)
        figure.savefig(directory / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


main()
