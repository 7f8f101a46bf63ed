"""Plots that only one notebook needs. Never pyplot: it keeps every figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from diffbuf_lib import figures
from diffbuf_lib.config import AudioConfig, Config
from diffbuf_lib.diffusion.sde import SDE
from diffbuf_lib.figures import (
    DPI,
    RED,
    WIDTH,
    add_colour_bar,
    analyse,
    centred,
    decibels,
    draw_level,
    draw_spectra,
    stack,
    to_numpy,
)
from diffbuf_lib.live import LiveReport
from diffbuf_lib.trace import Trace
from diffbuf_lib.training.folder import ResultsFolder, read_history
from recipes.demo.progress import UNITS, draw_points, draw_smoothed, split_history

if TYPE_CHECKING:
    from diffbuf_lib.diagnostics.statistics import GradientStatistics, ScoreStatistics
    from walk.listening import DelayScore
    from walk.scaling import StepCost

COMPRESSED_RANGE = 45  # dB for a compressed spectrum; alpha 0.5 halves a range in dB
_LEVELS = [float(level) for level in range(-100, 1, 2)]  # dB
_GAINS = {"si_sdr": "SI-SDR gain (dB)", "pesq": "PESQ gain", "estoi": "ESTOI gain"}
_FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
_ENDS = (0.001, 0.999)  # at t = 0, and for BBED at t = 1, sigma is 0 and 1 / sigma infinite


def spectra(spectra: Mapping[str, Tensor], audio: AudioConfig) -> Figure:
    """Draw compressed spectra [F, K] complex, all of one shape, on one time axis and dB scale."""
    figure, panels = stack(len(spectra), 1.9 * len(spectra) + 0.5)
    image = draw_spectra(panels, spectra, audio.sample_rate, audio.stft, COMPRESSED_RANGE)
    add_colour_bar(image, panels)
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
    figure, panels = stack(len(spectra) + 1, 1.75 * len(spectra) + 2.0)
    *pictures, below = panels
    image = draw_spectra(pictures, spectra, audio.sample_rate, audio.stft, COMPRESSED_RANGE)
    add_colour_bar(image, panels)  # beside the lowest too: one time axis
    K, Kb = next(iter(spectra.values())).shape[-1], t.shape[-1]
    times = figures.frame_times(K, audio.sample_rate, audio.stft)
    half = audio.stft.hop_length / audio.sample_rate / 2  # s
    for values, name in ((t, "diffusion time t"), (sigma, "noise sigma(t)")):
        whole = np.concatenate([np.zeros(K - Kb), to_numpy(values)])
        below.plot(times, whole, ".-", markersize=4, linewidth=1, label=name)
    below.legend(frameon=False, loc="upper left")
    below.set(ylabel="t, sigma", ylim=(-0.05, 1.05))
    below.grid(alpha=0.3)
    edge = times[K - Kb] - half
    for axes in panels:
        colour = "0.3" if axes is below else "white"
        axes.axvline(edge, color=colour, linestyle="--", linewidth=1.2)
    below.axvspan(edge, times[-1] + half, color="C1", alpha=0.12, linewidth=0)
    below.set_title(f"the buffer: the last {Kb} of {K} frames", loc="right", size=9)
    return figure


def waveforms(waves: Mapping[str, Tensor], sample_rate: int) -> Figure:
    """Draw signals [T] by title, one below the other, on one time axis and one scale."""
    figure, panels = stack(len(waves), 1.3 * len(waves) + 0.5)
    for axes, (name, wave) in zip(panels, waves.items(), strict=True):
        axes.sharey(panels[0])
        axes.plot(np.arange(len(wave)) / sample_rate, to_numpy(wave), linewidth=0.6)
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    figure.supylabel("amplitude (full scale 1)", fontsize=10)
    return figure


def snr_histogram(snr_db: Sequence[float]) -> Figure:
    """Draw how often each SNR occurs, dB; inf (no noise) and -inf (no speech) are only counted."""
    values = np.asarray(snr_db, dtype=float)
    finite = values[np.isfinite(values)]
    figure, axes = _one(2.8, "SNR of the mixture (dB)", "clips")
    if len(finite):
        axes.hist(finite, bins=min(20, len(finite)), edgecolor="white")
        median = float(np.median(finite))
        axes.axvline(median, color="C1", linestyle="--", label=f"median {median:.1f} dB")
        axes.legend(frameon=False)
    others = len(values) - len(finite)
    left_out = f"; {others} without noise or without speech are not shown" if others else ""
    axes.set_title(f"{len(finite)} clips{left_out}", loc="left", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def compression(raw: Tensor, compressed: Tensor, audio: AudioConfig) -> Figure:
    """Draw a spectrum [F, K] before and after compression, as the network sees it: not in dB."""
    figure = _figure(5.4)
    grid = figure.subplot_mosaic([["before", "after"], ["spread", "spread"]])
    spread = grid["spread"]
    pairs = (("before", "before: |c|", raw), ("after", "after: beta |c|^alpha", compressed))
    for key, title, spec in pairs:
        image = draw_level(grid[key], to_numpy(spec.abs()), audio.sample_rate, audio.stft)
        grid[key].set_title(f"{title}, linear", loc="left", fontsize=10)
        grid[key].set_xlabel("time (s)")
        figure.colorbar(image, ax=grid[key], label="magnitude")
        level = decibels(spec / spec.abs().max().clamp_min(1e-5))
        spread.hist(level.ravel(), bins=_LEVELS, histtype="step", label=title)
    spread.set(xlabel="magnitude below the largest bin (dB)", ylabel="bins", xlim=(-100, 0))
    spread.legend(frameon=False, loc="upper left")
    spread.grid(alpha=0.3)
    return figure


def round_trip(wave: Tensor, back: Tensor, sample_rate: int) -> Figure:
    """Draw a signal [T], and the error after conversion to its spectrum and back."""
    figure, (above, below) = stack(2, 3.6)
    seconds = np.arange(len(wave)) / sample_rate
    above.plot(seconds, to_numpy(wave), linewidth=0.6)
    above.set(title="there and back", ylabel="amplitude")
    error = np.maximum(to_numpy((back - wave).abs()), 1e-10)
    below.plot(seconds, 20 * np.log10(error), linewidth=0.6, color="C1")
    step = 20 * np.log10(2**-15)
    below.axhline(step, color="0.4", linestyle="--", label="one step of 16-bit audio")
    below.set(ylabel="error (dB)", ylim=(-205, 10))
    below.legend(frameon=False)
    return figure


def frame_counts(cfg: Config) -> Figure:
    """Draw how many frames clips of different lengths have, with what the config asks for."""
    stft, rate, chunk = cfg.audio.stft, cfg.audio.sample_rate, cfg.audio.chunk_size
    # Up to where both the clip and the window K end, with some room.
    longest = int(1.3 * max(chunk, cfg.num_frames * stft.hop_length + stft.n_fft))
    samples = np.linspace(1, longest, 600).astype(int)
    figure, axes = _one(3.4, "length of the clip (s)", "STFT frames")
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
    axes.set(xlim=(0, longest / rate), ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def refused(Y: Tensor, message: str, audio: AudioConfig) -> Figure:
    """Draw a spectrum [F, K] without a buffer, and above it why none fits."""
    figure = spectra({"": Y}, audio)
    figure.axes[0].set_title(message, loc="left", fontsize=9, color=RED, wrap=True)
    return figure


def noise_schedule(sdes: Mapping[str, SDE], t_eps: float, t_max: float) -> Figure:
    """Draw sigma, the weight of Y in the mean, g and 1 / sigma over diffusion time.

    Times outside t_eps to t_max, the range of the buffer, are grey.
    """
    figure = _figure(5.4)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    first, last = _ENDS
    small = torch.logspace(math.log10(min(first, t_eps)), math.log10(last), 100)
    t = torch.cat([small, torch.linspace(first, last, 600)])  # dense near 0, where much changes
    t = t.double().sort().values
    nothing, one = torch.zeros_like(t), torch.ones_like(t)
    for (name, sde), style in zip(sdes.items(), itertools.cycle(("-", "--", "-.", ":"))):
        sigma = sde.std(t)
        drawn = (sigma, sde.mean(nothing, one, t), sde.diffusion(t), 1 / sigma)
        for axes, values in zip(panels, drawn, strict=True):
            axes.plot(to_numpy(t), to_numpy(values), label=name, linestyle=style)
    titles = (
        "sigma(t): noise in X_t",
        "weight of Y in the mean (of S: the rest)",
        "g(t): noise added at t",
        "1 / sigma(t): size of score targets",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, 1), xlabel="diffusion time t")
        for low, high in ((0.0, t_eps), (t_max, 1.0)):
            axes.axvspan(low, high, color="0.5", alpha=0.18, linewidth=0)
        axes.grid(alpha=0.3)
    for axes in panels[:3]:
        axes.set_ylim(bottom=0)
    panels[3].set_yscale("log")
    _mark_float16(panels[3], 0.97)
    if len(sdes) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def score_limits(sdes: Mapping[str, SDE], t_eps: float) -> Figure:
    """Draw 1 / sigma and its square at small times, with the largest number of float16."""
    figure, axes = _one(3.6, "diffusion time t", "size")
    t = torch.logspace(-12, -0.05, 400, dtype=torch.float64)
    for index, (name, sde) in enumerate(sdes.items()):
        target = 1 / sde.std(t)
        axes.loglog(t, target, color=f"C{index}", label=f"1 / sigma, {name}")
        axes.loglog(t, target**2, "--", color=f"C{index}", label=f"1 / sigma^2, {name}")
    _mark_float16(axes, 0.25)
    axes.axvline(t_eps, color="0.3", linestyle=":", label=f"t_eps = {t_eps:g}")
    axes.set_ylim(0.5, 1e10)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def target_histogram(trace: Trace) -> Figure:
    """Draw how large the score's targets are, and their size after multiplication by sigma.

    Right, |sigma target| with the density of the magnitude of CN(0, 1), 2 r e^{-r^2}.
    """
    target = trace.target_score.detach().abs().cpu()  # [B, F, Kb]
    sigma = trace.sigma.detach().cpu()[:, None]
    figure = _figure(3.0)
    left, right = figure.subplots(1, 2)
    left.hist(target.flatten().numpy(), bins=80)
    left.set(yscale="log", xlabel="|target score|", ylabel="coefficients")
    right.hist((sigma * target).flatten().numpy(), bins=80, density=True)
    r = np.linspace(0, 4, 200)
    right.plot(r, 2 * r * np.exp(-(r**2)), color="C1", label="|CN(0, 1)|")
    right.set(xlabel="|sigma · target score|", ylabel="density")
    right.legend(frameon=False)
    return figure


def target_by_time(statistics: ScoreStatistics, t: Tensor, sigma: Tensor) -> Figure:
    """Draw the targets' size in every range of time beside 1 / sigma at the times t, both [N]."""
    figure, axes = _one(3.0, "diffusion time t", "|target score|")
    middle, half = _places(statistics.by_time)
    sizes = [row.target_rms for row in statistics.by_time]
    axes.bar(middle, sizes, 1.9 * half, label="measured RMS")
    axes.plot(t.numpy(), 1 / sigma.numpy(), color="C1", label="1 / sigma(t)")
    axes.legend(frameon=False)
    return figure


