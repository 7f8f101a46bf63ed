"""Plots of one stage of a `Trace`, by its kind, and of training progress on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.figures import (
    DPI,
    DYNAMIC_RANGE,
    add_colour_bar,
    decibels,
    draw_level,
    scale_of,
)
from diffbuf_lib.trace import Trace
from recipes.demo.progress import write_in_the_middle

_RATIO_RANGE = 40  # dB shown of stages that are neither signal nor spectrum
_MOST_MODULES = 14  # that fit into a small picture
_SPECTRA = ("Y", "S", "V", "x0_hat")  # compressed spectra; shown as the levels they represent
_TITLES = {
    "mix": "the noisy signal",
    "target": "the clean signal",
    "Y": "spectrum of the noisy signal",
    "S": "spectrum of the clean signal",
    "t": "diffusion time of every buffer frame",
    "sigma": "standard deviation of the noise in every buffer frame",
    "z": "the noise that was drawn",
    "V": "the perturbed input, with the buffer to the right of the line",
    "score": "what the network says",
    "x0_hat": "the network's estimate of S in the buffer",
    "target_score": "what the score should be, -z / sigma",
    "loss_map": "the loss of every bin",
    "loss": "the mean of loss_map",
    "level": "the running level that Y and S are divided by",
}


def stage(trace: Trace, name: str, cfg: Config, *, example: int = 0) -> Figure:
    """Draw one stage of a trace, such as "V", of one example of the batch."""
    figure = Figure(figsize=(10, 2.9), dpi=DPI, layout="constrained")
    _draw_stage(figure.subplots(), trace, name, cfg, example)
    return figure


def gradients(norms: Mapping[str, float]) -> Figure:
    """Draw the gradient norm of every module on a log axis; if there are many, the largest."""
    figure = Figure(figsize=(8, 3.2), dpi=DPI, layout="constrained")
    _draw_gradients(figure.subplots(), norms)
    return figure


def stepping(
    losses: Sequence[float],
    norms: Mapping[str, float],
    trace: Trace,
    name: str,
    cfg: Config,
    *,
    example: int = 0,
) -> Figure:
    """Draw the losses of a batch's steps, and gradient norms and a stage of the last one."""
    figure = Figure(figsize=(10, 5.6), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _draw_losses(figure.add_subplot(grid[0, 0]), losses)
    _draw_gradients(figure.add_subplot(grid[0, 1]), norms)
    _draw_stage(figure.add_subplot(grid[1, :]), trace, name, cfg, example)
    return figure


def _draw_stage(axes: Axes, trace: Trace, name: str, cfg: Config, example: int) -> None:
    value = getattr(trace, name).detach().cpu()
    axes.set_title(f"{name}: {_TITLES[name]}", loc="left", fontsize=10)
    if value.ndim == 0:
        axes.axis("off")
        write_in_the_middle(axes, f"{float(value):.6g}", fontsize=28)
    elif name in ("mix", "target"):
        seconds = np.arange(value.shape[-1]) / cfg.audio.sample_rate
        axes.plot(seconds, value[example].T.numpy(), linewidth=0.5)
        axes.set(xlabel="time (s)", ylabel="amplitude (full scale 1)", xlim=(0, seconds[-1]))
        axes.grid(alpha=0.3)
    elif value.ndim == 2:
        axes.plot(range(1, value.shape[-1] + 1), value[example].numpy(), "o-", markersize=4)
        axes.set(xlabel="frame, the newest last", ylabel=name)
        axes.grid(alpha=0.3)
    else:
        _draw_map(axes, value[example], name, cfg, frames=trace.Y.shape[-1])


def _draw_map(axes: Axes, value: Tensor, name: str, cfg: Config, *, frames: int) -> None:
    """Draw [F, K] or [F, Kb] at its place in the clip."""
    stft, rate = cfg.audio.stft, cfg.audio.sample_rate
    if name in _SPECTRA:
        value = Spectral.from_config(stft, cfg.preprocessing.magnitude_compression).expand(value)
    level = decibels(value.sqrt() if name == "loss_map" else value)  # a loss is a power
    top, first = float(level.max()), frames - value.shape[-1]
    span = DYNAMIC_RANGE if name in _SPECTRA else _RATIO_RANGE
    image = draw_level(axes, level, rate, stft, vmin=top - span, vmax=top, first=first)
    axes.set_xlabel("time (s)")
    if name == "V":
        start = frames - cfg.diffusion_buffer.buffer_size - 0.5
        axes.axvline(start * stft.hop_length / rate, color="white", linewidth=1.2)
    add_colour_bar(image, [axes], pad=0.01)


def _draw_gradients(axes: Axes, norms: Mapping[str, float]) -> None:
    largest = sorted(norms, key=lambda module: -norms[module])[:_MOST_MODULES]
    shown = [module for module in norms if module in largest]
    part = f", the {len(shown)} largest of {len(norms)}" if len(shown) < len(norms) else ""
    axes.set_title(f"gradient norm by module{part}", loc="left", fontsize=10)
    if not norms:
        axes.axis("off")
        write_in_the_middle(axes, "no step made yet")
    names = [module.removeprefix("network.") for module in shown]
    axes.barh(names, [norms[module] for module in shown], color="C2")
    axes.invert_yaxis()
    known = [norm for norm in norms.values() if 0 < norm < math.inf]
    if known:  # whole decades: labels between them would run into one another
        low, high = math.log10(min(known)), math.log10(max(known)) + 0.01
        axes.set(xscale="log", xlim=(10 ** math.floor(low), 10 ** math.ceil(high)))
        axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("norm", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, axis="x")


def _draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, marker="o" if len(losses) < 30 else "", ms=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("loss of this batch", loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    if losses:
        axes.set_yscale(scale_of(losses))
    else:
        write_in_the_middle(axes, "no step made yet")
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.3)
