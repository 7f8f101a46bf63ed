"""Results as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffbuf_lib.evaluation.scoring import LABELS
from diffbuf_lib.evaluation.statistics import Interval

SHOWN_REASONS = 10


def render(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def cell(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return an interval of summary.json as text, `-` where there is none."""
    if interval is None:
        return "-"
    text = str(Interval(**interval))
    return f"+{text}" if signed and interval["mean"] >= 0 else text


def overview(summary: Mapping[str, Any]) -> str:
    """Return every metric of every method over all clips, and which clips have no score."""
    everything = summary["bands"]["all"]["columns"]
    lines = [f"{summary['clips']} clips; means, 95 % intervals in brackets"]
    heads = [LABELS.get(column, column) for column in everything]
    rows = [["", *heads]]
    for method in summary["methods"]:
        means = [found["methods"][method]["mean"] for found in everything.values()]
        rows.append([method, *map(cell, means)])
    rows.append(["clips scored", *(str(found["clips"]) for found in everything.values())])
    return "\n".join([*lines, render(rows), *_undefined(summary["undefined"])])


def gains(summary: Mapping[str, Any], column: str) -> str:
    """Return the gain over the noisy input in one metric, a row a band of input SNR."""
    methods = summary["methods"][1:]
    rows = [[f"gain in {LABELS.get(column, column)}", *methods, "clips"]]
    for name, found in summary["bands"].items():
        table = found["columns"][column]
        shown = [cell(table["methods"][method]["gain"], signed=True) for method in methods]
        rows.append([name, *shown, str(table["clips"])])
    return render(rows)


def times(timing: Mapping[str, Any]) -> str:
    """Return real-time factors, latencies and where the time went."""
    rows = [["", "real-time factor", "latency"]]
    for method, found in timing["methods"].items():
        latency = found["latency_ms"]
        shown = "whole clip" if latency is None else f"{latency:.0f} ms"
        rows.append([method, f"{found['real_time_factor']:.3f}", shown])
    total = sum(timing["seconds"].values()) or 1.0
    spent = ", ".join(
        f"{name} {seconds:.1f} s ({seconds / total:.0%})"
        for name, seconds in sorted(timing["seconds"].items(), key=lambda item: -item[1])
    )
    return f"{render(rows)}\ntime of all processes: {spent}"


def _undefined(entries: Sequence[Mapping[str, str]]) -> list[str]:
    if not entries:
        return []
    lines = [f"{len(entries)} scores are not defined and are left out:"]
    lines += [
        f"  {entry['clip']}  {entry['method']}  {entry['metric']}: {entry['reason']}"
        for entry in entries[:SHOWN_REASONS]
    ]
    if len(entries) > SHOWN_REASONS:
        lines.append(f"  and {len(entries) - SHOWN_REASONS} more: see scores.csv")
    return lines
