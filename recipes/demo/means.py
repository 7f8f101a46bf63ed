"""Means of clips that were scored in memory; `diffbuf evaluate` has intervals too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffbuf_lib.evaluation import ScoredClip
from diffbuf_lib.evaluation.baselines import NOISY, OURS


class MeanGain(NamedTuple):
    """A metric's means over the clips for which it is defined before and after."""

    metric: str
    noisy: float  # mean of the mixtures; NaN if no clip has a score
    enhanced: float  # mean of the estimates
    gain: float  # enhanced - noisy
    scored: int  # clips in the means
    clips: int  # clips in total


def summary(clips: Sequence[ScoredClip], metrics: Sequence[str]) -> list[MeanGain]:
    """Average over clips, one row per metric; a clip without a score on either side is left out."""
    rows = []
    for metric in metrics:
        found = [(clip.scores[NOISY].values, clip.scores[OURS].values) for clip in clips]
        pairs = [(x[metric], y[metric]) for x, y in found if metric in x and metric in y]
        noisy, enhanced = np.mean(pairs, axis=0).tolist() if pairs else (math.nan, math.nan)
        rows.append(MeanGain(metric, noisy, enhanced, enhanced - noisy, len(pairs), len(clips)))
    return rows
