"""What a step costs, and what reading does."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from diffbuf_lib.notebook.scaling import ReadingCost, StepCost

_MIB = 2**20


def step_costs(costs: Sequence[StepCost]) -> Figure:
    """Draw time, speed and memory of a training pass against the batch size, a curve a precision.

    Args:
        costs: of one or several precisions.
    """
    figure = _figure(3)
    seconds, speed, memory = figure.subplots(1, 3)
    for index, precision in enumerate(dict.fromkeys(cost.precision for cost in costs)):
        own = [cost for cost in costs if cost.precision == precision]
        sizes = [cost.batch_size for cost in own]
        style = {"marker": "os^"[index % 3], "color": f"C{index}", "label": precision}
        seconds.plot(sizes, [1000 * cost.seconds for cost in own], **style)
        speed.plot(sizes, [cost.clips_per_second for cost in own], **style)
        memory.plot(sizes, [cost.saved_bytes / _MIB for cost in own], **style)
    for axes, label in (
        (seconds, "time of a pass (ms)"),
        (speed, "clips per second"),
        (memory, "kept for backward (MiB)"),
    ):
        axes.set(xlabel="batch size (clips)", ylabel=label)
        axes.set_xticks(sorted({cost.batch_size for cost in costs}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    seconds.legend(frameon=False, fontsize=8)
    return figure


def reading_costs(costs: Sequence[ReadingCost], needed: float) -> Figure:
    """Draw how fast clips are read, and how long the first batch takes.

    Args:
        costs: one for each number of processes.
        needed: clips per second that training uses up.
    """
    figure = _figure(2.8)
    speed, start = figure.subplots(1, 2)
    _draw_bars(speed, costs, [cost.clips_per_second for cost in costs], "clips read per second")
    speed.axhline(needed, color="C3", linestyle="--", label="training needs")
    speed.legend(frameon=False, fontsize=9)
    speed.margins(y=0.25)
    _draw_bars(
        start, costs, [1000 * cost.start_seconds for cost in costs], "time to the first batch (ms)"
    )
    return figure


def _figure(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1)  # inches: labels keep off the axes beside them
    return Figure(figsize=(9, height), dpi=90, layout=layout)


def _draw_bars(
    axes: Axes, costs: Sequence[ReadingCost], values: Sequence[float], label: str
) -> None:
    positions = range(len(costs))
    axes.bar(positions, values, width=0.6, color="C0")
    axes.set_xticks(positions, [str(cost.workers) for cost in costs])
    axes.set(xlabel="reading processes (training.num_workers)", ylabel=label)
    axes.grid(alpha=0.3, axis="y")
