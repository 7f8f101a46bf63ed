"""Figures of evaluations: data in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from diffbuf_lib.evaluation.scoring import LABELS


def gains_by_band(summary: Mapping[str, Any], columns: Sequence[str]) -> Figure:
    """Draw the gain of every method over the noisy input against input SNR, a panel a metric.

    Args:
        summary: the content of summary.json.
        columns: the metrics to show.
    """
    bands = [name for name in summary["bands"] if name != "all"]
    methods = summary["methods"][1:]
    figure = Figure(figsize=(3.5 * len(columns), 3.3), dpi=90, layout="constrained")
    for axes, column in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        for index, method in enumerate(methods):
            points = [
                (place + 0.12 * (index - (len(methods) - 1) / 2), gain)
                for place, name in enumerate(bands)
                if (gain := summary["bands"][name]["columns"][column]["methods"][method]["gain"])
            ]
            if points:
                draw_intervals(axes, *zip(*points, strict=True), label=method, index=index)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(bands)), [name.removesuffix(" dB") for name in bands], fontsize=8)
        axes.tick_params(axis="x", rotation=30 if len(bands) > 4 else 0)
        axes.set(xlabel="input SNR (dB)", ylabel=f"gain in {LABELS.get(column, column)}")
        axes.grid(alpha=0.3)
    if methods:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_intervals(
    axes: Any,
    x: Sequence[float],
    intervals: Sequence[Mapping[str, Any]],
    *,
    label: str,
    index: int,
    line: str = "-",
) -> None:
    """Draw means with their intervals as bars; a single clip's has none.

    Args:
        axes: to draw on.
        x: places on the x axis.
        intervals: as summary.json has them.
        label: for the legend.
        index: which colour.
        line: matplotlib's line style between the means.
    """
    means = [interval["mean"] for interval in intervals]
    lows = [
        m - i["low"] if i["low"] is not None else 0 for m, i in zip(means, intervals, strict=True)
    ]
    highs = [
        i["high"] - m if i["high"] is not None else 0 for m, i in zip(means, intervals, strict=True)
    ]
    # The mean of few clips can lie outside its interval by rounding: bars have no negative length.
    bars = [[max(0.0, low) for low in lows], [max(0.0, high) for high in highs]]
    axes.errorbar(
        x, means, yerr=bars, label=label, color=f"C{index}", linestyle=line,
        marker="o", markersize=4, capsize=3, linewidth=1.2,
    )  # fmt: skip