def loss_shares(statistics: Mapping[str, ScoreStatistics]) -> Figure:
    """Draw how much of each loss comes from each range of times, with the same ranges for all."""
    figure, axes = _one(3.0, "diffusion time t", "share of the loss (%)")
    for index, (name, each) in enumerate(statistics.items()):
        middle, half = _places(each.by_time)
        parts = np.array([row.loss * row.count if row.count else 0.0 for row in each.by_time])
        width = 1.8 * half / len(statistics)
        place = middle + (index - (len(statistics) - 1) / 2) * width
        axes.bar(place, 100 * parts / parts.sum(), width, label=name)
    axes.legend(frameon=False)
    return figure


def score_quality(statistics: Mapping[str, ScoreStatistics]) -> Figure:
    """Draw size and direction of the predicted score over diffusion time, and over frequency."""
    figure = _figure(5.2)
    (size_t, size_f), (way_t, way_f) = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, each in statistics.items():
        for size, way, rows in ((size_t, way_t, each.by_time), (size_f, way_f, each.by_band)):
            middle, _ = _places(rows)
            size.plot(middle, [row.score_rms / row.target_rms for row in rows], "o-", ms=4)
            way.plot(middle, [row.correlation for row in rows], "o-", ms=4, label=name)
    for axes in (size_t, size_f, way_t, way_f):
        axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    size_t.set(ylabel="RMS of score / of target")
    way_t.set(ylabel="correlation", xlabel="diffusion time t")
    way_f.set(xlabel="frequency (Hz)")
    way_f.legend(frameon=False, loc="best")
    return figure


