"""What people read of an evaluation: tables for a terminal, and HTML pages without other files.

A table is a list of rows of text, the first row its head; terminal and page show the same ones.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import soundfile
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib import figures
from diffbuf_lib.config import AudioConfig, Config
from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.evaluation.bootstrap import Interval
from diffbuf_lib.evaluation.evaluate import ScoredClip, summary
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.trace import format_table

Table = list[list[str]]
_SHOWN_REASONS = 10
_PANELS = 3
_PACKAGES = ("diffbuf", "torch", "torchaudio", "accelerate", "torchmetrics", "numpy")
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("diffbuf_lib.evaluation"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def write_page(
    path: str | Path,
    clips: Iterable[tuple[str, ScoredClip]],
    found: Mapping[str, Any],
    timing: Mapping[str, Any],
    audio: AudioConfig,
) -> None:
    """Write the page of an evaluation.

    Args:
        path: of the page.
        clips: those to hear and see, with their headings.
        found: the content of summary.json.
        timing: the content of timing.json.
        audio: of the model, for rate and spectrograms.
    """
    columns = list(found["bands"]["all"]["columns"])
    note = (
        f"{found['clips']} clips of {timing['data']}, {timing['audio_seconds']:.0f} s in all; "
        f"{timing['parameters']:,} parameters. In brackets: {found['interval']}. A metric's "
        "numbers are over the clips for which every method has a score."
    )
    _write(
        path,
        "evaluation",
        title=f"Evaluation of {timing['model']}",
        notes=[note],
        clips=[_shown(heading, clip, columns, audio) for heading, clip in clips],
        means=means_table(found),
        gains=[gains_table(found, column) for column in columns],
        picture=_png(draw_gains(found, columns[:_PANELS])) if len(found["bands"]) > 1 else None,
        undefined=_undefined_table(found),
        speed=_speed_table(timing),
        work=_work_table(timing),
    )


def write_report(
    path: str | Path,
    cfg: Config,
    history: Sequence[Mapping[str, Any]],
    clips: Sequence[ScoredClip],
    metrics: Sequence[str],
    *,
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of a run: scores, loss curve, validation, clips, config.

    Args:
        path: of the page.
        cfg: the run's config.
        history: the lines of its history.jsonl.
        clips: to show and to average.
        metrics: that they were scored by.
        title: of the page.
        notes: paragraphs below the title.
    """
    means = [["mean over the clips below", "noisy", "enhanced", "gain", "clips scored"]]
    for row in summary(clips, metrics):
        values = [f"{row.noisy:.2f}", f"{row.enhanced:.2f}", f"{row.gain:+.2f}"]
        means.append([label_of(row.metric), *values, f"{row.scored} of {row.clips}"])
    _write(
        path,
        "report",
        title=title,
        notes=notes,
        clips=[_shown(f"{n}", clip, metrics, cfg.audio) for n, clip in enumerate(clips, 1)],
        means=means,
        curves=[_png(figure) for figure in _curves(cfg, history)],
        config=cfg.to_yaml(),
    )


