"""Where a number left the range in which it can be written down."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

_ROW = 0.19  # inches


def largest_values(
    values: Mapping[str, float], limit: float, limit_name: str, bad: str | None = None
) -> Figure:
    """Draw the largest magnitude of every stage or module, in order, on a log scale.

    Args:
        values: name and largest finite magnitude; NaN where nothing was finite.
        limit: the largest number of a format.
        limit_name: what the line at the limit is called.
        bad: the row where the first bad value was found.
    """
    names = list(values)
    magnitudes = np.array([values[name] for name in names], dtype=float)
    finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    low = min(finite.min(), 0.01) / 2 if len(finite) else 0.01
    high = 10 * max(limit, finite.max() if len(finite) else limit)
    figure = Figure(figsize=(9, _ROW * len(names) + 1), dpi=90, layout="constrained")
    axes = figure.subplots()
    for row, (name, value) in enumerate(zip(names, magnitudes, strict=True)):
        color, label = ("C3", "first bad value") if name == bad else ("C0", None)
        if value > 0:
            width = (value if np.isfinite(value) else high) - low
            axes.barh(row, width, left=low, height=0.7, color=color, label=label)
        else:
            text = "0" if value == 0 else "no finite value"
            text = f"{label}: {text}" if label else text
            axes.text(1.1 * low, row, text, va="center", fontsize=8, color=color)
    axes.axvline(limit, color="0.3", linestyle="--", label=limit_name)
    axes.set(xscale="log", xlim=(low, high), xlabel="largest magnitude")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    return figure
