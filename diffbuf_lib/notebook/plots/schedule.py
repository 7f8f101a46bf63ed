"""What an SDE does over diffusion time: sigma, mean, g, and how large score targets become."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.diffusion.sde import SDE
from diffbuf_lib.notebook.plots.signals import DPI, WIDTH, to_numpy

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
_ENDS = (0.001, 0.999)  # at t = 0, and for BBED at t = 1, sigma is 0 and 1 / sigma infinite
_SMALLEST_TIME = 1e-12


def noise_schedule(sdes: Mapping[str, SDE], t_eps: float, t_max: float) -> Figure:
    """Draw sigma, the weight of Y in the mean, g and 1 / sigma over diffusion time.

    Args:
        sdes: name and SDE of every curve.
        t_eps: smallest diffusion time of the buffer; what lies outside is grey.
        t_max: the largest.
    """
    figure = Figure(figsize=(WIDTH, 5.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    first, last = _ENDS
    small = torch.logspace(math.log10(min(first, t_eps)), math.log10(last), 100)
    t = torch.cat([small, torch.linspace(first, last, 600)])  # since much happens near 0
    t = t.double().sort().values
    for index, (name, sde) in enumerate(sdes.items()):
        sigma = sde.std(t)
        look = {"label": name, "color": f"C{index}", "linestyle": ("-", "--", "-.", ":")[index % 4]}
        for axes, values in zip(
            grid.flat, (sigma, weight_of_y(sde, t), sde.diffusion(t), 1 / sigma), strict=True
        ):
            axes.plot(to_numpy(t), to_numpy(values), **look)
    titles = (
        "sigma(t): noise in X_t",
        "weight of Y in the mean (of S: the rest)",
        "g(t): noise added at t",
        "1 / sigma(t): size of score targets",
    )
    for axes, title in zip(grid.flat, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        _shade(axes, t_eps, t_max)
    for axes in grid.flat[:3]:
        axes.set_ylim(bottom=0)
    grid[1, 1].set_yscale("log")
    _float16_limit(grid[1, 1], 0.97)
    for axes in grid[1]:
        axes.set_xlabel("diffusion time t")
    if len(sdes) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def score_limits(sdes: Mapping[str, SDE], t_eps: float) -> Figure:
    """Draw 1 / sigma and its square at small times, beside the largest number of float16.

    Args:
        sdes: name and SDE of every pair of curves.
        t_eps: smallest diffusion time of the buffer.
    """
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    t = torch.logspace(math.log10(_SMALLEST_TIME), -0.05, 400, dtype=torch.float64)
    for index, (name, sde) in enumerate(sdes.items()):
        target = 1 / sde.std(t)
        axes.loglog(t, target, color=f"C{index}", label=f"1 / sigma, {name}")
        axes.loglog(t, target**2, "--", color=f"C{index}", label=f"1 / sigma^2, {name}")
    _float16_limit(axes, 0.25)
    axes.axvline(t_eps, color="0.3", linestyle=":", label=f"t_eps = {t_eps:g}")
    axes.set(xlabel="diffusion time t", ylabel="size", ylim=(0.5, 1e10))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    return figure


def weight_of_y(sde: SDE, t: Tensor) -> Tensor:
    """Return how much of Y the mean holds at t, of t's shape; the rest is x0."""
    return sde.mean(torch.zeros_like(t), torch.ones_like(t), t)


def _float16_limit(axes: Axes, right: float) -> None:
    """Draw float16's largest number, with its name ending at a share of the axes' width."""
    red = "#b00020"
    axes.axhline(FLOAT16_MAX, color=red, linewidth=1.2)
    place = axes.get_yaxis_transform()
    name = "float16 ends: 65504"
    axes.text(
        right, FLOAT16_MAX / 1.3, name, ha="right", va="top", color=red, size=8, transform=place
    )


def _shade(axes: Axes, t_eps: float, t_max: float) -> None:
    """Grey out the times that the buffer does not use."""
    axes.set_xlim(0, 1)
    for low, high in ((0.0, t_eps), (t_max, 1.0)):
        axes.axvspan(low, high, color="0.5", alpha=0.18, linewidth=0)
    axes.grid(alpha=0.3)
