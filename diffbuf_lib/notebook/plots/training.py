"""How a run goes: loss, scores, learning rate, gradient, and what one clip sounds like by now.

Lines are those of a run's history (`training.folder.read_history`) or `StepRecord.to_dict()`: one
with "loss" is a step, one with "valid" that is not None a validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.figures import DYNAMIC_RANGE, scale_of, smooth
from diffbuf_lib.notebook.plots.signals import DPI, analyse, decibels, draw_level
from diffbuf_lib.training.folder import ResultsFolder, read_history

Line = Mapping[str, Any]

_UNITS = {"si_sdr": "SI-SDR (dB)", "sdr": "SDR (dB)", "pesq": "PESQ (1 to 4.6)", "estoi": "ESTOI"}


def training_progress(
    lines: Sequence[Line],
    clip: Mapping[str, Tensor],
    audio: AudioConfig,
    *,
    metric: str = "si_sdr",
    clip_step: int | None = None,
) -> Figure:
    """Draw where a run stands.

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
    first = figure.add_subplot(grid[0, :5])
    draw_loss(first, steps, valid)
    first.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))  # the last panel is narrow
    _draw_scores(figure.add_subplot(grid[0, 5:9], sharex=first), valid, metric)
    _draw_rate_and_gradient(figure.add_subplot(grid[0, 9:], sharex=first), steps)
    _draw_clip(figure, grid[1, :].subgridspec(1, max(1, len(clip))), clip, audio, clip_step)
    return figure


def compare_runs(
    runs: Mapping[str, str | Path | Iterable[Line]], *, metric: str = "si_sdr"
) -> Figure:
    """Lay several runs over one another: smoothed loss, and scores of the validations.

    Args:
        runs: name of each run, and its results folder or its lines.
        metric: which score of the validations to draw.
    """
    figure = Figure(figsize=(10, 3.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    losses: list[float | None] = []
    for index, (name, source) in enumerate(runs.items()):
        lines = _lines(source)
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


def draw_loss(axes: Axes, steps: Sequence[Line], valid: Sequence[Line] = ()) -> None:
    """Draw the loss of every step, its running mean, and that of the validations."""
    axes.plot(_column(steps, "step"), _column(steps, "loss"), color="C0", alpha=0.35, linewidth=0.9)
    _draw_smoothed(axes, steps, label="training, smoothed", color="C0")
    _draw_points(axes, valid, "loss", label="validation", color="C1")
    losses = [line["loss"] for line in steps] + [line["valid"].get("loss") for line in valid]
    axes.set(xlabel="step", yscale=scale_of(losses))
    axes.set_title("loss", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8, which="both")
    if steps:
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_smoothed(axes: Axes, steps: Sequence[Line], *, label: str, color: str) -> None:
    finite = [line for line in steps if np.isfinite(line["loss"] or np.nan)]
    window = max(5, len(finite) // 10)
    values = smooth([line["loss"] for line in finite], window) if finite else []
    axes.plot(_column(finite, "step"), values, color=color, linewidth=1.6, label=label)


def _draw_points(axes: Axes, valid: Sequence[Line], name: str, *, label: str, color: str) -> None:
    values = [line["valid"].get(name) for line in valid]
    x = _column(valid, "step")
    axes.plot(x, _numbers(values), marker="o", markersize=4, color=color, label=label)


def _draw_scores(axes: Axes, valid: Sequence[Line], metric: str) -> None:
    _draw_points(axes, valid, metric, label=metric, color="C1")
    axes.set_title(f"validation {_UNITS.get(metric, metric)}", loc="left", fontsize=10)
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if not valid:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "none so far", transform=axes.transAxes, ha="center", va="center", color="0.4"
        )


def _draw_rate_and_gradient(axes: Axes, steps: Sequence[Line]) -> None:
    """Draw the gradient norm, and the learning rate on an axis of its own."""
    x = _column(steps, "step")
    axes.plot(x, _column(steps, "grad_norm"), color="C2", linewidth=0.9)
    axes.set_title("gradient norm", loc="left", fontsize=10, color="C2")
    axes.set(xlabel="step", yscale="log" if steps else "linear")
    rate = axes.twinx()
    rates = _column(steps, "lr")
    rate.plot(x, rates, color="C3", linewidth=1.2, linestyle="--")
    rate.set_ylim(0, 1.25 * max(rates, default=1.0))
    rate.set_ylabel("learning rate", fontsize=9, color="C3")
    rate.yaxis.set_major_formatter("{x:.0e}")
    rate.locator_params(axis="y", nbins=3)
    for each in (axes, rate):
        each.tick_params(labelsize=8, which="both")


def _draw_clip(
    figure: Figure, grid: Any, clip: Mapping[str, Tensor], audio: AudioConfig, step: int | None
) -> None:
    levels = {name: decibels(analyse(wave, audio)) for name, wave in clip.items()}
    top = max((float(level.max()) for level in levels.values()), default=0.0)
    mesh = None
    panels: list[Axes] = []
    for index, (name, level) in enumerate(levels.items()):
        axes = figure.add_subplot(grid[0, index], sharey=panels[0] if panels else None)
        mesh = draw_level(axes, level, audio, vmin=top - DYNAMIC_RANGE, vmax=top)
        axes.set_xlabel("time (s)", fontsize=9)
        axes.tick_params(labelsize=8)
        suffix = f" after step {step}" if name == "estimate" and step is not None else ""
        axes.set_title(f"validation clip: {name}{suffix}", loc="left", fontsize=10)
        if panels:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        panels.append(axes)
    if mesh is not None:
        place = figure.add_axes((0.932, 0.09, 0.012, 0.36))
        figure.colorbar(mesh, cax=place).set_label("level (dB)", fontsize=8)
        place.tick_params(labelsize=8)


def _lines(source: str | Path | Iterable[Line]) -> list[Line]:
    if isinstance(source, str | Path):
        return list(read_history(ResultsFolder(source).history))
    return list(source)


def _steps(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if "loss" in line]


def _validations(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.get("valid")]


def _column(lines: Sequence[Line], name: str) -> list[float]:
    return _numbers([line[name] for line in lines])


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Take None, which stands in a history for what is not finite, to NaN: a gap in the curve."""
    return [float("nan") if value is None else float(value) for value in values]
