"""Score one estimate by every metric asked for; what has no score has a reason."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.evaluation import opinion
from diffbuf_lib.training.metrics import (
    UndefinedScoreError,
    check_audible,
    check_metrics,
    score_clip,
)

SPEECH_RMS = 1e-4
"""Full scale 1. A target below it (-80 dB, three steps of 16 bits) is rounding noise, no speech;
PESQ would rate noise against like noise as excellent."""


@dataclass(frozen=True)
class Metric:
    """What is known about one metric.

    Attributes:
        labels: the label of every column that it gives, with its range or unit.
        perceptual: whether it judges speech, which then has to be there.
        shortest: seconds of a clip that it needs.
        package: to be installed with diffbuf[metrics].
        opinion: computes the columns from the estimate alone; None if `score_clip` knows it.
    """

    labels: dict[str, str]
    perceptual: bool = False
    shortest: float = 0.0
    package: str | None = None
    opinion: Callable[[Tensor], tuple[float, ...]] | None = None


METRICS = {
    "si_sdr": Metric({"si_sdr": "SI-SDR (dB)"}),
    "sdr": Metric({"sdr": "SDR (dB)"}),
    "pesq": Metric({"pesq": "PESQ (1 to 4.6)"}, True, 0.25, "pesq"),
    "estoi": Metric({"estoi": "ESTOI (0 to 1)"}, True, 0.4, "pystoi"),
    "distillmos": Metric(
        {"distillmos": "DistillMOS (1 to 5)"},
        True,
        0.25,
        "distillmos",
        lambda estimate: (opinion.distillmos(estimate),),
    ),
    "dnsmos": Metric(
        {
            "dnsmos_ovrl": "DNSMOS overall (1 to 5)",
            "dnsmos_sig": "DNSMOS signal (1 to 5)",
            "dnsmos_bak": "DNSMOS background (1 to 5)",
            "dnsmos_p808": "DNSMOS P.808 (1 to 5)",
        },
        True,
        0.25,
        "speechmos",
        lambda estimate: opinion.dnsmos(estimate),
    ),
}

LABELS = {column: label for metric in METRICS.values() for column, label in metric.labels.items()}
"""Column of a results file -> what tables and pages call it."""


@dataclass
class Scores:
    """The scores of one estimate.

    Attributes:
        values: column -> score, for those that are defined.
        undefined: metric -> why it is not.
        seconds: metric -> time that it took.
    """

    values: dict[str, float] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def columns_of(metrics: Iterable[str]) -> list[str]:
    """Return the columns of several metrics, in their order."""
    return [column for name in metrics for column in METRICS[name].labels]


def check_scoring(metrics: Sequence[str], rate: int) -> None:
    """Check, before anything is enhanced, that metrics can be computed.

    Raises:
        ConfigError: none, an unknown or repeated metric, or a rate that it is not defined for.
        MissingExtraError: a package is missing; the message has the command that installs it.
    """
    if not metrics or len(set(metrics)) < len(metrics):
        raise ConfigError(f"--metrics {' '.join(metrics)}: give each metric once, and at least one")
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"metric {name!r} is unknown: the names are {', '.join(METRICS)}")
        package = METRICS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"metric {name} needs the package {package}: pip install 'diffbuf[metrics]', or "
                f"take {name} out of --metrics"
            )
        if METRICS[name].opinion is not None and rate != 16000:
            raise ConfigError(f"{name} is defined at 16000 Hz, not at {rate} Hz: take it out")
    check_metrics([name for name in metrics if METRICS[name].opinion is None], rate)


def score(estimate: Tensor, target: Tensor, rate: int, metrics: Iterable[str]) -> Scores:
    """Score one estimate.

    Args:
        estimate: [T] float32 on the CPU, full scale 1.
        target: [T] float32 on the CPU, the clean speech.
        rate: Hz.
        metrics: names in `METRICS` that `check_scoring` has let pass.
    """
    scores = Scores()
    for name in metrics:
        begun = time.perf_counter()
        try:
            values = _values(name, estimate, target, rate)
        except UndefinedScoreError as reason:
            scores.undefined[name] = str(reason).replace(";", ",")  # which separates them in a file
        else:
            # Four decimals are far below what any metric means, and make files easy to compare.
            rounded = (round(value, 4) for value in values)
            scores.values.update(zip(METRICS[name].labels, rounded, strict=True))
        scores.seconds[name] = time.perf_counter() - begun
    return scores


def _values(name: str, estimate: Tensor, target: Tensor, rate: int) -> tuple[float, ...]:
    metric = METRICS[name]
    check_audible("estimate", estimate)
    seconds = len(estimate) / rate
    if seconds < metric.shortest:
        raise UndefinedScoreError(f"{seconds:.3g} s is too short: {name} needs {metric.shortest} s")
    if metric.perceptual:
        check_audible("target", target)
        if target.square().mean().sqrt() < SPEECH_RMS:
            raise UndefinedScoreError("the target is below -80 dB: no speech to judge")
    elif torch.equal(estimate, target):
        raise UndefinedScoreError("the estimate is the target itself, so the ratio is infinite")
    if metric.opinion is not None:
        return metric.opinion(estimate)
    try:
        return (score_clip(name, estimate, target, rate),)
    except UndefinedScoreError as error:
        if "Not enough STFT frames" in str(error):
            raise UndefinedScoreError(
                "too little speech: ESTOI needs 0.4 s that are not silent"
            ) from None
        raise
