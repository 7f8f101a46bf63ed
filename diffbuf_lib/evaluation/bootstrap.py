"""Means over clips with bootstrap intervals, for one evaluation or the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from diffbuf_lib.errors import DataError
from diffbuf_lib.evaluation.baselines import NOISY, OURS
from diffbuf_lib.evaluation.scores import Row, read_scores

LEVEL = 0.95
RESAMPLES = 2000
BAND_DB = 5.0
_NAMED = 5  # clips in a message


class Interval(NamedTuple):
    """A mean over clips and its confidence interval; without ends for a single clip."""

    mean: float
    low: float | None
    high: float | None
    clips: int


def bootstrap(
    values: Iterable[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """Return the mean of values and its 95 % percentile bootstrap interval (Efron 1979).

    None without values; no ends for a single one. Equal values and seeds give equal intervals.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if not len(data):
        return None
    mean = round(float(data.mean()), 6)
    if len(data) == 1:
        return Interval(mean, None, None, 1)
    # In batches, so that memory does not grow with the number of resamples.
    low, high = stats.bootstrap(
        (data,), np.mean, n_resamples=resamples, batch=100, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, round(float(low), 6), round(float(high), 6), len(data))


def group(snrs: Mapping[str, float | None]) -> dict[str, list[str]]:
    """Sort clips into bands of input SNR (dB; None is in no band), after a band of all clips.

    Bands are centred on multiples of 5 dB: sets are often made at -10, -5, 0 dB, and a band that
    began there would split their clips by rounding.
    """
    bands: dict[float, list[str]] = {}
    for clip, snr in snrs.items():
        if snr is not None:
            bands.setdefault(BAND_DB * math.floor(snr / BAND_DB + 0.5), []).append(clip)
    half = BAND_DB / 2
    named = {f"{mid - half:g} to {mid + half:g} dB": bands[mid] for mid in sorted(bands)}
    return {"all": list(snrs), **named}


def summarise(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the content of summary.json: `compare_methods` for every metric and SNR band."""
    snrs = {row.clip: row.snr for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    bands: dict[str, Any] = {}
    for name, clips in group(snrs).items():
        columns: dict[str, Any] = {}
        for metric in metrics:
            table: dict[str, dict[str, float]] = {method: {} for method in methods}
            for row in rows:
                if metric in row.values:
                    table[row.method][row.clip] = row.values[metric]
            columns[metric] = found = compare_methods(table, clips)
            for intervals in found["methods"].values():
                intervals.update({key: x and x._asdict() for key, x in intervals.items()})
        bands[name] = {"clips": len(clips), "columns": columns}
    return {
        "clips": len(snrs),
        "methods": methods,
        "interval": f"{LEVEL:.0%} percentile bootstrap over clips, {RESAMPLES} resamples",
        "bands": bands,
        "undefined": [
            {"clip": row.clip, "method": row.method, "metric": metric, "reason": reason}
            for row in rows
            for metric, reason in row.undefined.items()
        ],
    }


def compare_methods(
    table: Mapping[str, Mapping[str, float]], clips: Sequence[str]
) -> dict[str, Any]:
    """Compare methods by one metric on those of `clips` for which all of them have a score.

    The table is method -> clip -> score; diffbuf and noisy are among the methods. Returns how many
    clips count; and for each method the intervals of its mean, its gain over the noisy input, and
    our model's lead over it, paired clip by clip.
    """
    common = [clip for clip in clips if all(clip in scores for scores in table.values())]

    def paired(one: str, other: str) -> Interval | None:
        if one == other:
            return None
        return bootstrap(table[one][clip] - table[other][clip] for clip in common)

    return {
        "clips": len(common),
        "methods": {
            method: {
                "mean": bootstrap(scores[clip] for clip in common),
                "gain": paired(method, NOISY),
                "lead": paired(OURS, method),
            }
            for method, scores in table.items()
        },
    }


class Difference(NamedTuple):
    """How two evaluations differ in one metric on one band of clips."""

    column: str
    band: str  # of input SNR; "all" for all clips
    a: float | None  # mean over the clips for which both have a score
    b: float | None
    difference: Interval | None  # b - a, paired clip by clip
    better: float  # share of clips for which b is above a
    clips: int  # in the band, scored or not


def compare_folders(
    a: str | Path, b: str | Path, *, method: str = OURS, seed: int = 0
) -> list[Difference]:
    """Compare one method (noisy, a baseline or diffbuf) in two folders of `diffbuf evaluate`.

    DataError for a missing folder or method, no common metric, or different clips, which it names.
    """
    (metrics, one), (metrics_b, other) = (_read(path, method) for path in (a, b))
    for left, right, path in ((one, other, b), (other, one, a)):
        if alone := ", ".join(sorted(left.keys() - right.keys())[:_NAMED]):
            raise DataError(f"{path} lacks {alone}: evaluate both on the same clips")
    if changed := [clip for clip, row in one.items() if row.checksum != other[clip].checksum]:
        names, fix = ", ".join(changed[:_NAMED]), "evaluate the same data with the same --seconds"
        raise DataError(f"{names} differ between {a} and {b}: {fix}")
    common = [metric for metric in metrics if metric in metrics_b]
    if not common:
        raise DataError(f"{a} and {b} have no metric in common: evaluate both with the same ones")
    found = []
    for metric in common:
        for band, clips in group({clip: row.snr for clip, row in one.items()}).items():
            scores = [(one[clip].values, other[clip].values) for clip in clips]
            pairs = [(x[metric], y[metric]) for x, y in scores if metric in x and metric in y]
            a_mean, b_mean = np.mean(pairs, axis=0).tolist() if pairs else (None, None)
            difference = bootstrap((y - x for x, y in pairs), seed=seed)
            better = sum(y > x for x, y in pairs) / max(len(pairs), 1)
            found.append(Difference(metric, band, a_mean, b_mean, difference, better, len(clips)))
    return found


def _read(path: str | Path, method: str) -> tuple[list[str], dict[str, Row]]:
    metrics, rows = read_scores(path)
    chosen = {row.clip: row for row in rows if row.method == method}
    if not chosen:
        known = ", ".join(dict.fromkeys(row.method for row in rows))
        raise DataError(f"{path} has no method {method!r}: it has {known}")
    return metrics, chosen
