"""Latency against quality, and whether a stream keeps up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffbuf_lib.live import LiveReport
from diffbuf_lib.notebook.listening import DelayScore

_LABELS = {
    "si_sdr": "SI-SDR gain (dB)",
    "sdr": "SDR gain (dB)",
    "pesq": "PESQ gain",
    "estoi": "ESTOI gain",
}


def delay_quality(scores: Sequence[DelayScore], metrics: Sequence[str]) -> Figure:
    """Draw gains over the noisy input against latency: means with a line, clips as dots.

    Args:
        scores: from `delay_scores`; the largest buffer read at several delays is one curve, the
            shorter ones, read at their end, another.
        metrics: what to draw, a panel each.
    """
    figure = Figure(figsize=(9, 3.4), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    trained = max(score.buffer_size for score in scores)
    early = [score for score in scores if score.buffer_size == trained]
    short = [score for score in scores if score.delay == score.buffer_size]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_gains(axes, early, metric, f"B = {trained}, delay d from 1 to B", "C0", "o")
        _draw_gains(axes, short, metric, "shorter buffers, d = B", "C1", "s")
        axes.axhline(0, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="latency (ms)", ylabel=_LABELS.get(metric, metric))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper left", ncols=2)
    return figure


def frame_times(report: LiveReport) -> Figure:
    """Draw the time of every hop beside the time that it lasts, and how often each occurred.

    Args:
        report: of a stream.
    """
    figure = Figure(figsize=(9, 3), dpi=90, layout="constrained")
    course, spread = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    times = np.asarray(report.frame_ms)
    course.plot(np.arange(len(times)) * report.hop_ms / 1000, times, linewidth=0.8, color="C0")
    course.set(xlabel="time in the stream (s)", ylabel="time for one hop (ms)", yscale="log")
    low, high = max(times.min(), 1e-3), max(times.max(), report.hop_ms)
    edges = np.geomspace(0.8 * low, 1.2 * high, 40)
    spread.hist(times, bins=list(edges), orientation="horizontal", color="C0")
    spread.set(xlabel="hops")
    for axes in (course, spread):
        axes.axhline(report.hop_ms, color="C3", linestyle="--", label="a hop lasts this long")
        axes.grid(alpha=0.3)
    figure.legend(*course.get_legend_handles_labels(), frameon=False, loc="outside upper right")
    return figure


def _draw_gains(
    axes: Axes, scores: Sequence[DelayScore], metric: str, label: str, color: str, marker: str
) -> None:
    if len(scores) < 2:
        return
    ordered = sorted(scores, key=lambda score: score.latency_ms)
    latency = [score.latency_ms for score in ordered]
    for x, score in zip(latency, ordered, strict=True):
        gains = score.gains[metric].numpy()
        axes.plot([x] * len(gains), gains, marker, color=color, markersize=3, alpha=0.35)
    means = [score.mean(metric) for score in ordered]
    axes.plot(latency, means, color=color, marker=marker, markersize=5, label=label)