def cell(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return an interval of summary.json as text, `-` where there is none."""
    if interval is None:
        return "-"
    return ("+" if signed and interval["mean"] >= 0 else "") + str(Interval(**interval))


def overview(found: Mapping[str, Any]) -> str:
    """Return the content of summary.json for a terminal: means, and which clips have no score."""
    head, *undefined = _undefined_table(found)
    lines = [f"{found['clips']} clips; means, 95 % intervals in brackets"]
    lines.append(format_table(means_table(found)))
    if undefined:
        lines.append(f"{len(undefined)} scores are undefined and are left out:")
        lines.append(format_table([head, *undefined[:_SHOWN_REASONS]], left=len(head)))
    if len(undefined) > _SHOWN_REASONS:
        lines.append(f"and {len(undefined) - _SHOWN_REASONS} more: see scores.csv")
    return "\n".join(lines)


def times(timing: Mapping[str, Any]) -> str:
    """Return real-time factors, latencies and where the time went, for a terminal."""
    return f"{format_table(_speed_table(timing))}\n\n{format_table(_work_table(timing))}"


def means_table(found: Mapping[str, Any]) -> Table:
    """Return the mean of every metric and method over all clips."""
    columns = found["bands"]["all"]["columns"]
    rows = [["", *map(label_of, columns)]]
    for method in found["methods"]:
        rows.append([method, *(cell(c["methods"][method]["mean"]) for c in columns.values())])
    return [*rows, ["clips scored", *(str(c["clips"]) for c in columns.values())]]


def gains_table(found: Mapping[str, Any], column: str) -> Table:
    """Return the gain over the noisy input in one metric, a row a band of input SNR."""
    methods = found["methods"][1:]
    rows = [[f"gain in {label_of(column)}", *methods, "clips scored"]]
    for name, band in found["bands"].items():
        table = band["columns"][column]
        gains = [cell(table["methods"][method]["gain"], signed=True) for method in methods]
        rows.append([name, *gains, f"{table['clips']} of {band['clips']}"])
    return rows


class Mark(NamedTuple):
    """A mean at a place of the x axis, with a word beside it."""

    x: float
    interval: Mapping[str, Any]
    text: str = ""


def draw_panels(panels: Mapping[str, Mapping[str, Sequence[Mark]]], xlabel: str) -> Figure:
    """Draw curves of means with their intervals as bars, a panel a metric.

    Args:
        panels: column -> name of a curve -> its points.
        xlabel: name and unit of the x axis.
    """
    figure = Figure(figsize=(4.4 * len(panels), 3.9), dpi=90, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (column, curves) in zip(every, panels.items(), strict=True):
        for index, (name, marks) in enumerate(curves.items()):
            means = [mark.interval["mean"] for mark in marks]
            bars = list(zip(*(_bar(mark.interval) for mark in marks), strict=True))
            axes.errorbar(
                [mark.x for mark in marks], means, yerr=bars or None, label=name,
                color=f"C{index}", marker="o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
            for mark, mean in zip(marks, means, strict=True):
                axes.annotate(
                    mark.text, (mark.x, mean), xytext=(4, 5 if index % 2 else -11),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
        axes.set(xlabel=xlabel, ylabel=label_of(column))
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8
        )
    return figure


def _bar(interval: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far a bar reaches down and up: nowhere for a single clip."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if low is None:
        return 0.0, 0.0
    return max(0.0, mean - low), max(0.0, high - mean)  # by rounding, the mean can lie outside


def draw_gains(found: Mapping[str, Any], columns: Sequence[str]) -> Figure:
    """Draw the gain of every method over the noisy input against input SNR, a panel a metric."""
    bands = [name for name in found["bands"] if name != "all"]
    methods = found["methods"][1:]
    panels: dict[str, dict[str, list[Mark]]] = {}
    for column in columns:
        tables = [found["bands"][name]["columns"][column]["methods"] for name in bands]
        panels[column] = {
            method: [
                Mark(place + 0.12 * (index - (len(methods) - 1) / 2), table[method]["gain"])
                for place, table in enumerate(tables)
                if table[method]["gain"]
            ]
            for index, method in enumerate(methods)
        }
    figure = draw_panels(panels, "input SNR (dB)")
    for axes in figure.axes:
        axes.set_ylabel(f"gain in {axes.get_ylabel()}")
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(bands)), [name.removesuffix(" dB") for name in bands], fontsize=8)
        axes.tick_params(axis="x", rotation=30 if len(bands) > 4 else 0)
    return figure


def player_wav(wave: Tensor, sample_rate: int) -> bytes:
    """Return [T] as a 16-bit wav at 0.9 of full scale, so that quiet speech can be heard."""
    wave = torch.nan_to_num(wave)
    buffer = io.BytesIO()
    peak = wave.abs().max().clamp_min(1e-8)
    soundfile.write(buffer, (0.9 * wave / peak).numpy(), sample_rate, format="WAV")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as an address that a page can hold; kind is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _write(path: str | Path, template: str, **values: Any) -> None:
    versions = [
        ["package", "version"],
        ["python", platform.python_version()],
        ["machine", f"{platform.machine()}, {torch.get_num_threads()} threads"],
        *([name, metadata.version(name)] for name in _PACKAGES),
    ]
    page = _PAGES.get_template(f"{template}.html.jinja").render(versions=versions, **values)
    write_bytes(path, page.encode())


def _shown(
    heading: str, clip: ScoredClip, columns: Sequence[str], audio: AudioConfig
) -> dict[str, Any]:
    """Return players, spectrograms and scores of one clip."""
    waves = {**clip.estimates, "clean": clip.target}
    rate = audio.sample_rate
    scores = [["", *map(label_of, columns)]]
    for method, found in clip.scores.items():
        values = [f"{found.values[c]:.2f}" if c in found.values else "undefined" for c in columns]
        scores.append([method, *values])
    return {
        "heading": heading,
        "name": clip.name,
        "snr": clip.snr,
        "scores": scores,
        "picture": _png(figures.spectrograms(waves, rate, audio.stft)),
        "players": [
            (name, data_uri(player_wav(w, rate), "audio/wav")) for name, w in waves.items()
        ],
    }


def _curves(cfg: Config, history: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw loss and validation of a run, where there are any."""
    shown = []
    steps = [(line["step"], line["loss"]) for line in history if line.get("loss") is not None]
    if steps:
        x, loss = map(list, zip(*steps, strict=True))
        series = [("each step", x, loss)]
        if (window := len(loss) // 30) > 1:
            series.append((f"mean of {window} steps", x, figures.smooth(loss, window)))
        log, name = min(loss) > 0, f"{cfg.training.loss} loss"
        shown.append(figures.curves(series, xlabel="step", ylabel=name, log=log))
    name = cfg.training.metrics[0]
    valid = [(line["step"], (line.get("valid") or {}).get(name)) for line in history]
    known = [(step, value) for step, value in valid if value is not None]
    if known:
        x, y = map(list, zip(*known, strict=True))
        ylabel = f"validation {label_of(name)}"
        shown.append(figures.curves([(name, x, y)], xlabel="step", ylabel=ylabel))
    return shown


def _undefined_table(found: Mapping[str, Any]) -> Table:
    keys = ["clip", "method", "metric", "reason"]
    return [keys, *([entry[key] for key in keys] for entry in found["undefined"])]


def _speed_table(timing: Mapping[str, Any]) -> Table:
    rows = [["", "real-time factor", "latency"]]
    for method, found in timing["methods"].items():
        latency = found["latency_ms"]
        shown = "whole clip" if latency is None else f"{latency:.0f} ms"
        rows.append([method, f"{found['real_time_factor']:.3f}", shown])
    return rows


def _work_table(timing: Mapping[str, Any]) -> Table:
    work = sorted(timing["seconds"].items(), key=lambda item: -item[1])
    return [["work", "seconds of all processes"], *([name, f"{s:.1f}"] for name, s in work)]


def _png(figure: Figure) -> str:
    return data_uri(figures.to_png(figure), "image/png")
