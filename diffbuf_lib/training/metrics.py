"""Scores of enhanced clips: SI-SDR, SDR, PESQ and ESTOI, one value a clip.

A score that is undefined for a clip is NaN and is left out of the mean: a silent target has no
speech to score, an all-zero estimate has no scale, PESQ and STOI need a minimum of speech. No clip
stops a run.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch

from diffbuf_lib.errors import ConfigError, MissingExtraError, ShapeError
from diffbuf_lib.registry import METRICS

SILENCE_RMS = 1e-5
"""Full scale 1. Below it (-100 dB, a third of a 16-bit step) a clip counts as silent."""

PESQ_SAMPLE_RATES = {8000: "nb", 16000: "wb"}
"""Hz and the mode that ITU-T P.862 (narrow band) and P.862.2 (wide band) define there."""


class UndefinedScoreError(Exception):
    """A score that does not exist for a clip; the message is the reason."""


class MeanScore(NamedTuple):
    """The mean of a score over the clips for which it is defined."""

    mean: float
    scored: int
    total: int


def score_clips(
    estimate: torch.Tensor, target: torch.Tensor, sample_rate: int, metrics: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Score estimates against their targets.

    Args:
        estimate: [B, T] float, full scale 1.
        target: [B, T] float, full scale 1, the clean speech.
        sample_rate: Hz.
        metrics: names of the functions below.

    Returns:
        [B] float32 on the CPU for every metric; NaN where it is undefined.

    Raises:
        ShapeError: the two are not [B, T] of one shape.
        MissingExtraError, ConfigError: as in `check_metrics`.
    """
    metrics = list(metrics)
    check_metrics(metrics, sample_rate)
    if estimate.dim() != 2 or estimate.shape != target.shape:
        raise ShapeError(
            f"estimate {list(estimate.shape)} and target {list(target.shape)} must both be [B, T]: "
            "average the channels first"
        )
    estimate, target = estimate.detach().float().cpu(), target.detach().float().cpu()
    scores = {metric: torch.full((len(estimate),), math.nan) for metric in metrics}
    for metric, values in scores.items():
        for i in range(len(estimate)):
            with suppress(UndefinedScoreError):
                values[i] = score_clip(metric, estimate[i], target[i], sample_rate)
    return scores


def mean_scores(scores: Mapping[str, torch.Tensor]) -> dict[str, MeanScore]:
    """Average each score over the clips for which it is defined.

    Args:
        scores: [B] for every metric, NaN where undefined, as `score_clips` gives them.

    Returns:
        For every metric the mean (NaN when no clip could be scored), how many clips it is over,
        and how many there were.
    """
    means = {}
    for metric, values in scores.items():
        defined = values[~values.isnan()]
        mean = defined.double().mean().item() if len(defined) else math.nan
        means[metric] = MeanScore(mean, len(defined), len(values))
    return means


def check_metrics(metrics: Iterable[str], sample_rate: int) -> None:
    """Check, before a run rather than at its first validation, that metrics can be computed.

    Raises:
        ConfigError: an unknown metric, or PESQ at a rate that it is not defined for.
        MissingExtraError: a package is missing; the message has the command that installs it.
    """
    for metric in metrics:
        package = METRICS[metric].facts.get("package")
        if package and importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"metric {metric} needs the package {package}: pip install 'diffbuf[metrics]', or "
                f"take {metric} out of training.metrics"
            )
        if metric == "pesq" and sample_rate not in PESQ_SAMPLE_RATES:
            raise ConfigError(
                f"pesq is defined at 8000 and 16000 Hz, not at {sample_rate} Hz: take pesq out of "
                "training.metrics or change audio.sample_rate"
            )


def lower_is_better(name: str) -> bool:
    """Whether less is more of a metric, or of "loss"."""
    return name == "loss" or bool(METRICS[name].facts.get("lower_is_better"))


def score_clip(
    metric: str, estimate: torch.Tensor, target: torch.Tensor, sample_rate: int
) -> float:
    """Score one estimate, or say why that cannot be done.

    Args:
        metric: a name that `score_clips` knows.
        estimate: [T] float32 on the CPU, full scale 1.
        target: [T] float32 on the CPU, the clean speech.
        sample_rate: Hz.

    Raises:
        UndefinedScoreError: the score does not exist for this clip.
    """
    check_audible("estimate", estimate)
    check_audible("target", target)
    try:
        value = METRICS[metric].load()(estimate, target, sample_rate)
    except Exception as error:  # pesq has its own errors, linear solvers theirs: all mean this
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndefinedScoreError(f"{metric} gave up: {reason}") from error
    if not math.isfinite(value):
        raise UndefinedScoreError(f"{metric} is not finite")
    return value


def check_audible(name: str, wave: torch.Tensor) -> None:
    """Check that a signal [T] is finite and not silent.

    Raises:
        UndefinedScoreError: it is not; the message calls it `name`.
    """
    if not wave.isfinite().all():
        raise UndefinedScoreError(f"the {name} holds NaN or Inf")
    if wave.numel() == 0 or wave.square().mean().sqrt() < SILENCE_RMS:
        raise UndefinedScoreError(f"the {name} is silent")


def si_sdr(estimate: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio, dB; signals [T]."""
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    # float64: in float32 a good estimate's residual is rounding noise above about 70 dB.
    return scale_invariant_signal_distortion_ratio(estimate.double(), target.double()).item()


def sdr(estimate: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Signal-to-distortion ratio of BSS eval with a 512-tap filter, dB; signals [T]."""
    from torchmetrics.functional.audio import signal_distortion_ratio

    return signal_distortion_ratio(estimate.double(), target.double()).item()


def pesq(estimate: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """MOS-LQO of ITU-T P.862.2 at 16 kHz, of P.862 at 8 kHz; signals [T]."""
    from torchmetrics.functional.audio import perceptual_evaluation_speech_quality

    mode = PESQ_SAMPLE_RATES[sample_rate]
    return perceptual_evaluation_speech_quality(estimate, target, sample_rate, mode).item()


def estoi(estimate: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Extended short-time objective intelligibility, 0 to 1; signals [T]."""
    from torchmetrics.functional.audio import short_time_objective_intelligibility

    with warnings.catch_warnings():
        # Where too little speech is left pystoi warns and returns 1e-5, which is no score.
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        return short_time_objective_intelligibility(
            estimate, target, sample_rate, extended=True
        ).item()
