"""Figures as pure functions: data in, a matplotlib Figure out.

Never pyplot: it is not thread-safe and keeps every figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.config import STFTConfig
from diffbuf_lib.diffusion.spectral import Spectral

DYNAMIC_RANGE = 70  # dB below the loudest bin that a spectrogram shows
COLOUR_MAP = "magma"  # perceptually uniform: survives grey print and colour blindness


def spectrograms(waves: Mapping[str, Tensor], sample_rate: int, stft: STFTConfig) -> Figure:
    """Draw signals one below the other, on one time axis and one dB scale.

    Args:
        waves: title and signal [T], full scale 1; all of one length.
        sample_rate: Hz.
        stft: frames and bins of the picture.
    """
    levels = {name: _level(wave, stft) for name, wave in waves.items()}
    top = max(float(level.max()) for level in levels.values())
    figure = Figure(figsize=(9, 1.9 * len(waves) + 0.4), dpi=90, layout="constrained")
    panels = figure.subplots(len(waves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, wave) in zip(panels, waves.items(), strict=True):
        axes.imshow(
            levels[name],
            origin="lower",
            aspect="auto",
            extent=(0, wave.shape[-1] / sample_rate, 0, sample_rate / 2000),
            vmin=top - DYNAMIC_RANGE,
            vmax=top,
            cmap=COLOUR_MAP,
        )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("frequency (kHz)", fontsize=8)
    panels[-1].set_xlabel("time (s)", fontsize=8)
    figure.colorbar(panels[0].images[0], ax=list(panels), label="level (dB)")
    return figure


def scale_of(values: Iterable[float | None]) -> str:
    """Return the scale of an axis of losses: log, or linear where one is not above 0.

    With training.snr_weight a loss may be negative.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return "log" if known and min(known) > 0 else "linear"


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
    figure = Figure(figsize=(7.5, 3), dpi=90, layout="constrained")
    axes = figure.subplots()
    for index, (name, x, y) in enumerate(series):
        marker = "o" if len(x) < 30 else None
        axes.plot(x, y, label=name, marker=marker, markersize=3, color=f"C{index}", linewidth=1.2)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over the last `window` values, fewer at the start."""
    total = np.cumsum(np.asarray(values, dtype=np.float64))
    lagged = np.concatenate([np.zeros(window), total[:-window]])[: len(total)]
    counts = np.minimum(np.arange(len(total)) + 1, window)
    smoothed: list[float] = ((total - lagged) / counts).tolist()
    return smoothed


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def to_jpeg(figure: Figure) -> bytes:
    """Return the figure as a JPEG file's bytes: a tenth of a spectrogram's PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 88})
    return buffer.getvalue()


def to_pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the figure as [H, W, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _level(wave: Tensor, stft: STFTConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return |STFT| of a signal [T] in dB, [F, K]; non-finite samples are drawn as silence."""
    analysis = Spectral(**stft.model_copy(update={"center": True}).model_dump(), alpha=1, beta=1)
    clean = torch.nan_to_num(wave.detach().float().cpu(), posinf=0, neginf=0)
    magnitude = analysis(clean[None])[0].abs()
    level: np.ndarray[Any, np.dtype[np.float32]] = (20 * torch.log10(magnitude + 1e-5)).numpy()
    return level
