"""Scores of enhanced clips: SI-SDR, SDR, PESQ and ESTOI, one value per clip.

A score that is undefined for a clip, such as a silent one, is NaN and is left out of the mean.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import ConfigError, MissingExtraError, ShapeError
from diffbuf_lib.registry import METRICS

SILENCE_RMS = 1e-5  # of full scale: a clip below it (-100 dB, a third of a 16-bit step) is silent


class UndefinedScoreError(Exception):
    """A score that does not exist for a clip; the message is the reason."""


class MeanScore(NamedTuple):
    """The mean of a score over the clips for which it is defined; NaN over none."""

    mean: float
    scored: int
    total: int


def score_clips(
    estimate: Tensor, target: Tensor, sample_rate: int, metrics: Sequence[str]
) -> dict[str, Tensor]:
    """Score estimates against their targets, the clean speech; both [B, T], full scale 1.

    Returns [B] float32 on the CPU for every metric; NaN where it is undefined. ShapeError if the
    two are not [B, T] of one shape; others as in `check_metrics`.
    """
    check_metrics(metrics, sample_rate)
    if estimate.dim() != 2 or estimate.shape != target.shape:
        shapes = f"estimate {list(estimate.shape)} and target {list(target.shape)}"
        raise ShapeError(f"{shapes} must both be [B, T]: average the channels first")
    estimate, target = estimate.detach().float().cpu(), target.detach().float().cpu()
    scores = {metric: torch.full((len(estimate),), math.nan) for metric in metrics}
    for metric, values in scores.items():
        for i in range(len(estimate)):
            with suppress(UndefinedScoreError):
                values[i] = score_clip(metric, estimate[i], target[i], sample_rate)
    return scores


def mean_scores(scores: Mapping[str, Tensor]) -> dict[str, MeanScore]:
    """Average each of the scores that `score_clips` gives over the clips that have one."""
    means = {}
    for metric, values in scores.items():
        defined = values[~values.isnan()].double()
        means[metric] = MeanScore(defined.mean().item(), len(defined), len(values))
    return means


def check_metrics(metrics: Iterable[str], sample_rate: int) -> None:
    """Check, before a run rather than at its first validation, that metrics can be computed.

    ConfigError for an unknown metric or a rate that it is not defined for; MissingExtraError, with
    the command that installs it, for a missing package.
    """
    for metric in metrics:
        facts = METRICS[metric].facts
        package, rates = facts.get("package"), facts.get("sample_rates")
        if package and importlib.util.find_spec(package) is None:
            fix = "pip install 'diffbuf[metrics]', or take it out of the metrics"
            raise MissingExtraError(f"metric {metric} needs the package {package}: {fix}")
        if rates and sample_rate not in rates:
            known = " and ".join(map(str, rates))
            what = f"{metric} is defined at {known} Hz, not at {sample_rate} Hz"
            raise ConfigError(f"{what}: take it out of the metrics or change audio.sample_rate")


def lower_is_better(name: str) -> bool:
    """Whether lower values of a metric, or of "loss", are better."""
    return name == "loss" or bool(METRICS[name].facts.get("lower_is_better"))


def score_clip(metric: str, estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Score one estimate [T] against its target [T], both float32 on the CPU, full scale 1.

    UndefinedScoreError says why the score does not exist for this clip.
    """
    check_audible("estimate", estimate)
    check_audible("target", target)
    try:
        value = METRICS[metric].load()(estimate, target, sample_rate)
    except Exception as error:  # pesq and linear solvers have errors of their own: all mean this
        why = reason(error) or type(error).__name__
        raise UndefinedScoreError(f"{metric} gave up: {why}") from error
    if not math.isfinite(value):
        raise UndefinedScoreError(f"{metric} is not finite")
    return float(value)


def check_audible(name: str, wave: Tensor) -> None:
    """Raise UndefinedScoreError for a signal [T] that is silent or not finite."""
    if not wave.isfinite().all():
        raise UndefinedScoreError(f"the {name} holds NaN or Inf")
    if wave.numel() == 0 or wave.square().mean().sqrt() < SILENCE_RMS:
        raise UndefinedScoreError(f"the {name} is silent")


def si_sdr(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio, dB."""
    # float64: in float32 a good estimate's residual is rounding noise above about 70 dB.
    pair = estimate.double(), target.double()
    return _torchmetrics().scale_invariant_signal_distortion_ratio(*pair).item()


def sdr(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Signal-to-distortion ratio of BSS eval with a 512-tap filter, dB."""
    return _torchmetrics().signal_distortion_ratio(estimate.double(), target.double()).item()


def pesq(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """MOS-LQO of ITU-T P.862.2 (wide band) at 16 kHz, of P.862 (narrow band) at 8 kHz."""
    score = _torchmetrics().perceptual_evaluation_speech_quality
    return score(estimate, target, sample_rate, "wb" if sample_rate == 16000 else "nb").item()


def estoi(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Extended short-time objective intelligibility, 0 to 1."""
    score = _torchmetrics().short_time_objective_intelligibility
    with warnings.catch_warnings():
        # Where too little speech is left pystoi warns and returns 1e-5, which is no score.
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        return score(estimate, target, sample_rate, True).item()


def _torchmetrics() -> Any:
    return importlib.import_module("torchmetrics.functional.audio")  # takes seconds to import