def correlation_map(statistics: ScoreStatistics) -> Figure:
    """Draw the correlation of score and target over diffusion time and frequency."""
    values = np.array([[row.correlation for row in rows] for rows in statistics.grid])  # [N, M]
    figure, axes = _one(3.2, "diffusion time t", "frequency (Hz)")
    low = min(0.0, float(np.nanmin(values, initial=0.0)))
    times, bands = statistics.times, statistics.bands
    mesh = axes.pcolormesh(times, bands, values.T, cmap=figures.COLOUR_MAP, vmin=low, vmax=1)
    figure.colorbar(mesh, ax=axes, label="correlation")
    return figure


def precision_errors(reference: Trace, others: Mapping[str, Trace]) -> Figure:
    """Draw how far scores in lower precision are from the float32 ones for the same noise."""
    figure, axes = _one(3.0, "diffusion time t", "error of the score (%)")
    size = torch.linalg.vector_norm(reference.score.detach(), dim=1)  # [B, Kb]
    for name, trace in others.items():
        error = torch.linalg.vector_norm((trace.score - reference.score).detach(), dim=1) / size
        axes.plot(reference.t.flatten().cpu(), 100 * error.flatten().cpu(), "o", ms=4, label=name)
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
    return figure


def compare_gradients(gradients: Mapping[str, GradientStatistics]) -> Figure:
    """Draw the gradient norm of every module, for several losses side by side."""
    modules = [row.module for row in next(iter(gradients.values()))]
    figure, axes = _one(min(6.0, 1.2 + 0.3 * len(modules)), "gradient norm", "")
    place, height = np.arange(len(modules)), 0.8 / len(gradients)
    for index, (name, each) in enumerate(gradients.items()):
        norms = [row.norm for row in each]
        axes.barh(place + index * height, norms, height, align="edge", label=name)
    step = -(-len(modules) // 20)  # with many modules, label only some
    axes.set_yticks(place[::step] + 0.4, [m.removeprefix("network.") for m in modules[::step]])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False)
    return figure


