"""Signals, spectrograms and what happens to them between a file and the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import librosa.display
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.figures import COLOUR_MAP, DYNAMIC_RANGE

Array = npt.NDArray[np.floating[Any]]

DPI = 90
WIDTH = 9.0  # inches: 810 pixels, which fit a notebook's page beside its margins
COMPRESSED_RANGE = 45  # dB that a compressed spectrogram shows; alpha 0.5 halves a range in dB
_LEVELS = [float(level) for level in range(-100, 1, 2)]  # dB
_FAINTEST = 1e-5  # magnitude that is drawn for an exact zero
_QUIETEST_TOP = -40.0  # dB; silence is dark, whatever it is shown beside


def spectra(
    spectra: Mapping[str, Tensor], audio: AudioConfig, dynamic_range: float = COMPRESSED_RANGE
) -> Figure:
    """Draw complex spectra one below the other, on one time axis and one dB scale.

    Args:
        spectra: title and spectrum [F, K] complex; all of one shape.
        audio: gives Hz and seconds.
        dynamic_range: dB below the loudest bin that are told apart.
    """
    figure = Figure(figsize=(WIDTH, 1.9 * len(spectra) + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(spectra), 1, sharex=True, squeeze=False)[:, 0]
    draw_spectra(list(panels), spectra, audio, dynamic_range)
    panels[-1].set_xlabel("time (s)")
    return figure


def wave_spectra(waves: Mapping[str, Tensor], audio: AudioConfig) -> Figure:
    """Draw the spectrograms of signals, before any compression; 0 dB is a full-scale sine.

    Args:
        waves: title and signal [T], full scale 1; all of one length.
        audio: gives frames and bins, Hz and seconds.
    """
    frames = {name: analyse(wave, audio) for name, wave in waves.items()}
    return spectra(frames, audio, DYNAMIC_RANGE)


def analyse(wave: Tensor, audio: AudioConfig) -> Tensor:
    """Return the spectrum of a signal before any compression; 1 is a full-scale sine.

    Args:
        wave: [T], full scale 1.
        audio: gives frames and bins.

    Returns:
        [F, K] complex.
    """
    analysis = Spectral(**audio.stft.model_dump(), alpha=1, beta=1)
    full_scale = analysis.window.sum() / 2  # what a sine of amplitude 1 reaches in its bin
    spectrum: Tensor = analysis(wave[None])[0] / full_scale
    return spectrum


def waveforms(waves: Mapping[str, Tensor], sample_rate: int) -> Figure:
    """Draw signals one below the other, on one time axis and one scale.

    Args:
        waves: title and signal [T], full scale 1.
        sample_rate: Hz.
    """
    figure = Figure(figsize=(WIDTH, 1.3 * len(waves) + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(waves), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, wave) in zip(panels, waves.items(), strict=True):
        samples = to_numpy(wave)
        axes.plot(np.arange(len(samples)) / sample_rate, samples, linewidth=0.6, color="C0")
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(x=0)
    panels[-1].set_xlabel("time (s)")
    figure.supylabel("amplitude (full scale 1)", fontsize=10)
    return figure


def snr_histogram(snr_db: Sequence[float], bins: int = 20) -> Figure:
    """Draw how often each SNR occurs; clips without noise or without speech are only counted.

    Args:
        snr_db: SNR of every clip, dB; may hold inf (no noise) and -inf (no speech).
        bins: bars, at most.
    """
    values = np.asarray(snr_db, dtype=float)
    finite = values[np.isfinite(values)]
    figure = Figure(figsize=(WIDTH, 2.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    if len(finite):
        axes.hist(finite, bins=min(bins, max(1, len(finite))), color="C0", edgecolor="white")
        median = float(np.median(finite))
        axes.axvline(median, color="C1", linestyle="--", label=f"median {median:.1f} dB")
        axes.legend(frameon=False)
    others = len(values) - len(finite)
    left_out = f"; {others} without noise or without speech are not shown" if others else ""
    axes.set_title(f"{len(finite)} clips{left_out}", loc="left", fontsize=10)
    axes.set(xlabel="SNR of the mixture (dB)", ylabel="clips")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, axis="y")
    return figure


def compression(raw: Tensor, compressed: Tensor, audio: AudioConfig) -> Figure:
    """Draw a spectrum before and after compression, as the network would see it: not in dB.

    Args:
        raw: [F, K] complex, STFT coefficients.
        compressed: [F, K] complex, the same after compression.
        audio: gives Hz and seconds.
    """
    figure = Figure(figsize=(WIDTH, 5.4), dpi=DPI, layout="constrained")
    grid = figure.subplot_mosaic([["before", "after"], ["spread", "spread"]])
    spread = grid["spread"]
    pairs = (("before", "before: |c|", raw), ("after", "after: beta |c|^alpha", compressed))
    for key, title, spec in pairs:
        magnitude = to_numpy(spec.abs())
        mesh = draw_level(grid[key], magnitude, audio)
        grid[key].set_title(f"{title}, linear", loc="left", fontsize=10)
        grid[key].set_xlabel("time (s)")
        figure.colorbar(mesh, ax=grid[key], label="magnitude")
        level = 20 * np.log10(np.maximum(magnitude, _FAINTEST) / max(magnitude.max(), _FAINTEST))
        spread.hist(level.ravel(), bins=_LEVELS, histtype="step", label=title)
    spread.set(xlabel="magnitude below the largest bin (dB)", ylabel="bins", xlim=(-100, 0))
    spread.legend(frameon=False, loc="upper left")
    spread.grid(alpha=0.3)
    return figure


def round_trip(wave: Tensor, back: Tensor, sample_rate: int) -> Figure:
    """Draw a signal, and the error of the one that came back from its spectrum.

    Args:
        wave: [T], full scale 1.
        back: [T], the same after analysis and synthesis.
        sample_rate: Hz.
    """
    there, error = to_numpy(wave), to_numpy((back - wave).abs())
    time = np.arange(len(there)) / sample_rate
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(time, there, linewidth=0.6)
    above.set(ylabel="amplitude")
    above.set_title("there and back", loc="left", fontsize=10)
    below.plot(time, 20 * np.log10(np.maximum(error, 1e-10)), linewidth=0.6, color="C1")
    step = 20 * np.log10(2**-15)
    below.axhline(step, color="0.4", linestyle="--", linewidth=1)
    name = {"text": "one step of 16-bit audio", "ha": "right", "va": "bottom", "color": "0.3"}
    below.annotate(xy=(time[-1], step), xytext=(-4, 3), textcoords="offset points", **name)
    below.set(xlabel="time (s)", ylabel="error (dB)", ylim=(-205, 10))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.margins(x=0)
    return figure


def draw_spectra(
    panels: Sequence[Axes],
    spectra: Mapping[str, Tensor],
    audio: AudioConfig,
    dynamic_range: float,
    beside: Sequence[Axes] = (),
) -> None:
    """Draw complex spectra [F, K] into axes, on one dB scale with one colour bar.

    Args:
        panels: one for each spectrum.
        spectra: title and spectrum.
        audio: gives Hz and seconds.
        dynamic_range: dB.
        beside: axes that make room for the colour bar too, so that their time axis stays aligned.
    """
    levels = {name: decibels(spec) for name, spec in spectra.items()}
    top = max(_QUIETEST_TOP, *(float(level.max()) for level in levels.values()))
    for axes, (name, level) in zip(panels, levels.items(), strict=True):
        mesh = draw_level(axes, level, audio, vmin=top - dynamic_range, vmax=top)
        axes.set_title(name, loc="left", fontsize=10)
    figure = panels[0].get_figure()
    assert figure is not None
    figure.colorbar(mesh, ax=[*panels, *beside], label="level (dB)")


def draw_level(
    axes: Axes,
    level: Array,
    audio: AudioConfig,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    first: int = 0,
) -> QuadMesh:
    """Draw one picture [F, K] of levels or magnitudes with axes in Hz and seconds.

    Args:
        axes: where to.
        level: [F, K].
        audio: gives Hz and seconds.
        vmin: the value that is darkest; None for the smallest.
        vmax: the value that is brightest; None for the largest.
        first: number of the first frame in its clip.
    """
    mesh: QuadMesh = librosa.display.specshow(
        level,
        sr=audio.sample_rate,
        n_fft=audio.stft.n_fft,
        hop_length=audio.stft.hop_length,
        x_coords=frame_times(first + level.shape[-1], audio)[first:],
        x_axis="s",
        y_axis="hz",
        cmap=COLOUR_MAP,
        ax=axes,
        vmin=vmin,
        vmax=vmax,
    )
    axes.xaxis.set_major_locator(AutoLocator())  # librosa's takes steps of 0.15 s
    axes.set(xlabel="", ylabel="frequency (Hz)")
    return mesh


def frame_times(count: int, audio: AudioConfig) -> Array:
    """Return the middle of every frame in seconds, [K]."""
    first = 0 if audio.stft.center else audio.stft.n_fft / 2
    times: Array = (first + audio.stft.hop_length * np.arange(count)) / audio.sample_rate
    return times


def decibels(spec: Tensor) -> Array:
    """Return 20 log10 of the magnitudes of a complex tensor; zeros become -100 dB."""
    level: Array = 20 * np.log10(np.maximum(to_numpy(spec.abs()), _FAINTEST))
    return level


def to_numpy(tensor: Tensor) -> Array:
    """Return a real tensor as an array; NaN and Inf, which have no place in a picture, as 0."""
    array: Array = tensor.detach().nan_to_num(posinf=0, neginf=0).cpu().numpy()
    return array
