"""What the network is asked to predict, and what it predicts, by diffusion time and frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.diagnostics.statistics import ScoreRow, ScoreStatistics
from diffbuf_lib.diagnostics.watch import GradientStatistics
from diffbuf_lib.figures import COLOUR_MAP
from diffbuf_lib.notebook.plots.signals import DPI, WIDTH
from diffbuf_lib.trace import Trace


def target_histogram(trace: Trace) -> Figure:
    """Draw how large the score's targets are, and what is left when sigma is taken out.

    Right, |sigma target| beside the density of the magnitude of CN(0, 1), 2 r e^{-r^2}.

    Args:
        trace: of a batch.
    """
    target = trace.target_score.detach().abs().cpu()  # [B, F, Kb]
    sigma = trace.sigma.detach().cpu()[:, None]
    figure = _figure(3.0)
    left, right = figure.subplots(1, 2)
    left.hist(target.flatten().numpy(), bins=80, color="C0")
    left.set(yscale="log", xlabel="|target score|", ylabel="coefficients")
    left.set_title("what the network is asked for", loc="left", fontsize=10)
    right.hist((sigma * target).flatten().numpy(), bins=80, density=True, color="C0")
    r = np.linspace(0, 4, 200)
    right.plot(r, 2 * r * np.exp(-(r**2)), color="C1", label="|CN(0, 1)|")
    right.set(xlabel="|sigma · target score|", ylabel="density")
    right.set_title("the same times sigma", loc="left", fontsize=10)
    right.legend(frameon=False)
    return figure


def target_by_time(statistics: ScoreStatistics, t: Tensor, sigma: Tensor) -> Figure:
    """Draw the targets' size in every range of time beside 1 / sigma(t).

    Args:
        statistics: of any model: targets do not depend on it.
        t: [N] times.
        sigma: [N] at those times.
    """
    figure = _figure(3.0)
    axes = figure.subplots()
    rows = statistics.by_time
    middle, half = _places(rows)
    axes.bar(middle, [row.target_rms for row in rows], 1.9 * half, color="C0", label="measured RMS")
    axes.plot(t.numpy(), 1 / sigma.numpy(), color="C1", label="1 / sigma(t)")
    axes.set(xlabel="diffusion time t", ylabel="|target score|")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def loss_shares(statistics: Mapping[str, ScoreStatistics]) -> Figure:
    """Draw how much of each loss comes from each range of diffusion times.

    Args:
        statistics: name of the loss, and statistics of a model that has it; all with the same
            ranges of time.
    """
    figure = _figure(3.0)
    axes = figure.subplots()
    for index, (name, each) in enumerate(statistics.items()):
        rows = each.by_time
        middle, half = _places(rows)
        parts = np.array([row.loss * row.count if row.count else 0.0 for row in rows])
        width = 1.8 * half / len(statistics)
        place = middle + (index - (len(statistics) - 1) / 2) * width
        axes.bar(place, 100 * parts / parts.sum(), width, label=name, color=f"C{index}")
    axes.set(xlabel="diffusion time t", ylabel="share of the loss (%)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False)
    return figure


def score_quality(statistics: Mapping[str, ScoreStatistics]) -> Figure:
    """Draw size and direction of the predicted score over diffusion time, and over frequency.

    Args:
        statistics: name and statistics of each model; all of the same ranges.
    """
    figure = _figure(5.2)
    (size_t, size_f), (way_t, way_f) = figure.subplots(2, 2, sharex="col", sharey="row")
    for index, (name, each) in enumerate(statistics.items()):
        for size, way, rows in ((size_t, way_t, each.by_time), (size_f, way_f, each.by_band)):
            middle, _ = _places(rows)
            ratio = [row.score_rms / row.target_rms for row in rows]
            size.plot(middle, ratio, marker="o", markersize=4, color=f"C{index}", label=name)
            correlation = [row.correlation for row in rows]
            way.plot(middle, correlation, marker="o", markersize=4, color=f"C{index}", label=name)
    for axes in (size_t, size_f, way_t, way_f):
        axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    size_t.set(ylabel="RMS of score / of target")
    way_t.set(ylabel="correlation", xlabel="diffusion time t")
    way_f.set(xlabel="frequency (Hz)")
    way_f.legend(frameon=False, loc="best")
    return figure


def correlation_map(statistics: ScoreStatistics) -> Figure:
    """Draw the correlation of score and target over diffusion time and frequency.

    Args:
        statistics: of a model.
    """
    values = np.array([[row.correlation for row in rows] for rows in statistics.grid])  # [N, M]
    figure = _figure(3.2)
    axes = figure.subplots()
    low = min(0.0, float(np.nanmin(values, initial=0.0)))
    mesh = axes.pcolormesh(
        statistics.times, statistics.bands, values.T, cmap=COLOUR_MAP, vmin=low, vmax=1
    )
    axes.set(xlabel="diffusion time t", ylabel="frequency (Hz)")
    figure.colorbar(mesh, ax=axes, label="correlation")
    return figure


def precision_errors(reference: Trace, others: Mapping[str, Trace]) -> Figure:
    """Draw how far scores in lower precision are from the reference, over diffusion time.

    Args:
        reference: in float32.
        others: name of the precision, and a trace of the same batch with the same noise.
    """
    figure = _figure(3.0)
    axes = figure.subplots()
    size = _frame_rms(reference.score)
    for index, (name, trace) in enumerate(others.items()):
        error = _frame_rms(trace.score - reference.score) / size
        axes.plot(
            reference.t.flatten().cpu(),
            100 * error.flatten().cpu(),
            "o",
            ms=4,
            color=f"C{index}",
            label=name,
        )
    axes.set(xlabel="diffusion time t", ylabel="error of the score (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def compare_gradients(gradients: Mapping[str, GradientStatistics]) -> Figure:
    """Draw the gradient norm of every module, for several losses side by side.

    Args:
        gradients: name, and statistics of one model after that loss's backward pass.
    """
    modules = [row.module for row in next(iter(gradients.values()))]
    figure = _figure(min(6.0, 1.2 + 0.3 * len(modules)))
    axes = figure.subplots()
    place = np.arange(len(modules))
    height = 0.8 / len(gradients)
    for index, (name, each) in enumerate(gradients.items()):
        offset = (index - (len(gradients) - 1) / 2) * height
        norms = [each[module].norm for module in modules]
        axes.barh(place + offset, norms, height, label=name, color=f"C{index}")
    step = -(-len(modules) // 20)  # of many modules, a label for every so many
    axes.set_yticks(place[::step], [m.removeprefix("network.") for m in modules[::step]])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="gradient norm")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False)
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _places(rows: Sequence[ScoreRow]) -> tuple[np.ndarray, float]:
    """Return the middle of every range, and half the width of the narrowest."""
    low, high = (np.array([getattr(row, end) for row in rows]) for end in ("low", "high"))
    return (low + high) / 2, float((high - low).min()) / 2


def _frame_rms(score: Tensor) -> Tensor:
    """[B, F, Kb] complex to [B, Kb]: the root mean square over frequency."""
    return torch.linalg.vector_norm(score.detach(), dim=1) / score.shape[1] ** 0.5
