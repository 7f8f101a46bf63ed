"""Frames and the buffer: how many there are, which ones are marked, how the noise rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.config import AudioConfig, Config
from diffbuf_lib.notebook.plots.signals import (
    COMPRESSED_RANGE,
    DPI,
    WIDTH,
    draw_spectra,
    frame_times,
    to_numpy,
)


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
    count = len(spectra)
    figure = Figure(figsize=(WIDTH, 1.75 * count + 2.0), dpi=DPI, layout="constrained")
    panels: Sequence[Axes] = list(figure.subplots(count + 1, 1, sharex=True))
    draw_spectra(panels[:-1], spectra, audio, COMPRESSED_RANGE, beside=panels[-1:])
    K, Kb = next(iter(spectra.values())).shape[-1], t.shape[-1]
    times = frame_times(K, audio)
    for values, name in ((t, "diffusion time t"), (sigma, "noise sigma(t)")):
        whole = np.concatenate([np.zeros(K - Kb), to_numpy(values)])
        panels[-1].plot(times, whole, ".-", markersize=4, linewidth=1, label=name)
    panels[-1].legend(frameon=False, loc="upper left")
    panels[-1].set(xlabel="time (s)", ylabel="t, sigma", ylim=(-0.05, 1.05))
    panels[-1].grid(alpha=0.3)
    _mark(panels, times, Kb, audio)
    return figure


def refused(Y: Tensor, message: str, audio: AudioConfig) -> Figure:
    """Draw a spectrum alone, and above it why no buffer fits it.

    Args:
        Y: [F, K] complex.
        message: what the config check says.
        audio: gives Hz and seconds.
    """
    figure = Figure(figsize=(WIDTH, 3.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    draw_spectra([axes], {"": Y}, audio, COMPRESSED_RANGE)
    axes.set_title(message, loc="left", fontsize=9, color="#b00020", wrap=True)
    axes.set_xlabel("time (s)")
    return figure


def frame_counts(cfg: Config) -> Figure:
    """Draw how many frames clips of different lengths have, beside what the config asks for.

    Args:
        cfg: gives the STFT, the clip's length, B and K.
    """
    stft, rate, chunk = cfg.audio.stft, cfg.audio.sample_rate, cfg.audio.chunk_size
    # Up to where both the clip and the window K end, with some room.
    longest = int(1.3 * max(chunk, cfg.num_frames * stft.hop_length + stft.n_fft))
    samples = np.linspace(1, longest, 600).astype(int)
    figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for center, style in ((True, "-"), (False, "--")):
        framing = stft.model_copy(update={"center": center})
        counts = [framing.num_frames(int(n)) for n in samples]
        name = "centred frames" if center else "frames from sample 0"
        ours = " (this config)" if center == stft.center else ""
        axes.step(samples / rate, counts, style, where="post", label=name + ours)
    B, frames = cfg.diffusion_buffer.buffer_size, cfg.audio.num_frames
    axes.axhline(B, color="C2", linestyle="-.", linewidth=1, label=f"buffer_size B = {B}")
    axes.axhline(cfg.num_frames, color="C3", linestyle=":", label=f"window K = {cfg.num_frames}")
    axes.plot(chunk / rate, frames, "o", color="black", label=f"chunk_size: {frames} frames")
    axes.set(xlabel="length of the clip (s)", ylabel="STFT frames")
    axes.set(xlim=(0, longest / rate), ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    return figure


def noise_along_buffer(sigma: Tensor, measured: Tensor) -> Figure:
    """Draw the noise that V holds in every frame of the buffer beside the sigma it should have.

    Args:
        sigma: [Kb], by the formula.
        measured: [Kb], RMS of V minus its mean over the bins of a frame.
    """
    frames = np.arange(1, sigma.shape[-1] + 1)
    figure = Figure(figsize=(WIDTH, 2.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(frames, to_numpy(sigma), color="C0", label="sigma(t), the formula")
    axes.plot(frames, to_numpy(measured), "o", color="C1", label="measured in V")
    axes.set(xlabel="frame of the buffer (1 leaves next, B has just come)", ylabel="noise RMS")
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def _mark(panels: Sequence[Axes], times: np.ndarray, Kb: int, audio: AudioConfig) -> None:
    """Draw where the buffer begins, and name its two sides."""
    half = audio.stft.hop_length / audio.sample_rate / 2
    edge = times[len(times) - Kb] - half
    for axes in panels:
        on_picture = axes is not panels[-1]
        colour = "white" if on_picture else "0.3"
        axes.axvline(edge, color=colour, linestyle="--", linewidth=1.2)
    panels[-1].axvspan(edge, times[-1] + half, color="C1", alpha=0.12, linewidth=0)
    panels[-1].set_title(f"the buffer: the last {Kb} of {len(times)} frames", loc="right", size=9)
