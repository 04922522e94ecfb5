"""The plots of report.py: one PNG for each result that a picture says more about than a table."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

SIZE_INCHES = (7.0, 3.4)


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    """Writes them. Of each result the paths of its plots, relative to the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[str]] = {}
    for name, result in results.items():
        drawer = DRAWERS.get(name.partition("-")[0])
        if drawer is None or "error" in result:
            continue
        figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
        drawer(axes, result)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)
        drawn[name] = [f"{folder.name}/{name}.png"]
    return drawn


def _ttft(axes: Axes, result: Mapping[str, Any]) -> None:
    ways = ["cold", "device_hit", "local_hit", "peer_hit"]
    times = [result[f"{way}_ms"] for way in ways]
    bars = axes.bar([way.replace("_", " ") for way in ways], times, color="tab:blue")
    axes.bar_label(bars, [f"{ms:,.0f} ms" for ms in times])
    axes.set_yscale("log")
    axes.set_ylabel("time to first token, ms (log)")
    axes.set_title(f"{result['model']}, {result['prompt_tokens']:,} tokens")


def _transfer(axes: Axes, result: Mapping[str, Any]) -> None:
    frame = pd.DataFrame(result["rows"])
    for (transport, slot_bytes), rows in frame.groupby(["transport", "slot_bytes"]):
        total = rows["slots"] * rows["slot_bytes"] / 1e6
        axes.plot(
            total,
            rows["ratio_to_nixl"],
            marker="o",
            linestyle="--" if transport == "tcp" else "-",
            label=f"{transport}, {int(str(slot_bytes)) >> 10:,} KiB",
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB fetched")
    axes.set_ylabel("rate relative to raw NIXL")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize=7, ncols=2)


def _hit_rate(axes: Axes, result: Mapping[str, Any]) -> None:
    kinds = ["silo", "pooled", "kvray"]
    values = [100 * result[kind] for kind in kinds]
    labels = ["silos", "pooled LRU", "kvray"]
    bars = axes.barh(labels, values, color=["tab:gray", "tab:orange", "tab:blue"])
    axes.bar_label(bars, [f"{value:.1f} %" for value in values])
    axes.set_xlabel("blocks hit, %")
    axes.set_title(f"{result['nodes']} nodes x {result['capacity_blocks']:,} blocks")


def _multi_turn(axes: Axes, result: Mapping[str, Any]) -> None:
    for mode, found in result["modes"].items():
        by_turn = found["mean_ttft_ms"]
        axes.plot(range(1, len(by_turn) + 1), by_turn, marker="o", label=mode)
    axes.set_xticks(range(1, result["turns"] + 1))
    axes.set_xlabel("turn")
    axes.set_ylabel("time to first token, ms (log)")
    axes.set_yscale("log")
    axes.legend()


DRAWERS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "ttft": _ttft,
    "transfer": _transfer,
    "hit_rate": _hit_rate,
    "multi_turn": _multi_turn,
}
