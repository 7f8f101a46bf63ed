"""Pictures as pure functions: data in, a matplotlib Figure out; and audio for players in pages.

pyplot is not used: it is not thread-safe and keeps every figure.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from diffbuf_lib.config import STFTConfig
from diffbuf_lib.diffusion.spectral import Spectral

Array = npt.NDArray[np.floating[Any]]

WIDTH = 9.0  # inches: 810 pixels, which fit a notebook's page beside its margins
DPI = 90
RED = "#b00020"  # of errors and limits
DYNAMIC_RANGE = 70  # dB below the loudest bin that a spectrogram shows
COLOUR_MAP = "magma"  # perceptually uniform: survives grey print and colour blindness
_FAINTEST = 1e-5  # magnitude that is drawn for an exact zero
_QUIETEST_TOP = -40.0  # dB, lowest top of the colour scale, so that silence is dark
_PEAK = 0.9  # of full scale; quiet speech beside loud noise could not be heard otherwise
_LOWEST_PEAK = 1e-4  # anything quieter is silence, and not raised to _PEAK


def spectrograms(waves: Mapping[str, Tensor], sample_rate: int, stft: STFTConfig) -> Figure:
    """Draw signals [T] by title, of equal length, on one time axis; 0 dB is a full-scale sine."""
    figure, panels = stack(len(waves), 1.9 * len(waves) + 0.5)
    image = draw_spectra(panels, analyse(waves, stft), sample_rate, centred(stft))
    add_colour_bar(image, panels)
    return figure


def lr_range(lrs: Sequence[float], losses: Sequence[float], proposed: float | None) -> Figure:
    """Draw the loss over the learning rate of a range test, and the rate that it proposes."""
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, "o-", markersize=3, linewidth=1.2)
    axes.set(xscale="log", yscale=scale_of(losses), xlabel="learning rate", ylabel="loss")
    axes.grid(alpha=0.3)
    if proposed is not None:
        axes.axvline(proposed, color=RED, linestyle="--")
        axes.set_title(f"falls fastest at {proposed:.1e}", loc="left", fontsize=10, color=RED)
    return figure


def scale_of(values: Iterable[float | None]) -> str:
    """Return the scale of an axis of losses: log, or linear if any (snr_weight) is negative."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return "log" if known and min(known) > 0 else "linear"


def draw_spectra(
    panels: Sequence[Axes],
    spectra: Mapping[str, Tensor],
    sample_rate: int,
    stft: STFTConfig,
    dynamic_range: float = DYNAMIC_RANGE,
) -> AxesImage:
    """Draw complex spectra [F, K] by title into axes, on one dB scale; return the last picture."""
    levels = {name: decibels(spec) for name, spec in spectra.items()}
    top = max(_QUIETEST_TOP, *(float(level.max()) for level in levels.values()))
    for axes, (name, level) in zip(panels, levels.items(), strict=True):
        image = draw_level(axes, level, sample_rate, stft, vmin=top - dynamic_range, vmax=top)
        axes.set_title(name, loc="left", fontsize=10)
    return image


def draw_level(
    axes: Axes,
    level: Array,
    sample_rate: int,
    stft: STFTConfig,
    *,
    vmin: float | None = None,  # the darkest value; None: the smallest
    vmax: float | None = None,
    first: int = 0,  # index of the first frame in its clip
) -> AxesImage:
    """Draw one picture [F, K] of levels or magnitudes with axes in kHz and seconds."""
    bins, frames = level.shape
    times = frame_times(first + frames, sample_rate, stft)[first:]
    half, half_bin = stft.hop_length / sample_rate / 2, sample_rate / stft.n_fft / 2000  # s, kHz
    highest = (2 * bins - 1) * half_bin
    extent = (times[0] - half, times[-1] + half, -half_bin, highest)
    look: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(level, cmap=COLOUR_MAP, vmin=vmin, vmax=vmax, extent=extent, **look)
    axes.set_ylabel("frequency (kHz)")
    return image


def add_colour_bar(image: AxesImage, panels: Sequence[Axes], **options: Any) -> None:
    """Add a bar of levels beside the axes of a picture."""
    figure = panels[0].get_figure()
    assert figure is not None
    figure.colorbar(image, ax=list(panels), label="level (dB)", **options)


def stack(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, one below the other on one time axis."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    panels[-1].set_xlabel("time (s)")
    return figure, panels


def analyse(waves: Mapping[str, Tensor], stft: STFTConfig) -> dict[str, Tensor]:
    """Return the spectrum [F, K] of every signal [T], uncompressed; 1 is a full-scale sine.

    Frames are centred whatever the config says, so that the picture covers the whole signal.
    """
    analysis = Spectral(**centred(stft).model_dump(), alpha=1, beta=1)
    full_scale = analysis.window.sum() / 2  # what a sine of amplitude 1 reaches in its bin
    return {
        name: analysis(wave.detach().float().cpu()[None])[0] / full_scale
        for name, wave in waves.items()
    }


def centred(stft: STFTConfig) -> STFTConfig:
    """Return the same frames, centred."""
    return stft.model_copy(update={"center": True})


def frame_times(count: int, sample_rate: int, stft: STFTConfig) -> Array:
    """Return the middle of every frame in seconds, [K]."""
    first = 0 if stft.center else stft.n_fft / 2
    return np.asarray((first + stft.hop_length * np.arange(count)) / sample_rate)


def decibels(spec: Tensor) -> Array:
    """Return 20 log10 of the magnitudes of a tensor; zeros become -100 dB."""
    return np.asarray(20 * np.log10(np.maximum(to_numpy(spec.abs()), _FAINTEST)))


def to_numpy(tensor: Tensor) -> Array:
    """Return a real tensor as an array, with NaN and Inf, which cannot be drawn, as 0."""
    return np.asarray(tensor.detach().nan_to_num(posinf=0, neginf=0).cpu())


def to_png(figure: Figure, **options: Any) -> bytes:
    """Return the figure as a PNG file's bytes; options as for `Figure.savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def to_pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return the figure as [H, W, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def player_wav(wave: Tensor, sample_rate: int) -> bytes:
    """Return a signal [T] as a 16-bit wav file at 0.9 of full scale; non-finite samples are 0."""
    buffer = io.BytesIO()
    samples = player_gain(wave) * to_numpy(wave.float())
    soundfile.write(buffer, samples, sample_rate, format="WAV")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as a data URI for a page; kind is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def player_gain(wave: Tensor) -> float:
    """Return the gain that a player applies to a signal, so that all have one peak."""
    return _PEAK / max(_LOWEST_PEAK, float(np.abs(to_numpy(wave.float())).max()))
