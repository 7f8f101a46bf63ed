"""The points of a sweep as a table, as CSV and as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from diffbuf_lib.evaluation.baselines import NOISY
from diffbuf_lib.evaluation.pictures import draw_intervals
from diffbuf_lib.evaluation.scoring import LABELS
from diffbuf_lib.evaluation.tables import cell, render


@dataclass(frozen=True)
class Point:
    """One model at one setting.

    Attributes:
        model: as it was given.
        loss: training.loss of the model.
        parameters: how many it has.
        varied: buffer_size, delay or t_max; none for a model as it was trained.
        buffer_size: B, frames.
        delay: d, frames; B unless it is varied.
        t_max: largest diffusion time.
        latency_ms: until the first sample comes out.
        real_time_factor: of one stream on this machine.
        scores: column -> mean and gain of the model and mean of the noisy input, as in
            summary.json.
    """

    model: str
    loss: str
    parameters: int
    varied: str
    buffer_size: int
    delay: int
    t_max: float
    latency_ms: float
    real_time_factor: float
    scores: dict[str, dict[str, Any]]


def draw_sweep(points: Sequence[Point]) -> Figure:
    """Draw every metric against latency, or against t_max where that is varied, a panel a metric.

    A curve is a model; models as they were trained are one curve a loss.
    """
    columns = list(points[0].scores)
    by_time = all(point.varied == "t_max" for point in points)
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: _place(point, by_time)):
        curves.setdefault(_curve(point), []).append(point)
    figure = Figure(figsize=(4.4 * len(columns), 3.9), dpi=90, layout="constrained")
    for axes, column in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        for index, (label, members) in enumerate(curves.items()):
            shown = [point for point in members if point.scores[column]["mean"]]
            if not shown:
                continue
            means = [point.scores[column]["mean"] for point in shown]
            places = [_place(point, by_time) for point in shown]
            draw_intervals(axes, places, means, label=label, index=index)
            for x, mean, point in zip(places, means, shown, strict=True):
                axes.annotate(
                    _setting_label(point), (x, mean["mean"]), xytext=(4, 5 if index % 2 else -11),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
        noisy = next((p.scores[column]["noisy"] for p in points if p.scores[column]["noisy"]), None)
        if noisy:
            axes.axhline(noisy["mean"], color="0.4", linestyle="--", linewidth=1, label=NOISY)
        axes.set(
            xlabel="largest diffusion time t_max" if by_time else "latency (ms)",
            ylabel=LABELS.get(column, column),
        )
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def overview(points: Sequence[Point]) -> str:
    """Return the points as a table for a terminal."""
    columns = list(points[0].scores)
    head = ["", "", "latency", "real-time factor", *(LABELS.get(c, c) for c in columns)]
    rows = [head]
    for p in points:
        means = [cell(p.scores[column]["mean"]) for column in columns]
        speed = [f"{p.latency_ms:.0f} ms", f"{p.real_time_factor:.3f}"]
        rows.append([p.model, _setting_label(p), *speed, *means])
    return render(rows)


def to_csv(points: Sequence[Point]) -> str:
    """Return a row a point and metric as CSV; empty where no clip has a score."""
    names = ["model", "loss", "parameters", "varied", "buffer_size", "delay", "t_max"]
    names += ["latency_ms", "real_time_factor"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "metric", "mean", "low", "high", "gain", "noisy", "clips"])
    for point in points:
        for column, found in point.scores.items():
            mean, gain, noisy = (found[key] or {} for key in ("mean", "gain", "noisy"))
            ends = [mean.get(key) for key in ("mean", "low", "high")]
            others = [gain.get("mean"), noisy.get("mean"), found["clips"]]
            writer.writerow([*(getattr(point, name) for name in names), column, *ends, *others])
    return buffer.getvalue()


def _place(point: Point, by_time: bool) -> float:
    return point.t_max if by_time else point.latency_ms


def _curve(point: Point) -> str:
    if point.varied == "none":
        return f"{point.loss}, as trained"
    return f"{point.model}: {point.loss}, {point.parameters / 1e6:.1f} M parameters"


def _setting_label(point: Point) -> str:
    if point.varied == "t_max":
        return f"t_max {point.t_max:g}"
    return f"d {point.delay}" if point.varied == "delay" else f"B {point.buffer_size}"