def compare_runs(runs: Mapping[str, Path], *, metric: str = "si_sdr") -> Figure:
    """Overlay runs, each a results folder: smoothed loss and validation score."""
    figure = _figure(3.2)
    left, right = figure.subplots(1, 2, sharex=True)
    losses: list[float | None] = []
    for index, (name, folder) in enumerate(runs.items()):
        steps, valid = split_history(read_history(ResultsFolder(folder).history))
        losses += [line["loss"] for line in steps]
        draw_smoothed(left, steps, label=name, color=f"C{index}")
        draw_points(right, valid, metric, label=name, color=f"C{index}")
    scale = figures.scale_of(losses)
    left.set(title="training loss, smoothed", xlabel="step", ylabel="loss", yscale=scale)
    right.set(title="validation", xlabel="step", ylabel=UNITS.get(metric, metric))
    right.legend(frameon=False, fontsize=9)
    return figure


def delay_quality(scores: Sequence[DelayScore], metrics: Sequence[str]) -> Figure:
    """Draw gains over the noisy input against latency: means with a line, clips as dots.

    The largest buffer read at several delays is one curve; shorter ones, read at their end, are
    another.
    """
    figure = _figure(3.4)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    trained = max(score.buffer_size for score in scores)
    kinds = {
        f"B = {trained}, delay d from 1 to B": [s for s in scores if s.buffer_size == trained],
        "shorter buffers, d = B": [s for s in scores if s.delay == s.buffer_size],
    }
    for axes, metric in zip(panels, metrics, strict=True):
        for (label, kind), look in zip(kinds.items(), ("C0o", "C1s"), strict=True):
            ordered = sorted(kind, key=lambda score: score.latency_ms)
            latency = [score.latency_ms for score in ordered]
            axes.plot(latency, [score.mean(metric) for score in ordered], f"{look}-", label=label)
            gains = np.stack([score.gains[metric].numpy() for score in ordered])  # [settings, n]
            axes.plot(latency, gains, look, markersize=3, alpha=0.35)
        axes.axhline(0, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="latency (ms)", ylabel=_GAINS.get(metric, metric))
        axes.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside upper left", ncols=2)
    return figure


def frame_times(report: LiveReport) -> Figure:
    """Draw the time of every hop against its deadline, and how often each time occurred."""
    figure = _figure(3)
    course, spread = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    draw_hops(course, report.frame_ms, report.hop_ms)
    low, high = max(min(report.frame_ms), 1e-3), max(*report.frame_ms, report.hop_ms)
    edges = list(np.geomspace(0.8 * low, 1.2 * high, 40))
    spread.hist(report.frame_ms, bins=edges, orientation="horizontal")
    spread.set(xlabel="hops")
    spread.axhline(report.hop_ms, color="C3", linestyle="--")
    figure.legend(*course.get_legend_handles_labels(), frameon=False, loc="outside upper right")
    return figure


