"""Latency against quality, and whether a stream keeps up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.figures import DYNAMIC_RANGE
from diffbuf_lib.live import LiveReport
from diffbuf_lib.notebook.listening import DelayScore
from diffbuf_lib.notebook.plots.signals import DPI, analyse, decibels, draw_level

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
    figure = Figure(figsize=(9, 3.4), dpi=DPI, layout="constrained")
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
    figure = Figure(figsize=(9, 3), dpi=DPI, layout="constrained")
    course, spread = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    _draw_hops(course, report)
    times = np.asarray(report.frame_ms)
    low, high = max(times.min(), 1e-3), max(times.max(), report.hop_ms)
    edges = np.geomspace(0.8 * low, 1.2 * high, 40)
    spread.hist(times, bins=list(edges), orientation="horizontal", color="C0")
    spread.set(xlabel="hops")
    spread.axhline(report.hop_ms, color="C3", linestyle="--")
    spread.grid(alpha=0.3)
    figure.legend(*course.get_legend_handles_labels(), frameon=False, loc="outside upper right")
    return figure


def stream_course(waves: Mapping[str, Tensor], report: LiveReport, audio: AudioConfig) -> Figure:
    """Draw what went into a stream and came out of it, over the time that every hop took.

    Args:
        waves: title and signal [T], full scale 1, of a stream so far.
        report: of the same stream.
        audio: gives Hz and seconds.
    """
    figure = Figure(figsize=(9, 2 + 1.7 * len(waves)), dpi=DPI, layout="constrained")
    *panels, course = figure.subplots(len(waves) + 1, 1, sharex=True)
    for axes, (title, wave) in zip(panels, waves.items(), strict=True):
        if wave.shape[-1] >= audio.stft.n_fft:
            draw_level(axes, decibels(analyse(wave, audio)), audio, vmin=-DYNAMIC_RANGE, vmax=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("")
    if report.frame_ms:
        _draw_hops(course, report)
        course.legend(frameon=False, fontsize=8, loc="upper right")
    else:
        course.set_axis_off()
    return figure


def _draw_hops(axes: Axes, report: LiveReport) -> None:
    times = np.asarray(report.frame_ms)
    axes.plot(np.arange(len(times)) * report.hop_ms / 1000, times, linewidth=0.8, color="C0")
    axes.set(xlabel="time in the stream (s)", ylabel="time for one hop (ms)", yscale="log")
    axes.axhline(report.hop_ms, color="C3", linestyle="--", label="a hop lasts this long")
    axes.grid(alpha=0.3)


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
