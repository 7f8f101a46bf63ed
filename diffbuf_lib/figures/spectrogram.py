"""Spectrograms of signals and spectra, and figures as files: the one place that draws them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from diffbuf_lib.config import AudioConfig, STFTConfig
from diffbuf_lib.diffusion.spectral import Spectral

Array = npt.NDArray[np.floating[Any]]

WIDTH = 9.0  # inches: 810 pixels, which fit a notebook's page beside its margins
DPI = 90
RED = "#b00020"  # of errors and limits
DYNAMIC_RANGE = 70  # dB below the loudest bin that a spectrogram shows
COMPRESSED_RANGE = 45  # dB for a compressed spectrum; alpha 0.5 halves a range in dB
COLOUR_MAP = "magma"  # perceptually uniform: survives grey print and colour blindness
_FAINTEST = 1e-5  # magnitude that is drawn for an exact zero
_QUIETEST_TOP = -40.0  # dB; silence is dark, whatever it is shown beside


def spectrograms(waves: Mapping[str, Tensor], sample_rate: int, stft: STFTConfig) -> Figure:
    """Draw signals one below the other, on one time axis; 0 dB is a full-scale sine.

    Args:
        waves: title and signal [T], full scale 1; all of one length.
        sample_rate: Hz.
        stft: frames and bins of the picture.
    """
    figure, panels = _stack(len(waves), 1.9 * len(waves) + 0.5)
    draw_spectra(panels, analyse_all(waves, stft), sample_rate, centred(stft))
    panels[-1].set_xlabel("time (s)")
    return figure


def spectra(
    spectra: Mapping[str, Tensor], audio: AudioConfig, dynamic_range: float = COMPRESSED_RANGE
) -> Figure:
    """Draw complex spectra one below the other, on one time axis and one dB scale.

    Args:
        spectra: title and spectrum [F, K] complex; all of one shape.
        audio: gives Hz and seconds.
        dynamic_range: dB below the loudest bin that are told apart.
    """
    figure, panels = _stack(len(spectra), 1.9 * len(spectra) + 0.5)
    draw_spectra(panels, spectra, audio.sample_rate, audio.stft, dynamic_range)
    panels[-1].set_xlabel("time (s)")
    return figure


def buffer_spectra(
    spectra: Mapping[str, Tensor], t: Tensor, sigma: Tensor, audio: AudioConfig
) -> Figure:
    """Draw spectra with the buffer marked, and below them diffusion time and sigma of every frame.

    Args:
        spectra: title and spectrum [F, K] complex, such as Y, S and V; all of one shape.
        t: [Kb], diffusion times of the last Kb frames.
        sigma: [Kb], of the same frames.
        audio: gives Hz and seconds.
    """
    figure, panels = _stack(len(spectra) + 1, 1.75 * len(spectra) + 2.0)
    *pictures, below = panels
    draw_spectra(pictures, spectra, audio.sample_rate, audio.stft, COMPRESSED_RANGE, beside=[below])
    K, Kb = next(iter(spectra.values())).shape[-1], t.shape[-1]
    times, half = frame_times(K, audio.sample_rate, audio.stft), _half_hop(audio)
    for values, name in ((t, "diffusion time t"), (sigma, "noise sigma(t)")):
        whole = np.concatenate([np.zeros(K - Kb), to_numpy(values)])
        below.plot(times, whole, ".-", markersize=4, linewidth=1, label=name)
    below.legend(frameon=False, loc="upper left")
    below.set(xlabel="time (s)", ylabel="t, sigma", ylim=(-0.05, 1.05))
    below.grid(alpha=0.3)
    edge = times[K - Kb] - half
    for axes in panels:
        colour = "0.3" if axes is below else "white"
        axes.axvline(edge, color=colour, linestyle="--", linewidth=1.2)
    below.axvspan(edge, times[-1] + half, color="C1", alpha=0.12, linewidth=0)
    below.set_title(f"the buffer: the last {Kb} of {K} frames", loc="right", size=9)
    return figure


def refused(Y: Tensor, message: str, audio: AudioConfig) -> Figure:
    """Draw a spectrum [F, K] alone, and above it why no buffer fits it."""
    figure, (axes,) = _stack(1, 3.0)
    draw_spectra([axes], {"": Y}, audio.sample_rate, audio.stft, COMPRESSED_RANGE)
    axes.set_title(message, loc="left", fontsize=9, color=RED, wrap=True)
    axes.set_xlabel("time (s)")
    return figure


def draw_spectra(
    panels: Sequence[Axes],
    spectra: Mapping[str, Tensor],
    sample_rate: int,
    stft: STFTConfig,
    dynamic_range: float = DYNAMIC_RANGE,
    beside: Sequence[Axes] = (),
) -> None:
    """Draw complex spectra [F, K] into axes, on one dB scale with one colour bar.

    Args:
        panels: one for each spectrum.
        spectra: title and spectrum.
        sample_rate: Hz.
        stft: that the spectra were made with.
        dynamic_range: dB.
        beside: axes that make room for the colour bar too, so that their time axis stays aligned.
    """
    levels = {name: decibels(spec) for name, spec in spectra.items()}
    top = max(_QUIETEST_TOP, *(float(level.max()) for level in levels.values()))
    for axes, (name, level) in zip(panels, levels.items(), strict=True):
        image = draw_level(axes, level, sample_rate, stft, vmin=top - dynamic_range, vmax=top)
        axes.set_title(name, loc="left", fontsize=10)
    add_colour_bar(image, [*panels, *beside])


def draw_level(
    axes: Axes,
    level: Array,
    sample_rate: int,
    stft: STFTConfig,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    first: int = 0,
) -> AxesImage:
    """Draw one picture [F, K] of levels or magnitudes with axes in kHz and seconds.

    Args:
        axes: where to draw.
        level: [F, K].
        sample_rate: Hz.
        stft: that the picture was made with.
        vmin: the value that is darkest; None for the smallest.
        vmax: the value that is brightest; None for the largest.
        first: number of the first frame in its clip.
    """
    bins, frames = level.shape
    times = frame_times(first + frames, sample_rate, stft)[first:]
    half, half_bin = stft.hop_length / sample_rate / 2, sample_rate / stft.n_fft / 2000  # s, kHz
    highest = (2 * bins - 1) * half_bin
    image = axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=COLOUR_MAP,
        vmin=vmin,
        vmax=vmax,
        extent=(times[0] - half, times[-1] + half, -half_bin, highest),
    )
    axes.set_ylabel("frequency (kHz)")
    return image


def add_colour_bar(image: AxesImage, panels: Sequence[Axes], **options: Any) -> None:
    """Add a bar of levels beside the axes of a picture."""
    figure = panels[0].get_figure()
    assert figure is not None
    figure.colorbar(image, ax=list(panels), label="level (dB)", **options)


def analyse_all(waves: Mapping[str, Tensor], stft: STFTConfig) -> dict[str, Tensor]:
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
    times: Array = (first + stft.hop_length * np.arange(count)) / sample_rate
    return times


def decibels(spec: Tensor) -> Array:
    """Return 20 log10 of the magnitudes of a tensor; zeros become -100 dB."""
    level: Array = 20 * np.log10(np.maximum(to_numpy(spec.abs()), _FAINTEST))
    return level


def to_numpy(tensor: Tensor) -> Array:
    """Return a real tensor as an array; NaN and Inf, which have no place in a picture, as 0."""
    array: Array = tensor.detach().nan_to_num(posinf=0, neginf=0).cpu().numpy()
    return array


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


def to_pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return the figure as [H, W, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _stack(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, one below the other on one time axis."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _half_hop(audio: AudioConfig) -> float:
    return audio.stft.hop_length / audio.sample_rate / 2