def stream_course(
    waves: Mapping[str, Tensor], frame_ms: Sequence[float], audio: AudioConfig
) -> Figure:
    """Draw a stream's input and output, above the time that every hop took.

    Args:
        waves: title and signal [T], full scale 1, of a stream so far.
        frame_ms: time that each hop took, ms.
        audio: gives Hz and seconds.
    """
    figure, (*panels, course) = stack(len(waves) + 1, 2 + 1.7 * len(waves))
    draw_spectra(panels, analyse(waves, audio.stft), audio.sample_rate, centred(audio.stft))
    if frame_ms:
        draw_hops(course, frame_ms, 1000 * audio.stft.hop_length / audio.sample_rate)
        course.legend(frameon=False, fontsize=8, loc="upper right")
    else:
        course.set_axis_off()
    return figure


def draw_hops(axes: Axes, frame_ms: Sequence[float], hop_ms: float) -> None:
    """Draw the compute time of every hop of a stream against its duration, both in ms."""
    axes.plot(np.arange(len(frame_ms)) * hop_ms / 1000, frame_ms, linewidth=0.8, color="C0")
    axes.set(xlabel="time in the stream (s)", ylabel="time for one hop (ms)", yscale="log")
    axes.axhline(hop_ms, color="C3", linestyle="--", label="a hop lasts this long")
    axes.grid(alpha=0.3)


def largest_values(values: Mapping[str, float], limit: float, limit_name: str, bad: str) -> Figure:
    """Draw the largest finite magnitude (NaN: none) of every stage or module, on a log scale.

    `limit` is the largest number of a format; `bad` is the row of the first bad value.
    """
    known = [value for value in values.values() if math.isfinite(value) and value > 0]
    low, high = min([0.01, *known]) / 2, 10 * max([limit, *known])
    figure, axes = _one(0.19 * len(values) + 1, "largest magnitude", "")
    for row, (name, value) in enumerate(values.items()):
        color, label = ("C3", "first bad value") if name == bad else ("C0", None)
        if value > 0:
            axes.barh(row, value - low, left=low, height=0.7, color=color, label=label)
        else:
            text = f"{f'{label}: ' if label else ''}{'0' if value == 0 else 'no finite value'}"
            axes.text(1.1 * low, row, text, va="center", fontsize=8, color=color)
    axes.axvline(limit, color="0.3", linestyle="--", label=limit_name)
    axes.set(xscale="log", xlim=(low, high), ylim=(len(values) - 0.4, -0.6))
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    return figure


def step_costs(costs: Sequence[StepCost]) -> Figure:
    """Draw time, speed and memory of a training pass against the batch size, by precision."""
    figure = _figure(3)
    panels = figure.subplots(1, 3)
    for precision in dict.fromkeys(cost.precision for cost in costs):
        own = [cost for cost in costs if cost.precision == precision]
        drawn = {
            "time of a pass (ms)": [1000 * cost.seconds for cost in own],
            "clips per second": [cost.clips_per_second for cost in own],
            "kept for backward (MiB)": [cost.saved_bytes / 2**20 for cost in own],
        }
        sizes = [cost.batch_size for cost in own]
        for axes, (name, values) in zip(panels, drawn.items(), strict=True):
            axes.plot(sizes, values, marker="o", label=precision)
            axes.set(xlabel="batch size (clips)", ylabel=name, ylim=(0, None), xticks=sizes)
            axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _one(height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = _figure(height)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _mark_float16(axes: Axes, right: float) -> None:
    """Draw float16's largest number, with its name ending at a share of the axes' width."""
    axes.axhline(_FLOAT16_MAX, color=RED, linewidth=1.2)
    place = axes.get_yaxis_transform()
    look: dict[str, Any] = {"ha": "right", "va": "top", "color": RED, "size": 8}
    axes.text(right, _FLOAT16_MAX / 1.3, "float16 ends: 65504", transform=place, **look)


def _places(rows: Sequence[Any]) -> tuple[np.ndarray, float]:
    """Return the middle of every range, and half the width of the narrowest."""
    low, high = (np.array([getattr(row, end) for row in rows]) for end in ("low", "high"))
    return (low + high) / 2, float((high - low).min()) / 2
