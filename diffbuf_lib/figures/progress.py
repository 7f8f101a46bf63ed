"""Curves: of a run, of several runs, of a noise schedule, and of a stream's hops.

Lines of a run are those of its history (`read_history`) or `StepRecord.to_dict()`: one with "loss"
is a step, one with "valid" that is not None a validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.sde import SDE
from diffbuf_lib.figures.spectrogram import (
    DPI,
    DYNAMIC_RANGE,
    RED,
    WIDTH,
    analyse_all,
    centred,
    decibels,
    draw_level,
    to_numpy,
)

Line = Mapping[str, Any]

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
_UNITS = {"si_sdr": "SI-SDR (dB)", "sdr": "SDR (dB)", "pesq": "PESQ (1 to 4.6)", "estoi": "ESTOI"}
_ENDS = (0.001, 0.999)  # at t = 0, and for BBED at t = 1, sigma is 0 and 1 / sigma infinite
_STYLES = ("-", "--", "-.", ":")


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Figure:
    """Draw named curves on one pair of axes.

    Args:
        series: name, x and y of each.
        xlabel: name and unit of the x axis.
        ylabel: name and unit of the y axis.
        log: whether the y axis is logarithmic.
    """
    figure = Figure(figsize=(7.5, 3), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, (name, x, y) in enumerate(series):
        marker = "o" if len(x) < 30 else None
        axes.plot(x, y, label=name, marker=marker, markersize=3, color=f"C{index}", linewidth=1.2)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def scale_of(values: Iterable[float | None]) -> str:
    """Return the scale of an axis of losses: log, or linear where one is not above 0.

    With training.snr_weight a loss may be negative.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return "log" if known and min(known) > 0 else "linear"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last `window` values, fewer at the start."""
    total = np.cumsum(np.asarray(values, dtype=np.float64))
    lagged = np.concatenate([np.zeros(window), total[:-window]])[: len(total)]
    counts = np.minimum(np.arange(len(total)) + 1, window)
    smoothed: list[float] = ((total - lagged) / counts).tolist()
    return smoothed


def training_progress(
    lines: Sequence[Line],
    clip: Mapping[str, Tensor],
    audio: AudioConfig,
    *,
    metric: str = "si_sdr",
    clip_step: int | None = None,
) -> Figure:
    """Draw where a run stands: loss, validation score, gradient norm, learning rate, one clip.

    Args:
        lines: of the run, oldest first; may be empty.
        clip: title and signal [T], full scale 1, of one validation clip, such as mix, estimate and
            target; drawn on one dB scale.
        audio: sample rate and frames of the pictures.
        metric: which score of the validations to draw, or "loss".
        clip_step: the step after which the estimate was made, for its title.
    """
    # Fixed margins: constrained layout takes longer than all of the drawing.
    figure = Figure(figsize=(10, 5.6), dpi=DPI)
    grid = figure.add_gridspec(
        2, 12, left=0.06, right=0.92, top=0.94, bottom=0.09, hspace=0.42, wspace=6
    )
    steps, valid = _steps(lines), _validations(lines)
    loss = figure.add_subplot(grid[0, :5])
    _draw_loss(loss, steps, valid)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))  # the last panel is narrow
    score = figure.add_subplot(grid[0, 5:9], sharex=loss)
    _draw_points(score, valid, metric, label=metric, color="C1")
    _name(score, f"validation {_UNITS.get(metric, metric)}")
    if not valid:
        score.set_yticks([])
        write_in_the_middle(score, "none so far")
    _draw_rate_and_gradient(figure.add_subplot(grid[0, 9:], sharex=loss), steps)
    places = grid[1, :].subgridspec(1, max(1, len(clip)))
    _draw_clip(figure, [places[0, i] for i in range(len(clip))], clip, audio, clip_step)
    return figure


def compare_runs(runs: Mapping[str, Iterable[Line]], *, metric: str = "si_sdr") -> Figure:
    """Lay several runs over one another: smoothed loss, and scores of the validations.

    Args:
        runs: name of each run, and its lines.
        metric: which score of the validations to draw.
    """
    figure = Figure(figsize=(10, 3.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    losses: list[float | None] = []
    for index, (name, run) in enumerate(runs.items()):
        lines = list(run)
        steps, valid = _steps(lines), _validations(lines)
        losses += [line["loss"] for line in steps]
        _draw_smoothed(left, steps, label=name, color=f"C{index}")
        _draw_points(right, valid, metric, label=name, color=f"C{index}")
    left.set(title="training loss, smoothed", xlabel="step", ylabel="loss", yscale=scale_of(losses))
    right.set(title="validation", xlabel="step", ylabel=_UNITS.get(metric, metric))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if runs:
        right.legend(frameon=False, fontsize=9)
    return figure


def noise_schedule(sdes: Mapping[str, SDE], t_eps: float, t_max: float) -> Figure:
    """Draw sigma, the weight of Y in the mean, g and 1 / sigma over diffusion time.

    Args:
        sdes: name and SDE of every curve.
        t_eps: smallest diffusion time of the buffer; what lies outside is grey.
        t_max: the largest.
    """
    figure = Figure(figsize=(WIDTH, 5.4), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    first, last = _ENDS
    small = torch.logspace(math.log10(min(first, t_eps)), math.log10(last), 100)
    t = torch.cat([small, torch.linspace(first, last, 600)])  # since much happens near 0
    t = t.double().sort().values
    nothing, one = torch.zeros_like(t), torch.ones_like(t)
    for index, (name, sde) in enumerate(sdes.items()):
        sigma = sde.std(t)
        look = {"label": name, "color": f"C{index}", "linestyle": _STYLES[index % len(_STYLES)]}
        drawn = (sigma, sde.mean(nothing, one, t), sde.diffusion(t), 1 / sigma)
        for axes, values in zip(panels, drawn, strict=True):
            axes.plot(to_numpy(t), to_numpy(values), **look)
    titles = (
        "sigma(t): noise in X_t",
        "weight of Y in the mean (of S: the rest)",
        "g(t): noise added at t",
        "1 / sigma(t): size of score targets",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(0, 1)
        for low, high in ((0.0, t_eps), (t_max, 1.0)):
            axes.axvspan(low, high, color="0.5", alpha=0.18, linewidth=0)
        axes.grid(alpha=0.3)
    for axes in panels[:3]:
        axes.set_ylim(bottom=0)
    panels[3].set_yscale("log")
    mark_float16(panels[3], 0.97)
    for axes in panels[2:]:
        axes.set_xlabel("diffusion time t")
    if len(sdes) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def stream_course(
    waves: Mapping[str, Tensor], frame_ms: Sequence[float], audio: AudioConfig
) -> Figure:
    """Draw what went into a stream and came out of it, above the time that every hop took.

    Args:
        waves: title and signal [T], full scale 1, of a stream so far.
        frame_ms: time that each hop took, ms.
        audio: gives Hz and seconds.
    """
    figure = Figure(figsize=(WIDTH, 2 + 1.7 * len(waves)), dpi=DPI, layout="constrained")
    *panels, course = figure.subplots(len(waves) + 1, 1, sharex=True)
    for axes, (title, spec) in zip(panels, analyse_all(waves, audio.stft).items(), strict=True):
        level = decibels(spec)
        draw_level(axes, level, audio.sample_rate, centred(audio.stft), vmin=-DYNAMIC_RANGE, vmax=0)
        axes.set_title(title, loc="left", fontsize=10)
    if frame_ms:
        draw_hops(course, frame_ms, 1000 * audio.stft.hop_length / audio.sample_rate)
        course.legend(frameon=False, fontsize=8, loc="upper right")
    else:
        course.set_axis_off()
    return figure


def draw_hops(axes: Axes, frame_ms: Sequence[float], hop_ms: float) -> None:
    """Draw the time of every hop of a stream beside the time that it lasts, both in ms."""
    times = np.asarray(frame_ms)
    axes.plot(np.arange(len(times)) * hop_ms / 1000, times, linewidth=0.8, color="C0")
    axes.set(xlabel="time in the stream (s)", ylabel="time for one hop (ms)", yscale="log")
    axes.axhline(hop_ms, color="C3", linestyle="--", label="a hop lasts this long")
    axes.grid(alpha=0.3)


def mark_float16(axes: Axes, right: float) -> None:
    """Draw float16's largest number, with its name ending at a share of the axes' width."""
    axes.axhline(FLOAT16_MAX, color=RED, linewidth=1.2)
    place = axes.get_yaxis_transform()
    look: dict[str, Any] = {"ha": "right", "va": "top", "color": RED, "size": 8}
    axes.text(right, FLOAT16_MAX / 1.3, "float16 ends: 65504", transform=place, **look)


def write_in_the_middle(axes: Axes, text: str, **look: Any) -> None:
    """Write a few words where there is nothing to draw."""
    look = {"color": "0.4", **look}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", **look)


def _draw_loss(axes: Axes, steps: Sequence[Line], valid: Sequence[Line]) -> None:
    """Draw the loss of every step, its running mean, and that of the validations."""
    axes.plot(_column(steps, "step"), _column(steps, "loss"), color="C0", alpha=0.35, linewidth=0.9)
    _draw_smoothed(axes, steps, label="training, smoothed", color="C0")
    _draw_points(axes, valid, "loss", label="validation", color="C1")
    losses = [line["loss"] for line in steps] + [line["valid"].get("loss") for line in valid]
    axes.set_yscale(scale_of(losses))
    _name(axes, "loss")
    if steps:
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_rate_and_gradient(axes: Axes, steps: Sequence[Line]) -> None:
    """Draw the gradient norm, and the learning rate on an axis of its own."""
    x, rates = _column(steps, "step"), _column(steps, "lr")
    axes.plot(x, _column(steps, "grad_norm"), color="C2", linewidth=0.9)
    axes.set_yscale("log" if steps else "linear")
    _name(axes, "gradient norm", color="C2")
    rate = axes.twinx()
    rate.plot(x, rates, color="C3", linewidth=1.2, linestyle="--")
    rate.set_ylim(0, 1.25 * max(rates, default=1.0))
    rate.set_ylabel("learning rate", fontsize=9, color="C3")
    rate.yaxis.set_major_formatter("{x:.0e}")
    rate.locator_params(axis="y", nbins=3)
    rate.tick_params(labelsize=8)


def _draw_clip(
    figure: Figure,
    places: Sequence[Any],
    clip: Mapping[str, Tensor],
    audio: AudioConfig,
    step: int | None,
) -> None:
    levels = {name: decibels(spec) for name, spec in analyse_all(clip, audio.stft).items()}
    top = max((float(level.max()) for level in levels.values()), default=0.0)
    scale: dict[str, Any] = {"vmin": top - DYNAMIC_RANGE, "vmax": top}
    for index, (place, (name, level)) in enumerate(zip(places, levels.items(), strict=True)):
        axes = figure.add_subplot(place)
        image = draw_level(axes, level, audio.sample_rate, centred(audio.stft), **scale)
        axes.set_xlabel("time (s)", fontsize=9)
        axes.tick_params(labelsize=8, labelleft=index == 0)
        suffix = f" after step {step}" if name == "estimate" and step is not None else ""
        axes.set_title(f"validation clip: {name}{suffix}", loc="left", fontsize=10)
        if index:
            axes.set_ylabel("")
    if levels:
        bar = figure.add_axes((0.932, 0.09, 0.012, 0.36))
        figure.colorbar(image, cax=bar).set_label("level (dB)", fontsize=8)
        bar.tick_params(labelsize=8)


def _name(axes: Axes, title: str, color: str = "black") -> None:
    """Give a panel over steps its title and the look of all of them."""
    axes.set_title(title, loc="left", fontsize=10, color=color)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8, which="both")


def _draw_smoothed(axes: Axes, steps: Sequence[Line], *, label: str, color: str) -> None:
    finite = [line for line in steps if np.isfinite(line["loss"] or np.nan)]
    window = max(5, len(finite) // 10)
    values = smooth([line["loss"] for line in finite], window) if finite else []
    axes.plot(_column(finite, "step"), values, color=color, linewidth=1.6, label=label)


def _draw_points(axes: Axes, valid: Sequence[Line], name: str, *, label: str, color: str) -> None:
    values = _numbers(line["valid"].get(name) for line in valid)
    axes.plot(_column(valid, "step"), values, "o-", markersize=4, color=color, label=label)


def _steps(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if "loss" in line]


def _validations(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.get("valid")]


def _column(lines: Sequence[Line], name: str) -> list[float]:
    return _numbers(line[name] for line in lines)


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Take None, which stands in a history for what is not finite, to NaN: a gap in the curve."""
    return [float("nan") if value is None else float(value) for value in values]
