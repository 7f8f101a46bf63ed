"""One stage of a `Trace`, drawn by what it is: a signal, a spectrum, a map, or values a frame."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.figures import DYNAMIC_RANGE
from diffbuf_lib.notebook.plots.signals import DPI, decibels, draw_level
from diffbuf_lib.trace import Trace

_RATIO_RANGE = 40  # dB that a picture shows of what is neither signal nor spectrum
_SPECTRA = ("Y", "S", "V", "x0_hat")  # compressed spectra; shown as the levels they stand for
_TITLES = {
    "mix": "mix: the noisy signal",
    "target": "target: the clean signal",
    "Y": "Y: spectrum of the noisy signal",
    "S": "S: spectrum of the clean signal",
    "t": "t: diffusion time of every buffer frame",
    "sigma": "sigma(t): standard deviation of the noise in every buffer frame",
    "z": "z: the noise that was drawn",
    "V": "V: the perturbed input, with the buffer to the right of the line",
    "score": "score: what the network says",
    "x0_hat": "x0_hat: the network's estimate of S in the buffer",
    "target_score": "target_score: what the score should be, -z / sigma",
    "loss_map": "loss_map: the loss of every bin",
    "loss": "loss: the mean of loss_map",
}


def stage(trace: Trace, name: str, cfg: Config, *, example: int = 0) -> Figure:
    """Draw one stage of a trace.

    Args:
        trace: from `model.trace`.
        name: of the stage, such as "V".
        cfg: the model's config.
        example: which one of the batch.
    """
    figure = Figure(figsize=(10, 2.9), dpi=DPI, layout="constrained")
    draw_stage(figure.subplots(), trace, name, cfg, example=example)
    return figure


def draw_stage(axes: Axes, trace: Trace, name: str, cfg: Config, *, example: int = 0) -> None:
    """Draw one stage of a trace into given axes; arguments as in `stage`."""
    value = getattr(trace, name).detach().cpu()
    axes.set_title(_TITLES.get(name, name), loc="left", fontsize=10)
    if value.ndim == 0:
        _draw_number(axes, float(value))
    elif name in ("mix", "target"):
        _draw_signal(axes, value[example], cfg.audio.sample_rate)
    elif value.ndim == 2:
        _draw_frames(axes, value[example], name)
    else:
        _draw_map(axes, value[example], name, cfg, frames=trace.Y.shape[-1])


def _draw_number(axes: Axes, value: float) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, f"{value:.6g}", ha="center", va="center", fontsize=28)


def _draw_signal(axes: Axes, wave: Tensor, sample_rate: int) -> None:
    time = np.arange(wave.shape[-1]) / sample_rate
    for channel, samples in enumerate(wave):
        axes.plot(time, samples.numpy(), linewidth=0.5, color=f"C{channel}")
    axes.set(xlabel="time (s)", ylabel="amplitude (full scale 1)", xlim=(0, time[-1]))
    axes.grid(alpha=0.3)


def _draw_frames(axes: Axes, values: Tensor, name: str) -> None:
    axes.plot(range(1, len(values) + 1), values.numpy(), marker="o", markersize=4)
    axes.set(xlabel="frame of the buffer, the newest last", ylabel=name)
    axes.grid(alpha=0.3)


def _draw_map(axes: Axes, value: Tensor, name: str, cfg: Config, *, frames: int) -> None:
    """Draw [F, K] or [F, Kb] at its place in the clip."""
    if name in _SPECTRA:
        value = Spectral.from_config(
            cfg.audio.stft, cfg.preprocessing.magnitude_compression
        ).expand(value)
    level = decibels(value.sqrt() if name == "loss_map" else value)  # a loss is a power
    top, first = float(level.max()), frames - value.shape[-1]
    span = DYNAMIC_RANGE if name in _SPECTRA else _RATIO_RANGE
    mesh = draw_level(axes, level, cfg.audio, vmin=top - span, vmax=top, first=first)
    axes.set_xlabel("time (s)")
    if name == "V":
        hop = cfg.audio.stft.hop_length / cfg.audio.sample_rate
        start = (frames - cfg.diffusion_buffer.buffer_size - 0.5) * hop
        axes.axvline(start, color="white", linewidth=1.2)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(mesh, ax=axes, label="level (dB)", pad=0.01)
