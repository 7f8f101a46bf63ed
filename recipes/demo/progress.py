"""Plots of a run's history, for the demo's report, the notebooks and the model's card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.figures import DPI, analyse, centred, draw_spectra, scale_of

# A line of a run's history (`read_history`) or `StepRecord.to_dict()`. With "loss" it is a step;
# with a "valid" that is not None it is a validation.
Line = Mapping[str, Any]
UNITS = {"si_sdr": "SI-SDR (dB)", "sdr": "SDR (dB)", "pesq": "PESQ (1 to 4.6)", "estoi": "ESTOI"}


def write_in_the_middle(axes: Axes, text: str, **look: Any) -> None:
    """Write a few words where there is nothing to draw."""
    look = {"color": "0.4", **look}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", **look)


def training_progress(
    lines: Sequence[Line],  # of the run so far
    clip: Mapping[str, Tensor],  # signals [T] by title, such as mix, estimate and target
    audio: AudioConfig,
    *,
    metric: str = "si_sdr",  # a score of the validations, or "loss"
    clip_step: int | None = None,  # the estimate's
) -> Figure:
    """Draw a run's progress: loss, validation score, gradient norm, learning rate, one clip."""
    # Fixed margins: constrained layout takes longer than all the drawing.
    figure = Figure(figsize=(10, 5.6), dpi=DPI)
    margins = {"left": 0.06, "right": 0.92, "top": 0.94, "bottom": 0.09}
    grid = figure.add_gridspec(2, 12, hspace=0.42, wspace=6, **margins)
    steps, valid = split_history(lines)
    loss = figure.add_subplot(grid[0, :5])
    _draw_loss(loss, steps, valid)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))  # the last panel is narrow
    score = figure.add_subplot(grid[0, 5:9], sharex=loss)
    draw_points(score, valid, metric, label=metric, color="C1")
    _name(score, f"validation {UNITS.get(metric, metric)}")
    if not valid:
        score.set_yticks([])
        write_in_the_middle(score, "none so far")
    _draw_rate_and_gradient(figure.add_subplot(grid[0, 9:], sharex=loss), steps)
    suffix = {} if clip_step is None else {"estimate": f" after step {clip_step}"}
    titles = {f"validation clip: {name}{suffix.get(name, '')}": clip[name] for name in clip}
    places = grid[1, :].subgridspec(1, len(clip))
    _draw_clip([figure.add_subplot(places[0, i]) for i in range(len(clip))], titles, audio)
    return figure


def split_history(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """Return the steps and the validations among the lines of a run."""
    lines = list(lines)
    return [line for line in lines if "loss" in line], [line for line in lines if line.get("valid")]


def draw_smoothed(axes: Axes, steps: Sequence[Line], *, label: str, color: str) -> None:
    """Draw the running mean of the loss; steps without a finite loss are left out."""
    finite = [line for line in steps if np.isfinite(line["loss"] or np.nan)]
    values = smooth([line["loss"] for line in finite], max(5, len(finite) // 10))
    axes.plot(_column(finite, "step"), values, color=color, linewidth=1.6, label=label)


def draw_points(axes: Axes, valid: Sequence[Line], name: str, *, label: str, color: str) -> None:
    """Draw one score of every validation."""
    values = _numbers(line["valid"].get(name) for line in valid)
    axes.plot(_column(valid, "step"), values, "o-", markersize=4, color=color, label=label)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last `window` values, fewer at the start."""
    total, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    smoothed: list[float] = ((total[ends] - total[starts]) / (ends - starts)).tolist()
    return smoothed


def _draw_loss(axes: Axes, steps: Sequence[Line], valid: Sequence[Line]) -> None:
    """Draw the loss of every step, its running mean, and the validation loss."""
    axes.plot(_column(steps, "step"), _column(steps, "loss"), color="C0", alpha=0.35, linewidth=0.9)
    draw_smoothed(axes, steps, label="training, smoothed", color="C0")
    draw_points(axes, valid, "loss", label="validation", color="C1")
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


def _draw_clip(panels: Sequence[Axes], clip: Mapping[str, Tensor], audio: AudioConfig) -> None:
    """Draw spectrograms side by side, with one bar of levels at the right."""
    stft = centred(audio.stft)
    image = draw_spectra(panels, analyse(clip, stft), audio.sample_rate, stft)
    for index, axes in enumerate(panels):
        axes.set_xlabel("time (s)", fontsize=9)
        axes.tick_params(labelsize=8, labelleft=index == 0)
        if index:
            axes.set_ylabel("")
    figure = image.get_figure()
    assert isinstance(figure, Figure)
    bar = figure.add_axes((0.932, 0.09, 0.012, 0.36))
    figure.colorbar(image, cax=bar).set_label("level (dB)", fontsize=8)
    bar.tick_params(labelsize=8)


def _name(axes: Axes, title: str, color: str = "black") -> None:
    """Give a panel over steps its title and the common style."""
    axes.set_title(title, loc="left", fontsize=10, color=color)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8, which="both")


def _column(lines: Sequence[Line], name: str) -> list[float]:
    return _numbers(line[name] for line in lines)


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Map None, which a history has for non-finite values, to NaN: a gap in the curve."""
    return [float("nan") if value is None else float(value) for value in values]
