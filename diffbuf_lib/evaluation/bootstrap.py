"""Means with bootstrap intervals, gains over the noisy input, and bands of input SNR."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
BAND_DB = 5.0
_AT_ONCE = 1_000_000  # numbers drawn at a time, so that memory does not grow with the clips


class Interval(NamedTuple):
    """A mean over clips and where it may lie; without ends for a single clip."""

    mean: float
    low: float | None
    high: float | None
    clips: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    values: Iterable[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval | None:
    """Return the mean of values and its percentile bootstrap interval (Efron 1979).

    Args:
        values: a score a clip, or a difference of two; undefined ones have been left out before.
        seed: of the resampling; equal values have equal intervals.
        resamples: how often as many clips are drawn with replacement.
        level: probability that the interval is to cover the mean.

    Returns:
        None without values; no ends with a single one.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if not len(data):
        return None
    mean = round(float(data.mean()), 6)
    if len(data) == 1:
        return Interval(mean, None, None, 1)
    low, high = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(data)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, round(float(low), 6), round(float(high), 6), len(data))


def band(snr: float) -> float:
    """Return the middle of an SNR's band, dB: 5 dB wide, centred on multiples of 5.

    Sets are often made at -10, -5, 0 dB: a band that began there would split their clips by
    rounding.
    """
    return BAND_DB * math.floor(snr / BAND_DB + 0.5)


def group(snrs: Mapping[str, float | None]) -> dict[str, list[str]]:
    """Sort clips into bands of input SNR, lowest first, after one of all clips.

    Args:
        snrs: clip -> input SNR, dB; clips with None are in no band.
    """
    bands: dict[float, list[str]] = {}
    for clip, snr in snrs.items():
        if snr is not None:
            bands.setdefault(band(snr), []).append(clip)
    named = {
        f"{middle - BAND_DB / 2:g} to {middle + BAND_DB / 2:g} dB": bands[middle]
        for middle in sorted(bands)
    }
    return {"all": list(snrs), **named}


Table = Mapping[str, Mapping[str, float]]
"""Method -> clip -> score, for the clips where it is defined."""


def compare_methods(
    table: Table, clips: Sequence[str], *, ours: str, noisy: str, seed: int = 0
) -> dict[str, Any]:
    """Compare methods by one metric on the clips for which all of them have a score.

    Args:
        table: method -> clip -> score.
        clips: of one band.
        ours: the method whose lead over every other one is wanted.
        noisy: the method over which every other one's gain is wanted.
        seed: of the bootstrap.

    Returns:
        clips: how many count; and for each method `mean`, `gain` (over the noisy input) and `lead`
        (of ours over it, paired clip by clip), as intervals or None.
    """
    common = [clip for clip in clips if all(clip in scores for scores in table.values())]

    def paired(one: str, other: str) -> Interval | None:
        if one == other:
            return None
        return bootstrap((table[one][clip] - table[other][clip] for clip in common), seed=seed)

    return {
        "clips": len(common),
        "methods": {
            method: {
                "mean": bootstrap((scores[clip] for clip in common), seed=seed),
                "gain": paired(method, noisy),
                "lead": paired(ours, method),
            }
            for method, scores in table.items()
        },
    }
