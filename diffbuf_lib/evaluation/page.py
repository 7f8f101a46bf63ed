"""Reports of an evaluation: tables for a terminal, and HTML pages that need no other files."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure

from diffbuf_lib import figures
from diffbuf_lib.config import AudioConfig
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.evaluation.bootstrap import Difference
from diffbuf_lib.evaluation.scores import ScoredClip, label_of
from diffbuf_lib.trace import format_table

Table = list[list[str]]  # rows of text, the first row its head
Mark = tuple[float, Mapping[str, Any], str]  # place on the x axis, interval, a word beside it
_SHOWN_REASONS = 10
_PANELS = 3
_PACKAGES = ("diffbuf", "torch", "torchaudio", "accelerate", "torchmetrics", "numpy")
PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("diffbuf_lib.evaluation"), undefined=jinja2.StrictUndefined,
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def write_page(
    path: Path,
    template: str,
    clips: Iterable[tuple[str, ScoredClip]],
    metrics: Sequence[str],
    audio: AudioConfig,
    **values: Any,
) -> None:
    """Write an HTML page on which clips, under their headings, can be heard and seen.

    The template is evaluation or demo; `values` is what it shows besides clips and metrics.
    """
    rate = audio.sample_rate
    shown = []
    for heading, clip in clips:
        waves = {**clip.estimates, "clean": clip.target}
        wavs = {name: figures.player_wav(wave, rate) for name, wave in waves.items()}
        players = {name: figures.data_uri(wav, "audio/wav") for name, wav in wavs.items()}
        scores = [["", *map(label_of, metrics)]]
        for method, found in clip.scores.items():
            cells = (f"{found.values[m]:.2f}" if m in found.values else "-" for m in metrics)
            scores.append([method, *cells])
        picture = _as_png(figures.spectrograms(waves, rate, audio.stft))
        shown.append((heading, clip, players, picture, scores))
    versions = {name: metadata.version(name) for name in _PACKAGES}
    page = PAGES.get_template(f"{template}.html.jinja").render(
        clips=shown, metrics=metrics, versions={"python": platform.python_version(), **versions},
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads", as_png=_as_png,
        means_table=means_table, gains_table=gains_table, speed_tables=speed_tables,
        gains_picture=_gains_picture, label_of=label_of, **values,
    )  # fmt: skip
    write_bytes(path, page.encode())


def cell(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return an interval of summary.json as text, `-` where there is none."""
    if interval is None:
        return "-"
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return (f"{mean:+.2f}" if signed else f"{mean:.2f}") + ends


def overview(found: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """Return the contents of summary.json and timing.json as text for a terminal."""
    undefined = [list(entry.values()) for entry in found["undefined"]]
    lines = [f"{found['clips']} clips; means, 95 % intervals in brackets"]
    lines.append(format_table(means_table(found)))
    if undefined:
        lines.append(f"{len(undefined)} scores are undefined and are left out (see scores.csv):")
        lines.append(format_table(undefined[:_SHOWN_REASONS], left=4))
    if len(found["bands"]) > 2:
        metric = next(iter(found["bands"]["all"]["columns"]))
        lines.append(f"\n{format_table(gains_table(found, metric))}")
    lines += [f"\n{format_table(table)}" for table in speed_tables(timing)]
    return "\n".join(lines)


def differences(found: Iterable[Difference]) -> str:
    """Return the differences between two evaluations as text for a terminal."""
    rows = [["", "input SNR", "a", "b", "b - a", "b above a", "clips"]]
    for row in found:
        shown, scored = ["-"] * 4, 0
        if row.difference is not None:
            scored = row.difference.clips
            gain = cell(row.difference._asdict(), signed=True)
            shown = [f"{row.a:.2f}", f"{row.b:.2f}", gain, f"{row.better:.0%}"]
        rows.append([label_of(row.column), row.band, *shown, f"{scored} of {row.clips}"])
    return format_table(rows)


def speed_tables(timing: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return how fast every method was, and where the time went, longest first."""
    speed = [["", "real-time factor", "latency"]]
    for method, one in timing["methods"].items():
        latency = "whole clip" if one["latency_ms"] is None else f"{one['latency_ms']:.0f} ms"
        speed.append([method, f"{one['real_time_factor']:.3f}", latency])
    work = sorted(timing["seconds"].items(), key=lambda item: -item[1])
    rows = [[name, f"{seconds:.1f}"] for name, seconds in work]
    return speed, [["work", "seconds of all processes"], *rows]


def means_table(found: Mapping[str, Any]) -> Table:
    """Return the mean of every metric and method over all clips."""
    columns = found["bands"]["all"]["columns"]
    rows = [["", *map(label_of, columns)]]
    for method in found["methods"]:
        rows.append([method, *(cell(c["methods"][method]["mean"]) for c in columns.values())])
    return [*rows, ["clips scored", *(str(c["clips"]) for c in columns.values())]]


def gains_table(found: Mapping[str, Any], column: str) -> Table:
    """Return the gain over the noisy input in one metric, a row per band of input SNR."""
    methods = found["methods"][1:]
    rows = [[f"gain in {label_of(column)}", *methods, "clips scored"]]
    for name, band in found["bands"].items():
        table = band["columns"][column]
        gains = [cell(table["methods"][method]["gain"], signed=True) for method in methods]
        rows.append([name, *gains, f"{table['clips']} of {band['clips']}"])
    return rows


def draw_panels(panels: Mapping[str, Mapping[str, Sequence[Mark]]], xlabel: str) -> Figure:
    """Draw curves of means with their intervals as bars: metric -> name of a curve -> points."""
    figure = Figure(figsize=(4.4 * len(panels), 3.9), dpi=90, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (column, curves) in zip(every, panels.items(), strict=True):
        for index, (name, marks) in enumerate(curves.items()):
            ends = [[interval[key] for key in ("low", "mean", "high")] for _, interval, _ in marks]
            low, mean, high = np.array(ends, dtype=float).reshape(-1, 3).T  # None becomes NaN
            bars = np.nan_to_num([mean - low, high - mean]).clip(0)  # the mean was rounded
            axes.errorbar(
                [x for x, _, _ in marks], mean, yerr=bars, label=name, color=f"C{index}",
                marker="o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
            for x, interval, word in marks:
                axes.annotate(
                    word, (x, interval["mean"]), xytext=(4, 5 if index % 2 else -11),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
        axes.set(xlabel=xlabel, ylabel=label_of(column))
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _gains_picture(found: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Draw the gain of every method over the noisy input against input SNR, a panel per metric."""
    bands = {name: band["columns"] for name, band in found["bands"].items() if name != "all"}
    methods = found["methods"][1:]
    panels: dict[str, dict[str, list[Mark]]] = {metric: {} for metric in metrics[:_PANELS]}
    for metric, curves in panels.items():
        for index, method in enumerate(methods):
            aside = 0.12 * (index - (len(methods) - 1) / 2)
            gains = [columns[metric]["methods"][method]["gain"] for columns in bands.values()]
            curves[method] = [(x + aside, gain, "") for x, gain in enumerate(gains) if gain]
    figure = draw_panels(panels, "input SNR (dB)")
    for axes in figure.axes:
        axes.set_ylabel(f"gain in {axes.get_ylabel()}")
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(bands)), [name.removesuffix(" dB") for name in bands], fontsize=8)
        axes.tick_params(axis="x", rotation=30 if len(bands) > 4 else 0)
    return _as_png(figure)


def _as_png(figure: Figure) -> str:
    return figures.data_uri(figures.to_png(figure), "image/png")
