"""One step, seen from three sides: the loss so far, the gradients by module, and one stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffbuf_lib.config import Config
from diffbuf_lib.diagnostics.watch import GradientStatistics
from diffbuf_lib.figures import scale_of
from diffbuf_lib.notebook.plots.stages import draw_stage
from diffbuf_lib.trace import Trace

_MOST_MODULES = 14  # that a small picture has room for


def stepping(
    losses: Sequence[float],
    gradients: GradientStatistics | None,
    trace: Trace,
    name: str,
    cfg: Config,
    *,
    example: int = 0,
) -> Figure:
    """Draw where a batch stands after some steps on it.

    Args:
        losses: of the steps so far.
        gradients: of the last one; None before the first.
        trace: of the last one.
        name: the stage to draw.
        cfg: the model's config.
        example: which one of the batch.
    """
    figure = Figure(figsize=(10, 5.6), dpi=90, layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _draw_losses(figure.add_subplot(grid[0, 0]), losses)
    draw_gradients(figure.add_subplot(grid[0, 1]), gradients)
    draw_stage(figure.add_subplot(grid[1, :]), trace, name, cfg, example=example)
    return figure


def gradients(statistics: GradientStatistics) -> Figure:
    """Draw the gradient norm of every module, on a logarithmic axis.

    Args:
        statistics: from `gradient_statistics`, after a backward pass.
    """
    figure = Figure(figsize=(8, 3.2), dpi=90, layout="constrained")
    draw_gradients(figure.subplots(), statistics)
    return figure


def draw_gradients(axes: Axes, gradients: GradientStatistics | None) -> None:
    """Draw the gradient norm of every module, the first one on top.

    Of many modules, those with the largest gradients are drawn.
    """
    axes.set_title("gradient norm by module", loc="left", fontsize=10)
    if gradients is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no step made yet", ha="center", va="center", color="0.4")
        return
    rows = [row for row in gradients if row.parameters]
    largest = sorted(rows, key=lambda row: -row.norm)[:_MOST_MODULES]
    rows = [row for row in rows if row in largest]
    if len(gradients) > len(rows):
        axes.set_title(
            f"gradient norm by module, the {len(rows)} largest of {len(gradients)}",
            loc="left",
            fontsize=10,
        )
    names = [row.module.removeprefix("network.") for row in rows]
    axes.barh(names, [row.norm for row in rows], color="C2")
    axes.invert_yaxis()
    norms = [row.norm for row in rows if 0 < row.norm < math.inf]
    if norms:  # whole decades: labels between them would run into one another
        axes.set_xscale("log")
        axes.set_xlim(
            10 ** math.floor(math.log10(min(norms))), 10 ** math.ceil(math.log10(max(norms)) + 0.01)
        )
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
        axes.text(
            0.5,
            0.5,
            "no step made yet",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="0.4",
        )
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.3)
