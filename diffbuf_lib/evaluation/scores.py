"""Score one estimate by every metric asked for; a score that is undefined has a reason.

DistillMOS and DNSMOS estimate what listeners would say and need no clean signal; their packages
bring the weights. Both rate silence at about 1.9, so silence is refused before they see it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.training.metrics import (
    UndefinedScoreError,
    check_audible,
    check_metrics,
    score_clip,
)

SPEECH_RMS = 1e-4
"""Full scale 1. A target below it (-80 dB, three steps of 16 bits) is rounding noise, no speech;
PESQ would rate noise against like noise as excellent."""


def distillmos(estimate: Tensor) -> float:
    """Return DistillMOS, 1 to 5 (Stahl, Gamper 2025).

    Args:
        estimate: [T] float32 at 16 kHz; its peak does not matter.
    """
    with torch.inference_mode():
        return float(_distillmos_model()(estimate.float().unsqueeze(0)))


def dnsmos(estimate: Tensor) -> tuple[float, ...]:
    """Return DNSMOS, 1 to 5: overall, signal and background of P.835, and P.808's single score.

    Reddy, Gopal, Cutler 2021 and 2022. A clip shorter than 9.01 s is repeated up to it, as the
    package's authors do.

    Args:
        estimate: [T] float32 at 16 kHz, not empty; scaled down if its peak is above 1, which DNSMOS
            refuses.
    """
    from speechmos import dnsmos as package

    peak = float(estimate.abs().max())
    scores = package.run((estimate / max(peak, 1.0)).clamp(-1, 1).numpy(), 16000)
    return tuple(float(scores[name]) for name in ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos"))


@dataclass(frozen=True)
class Metric:
    """What is known about one metric."""

    labels: dict[str, str]  # of every column that it gives, with its range or unit
    perceptual: bool = False  # it judges speech, which then has to be there
    shortest: float = 0.0  # seconds of a clip that it needs
    package: str | None = None  # to be installed with diffbuf[metrics]
    opinion: Callable[[Tensor], float | tuple[float, ...]] | None = None
    """Computes the columns from the estimate alone, at 16 kHz; None if `score_clip` of training
    knows the metric."""


METRICS = {
    "si_sdr": Metric({"si_sdr": "SI-SDR (dB)"}),
    "sdr": Metric({"sdr": "SDR (dB)"}),
    "pesq": Metric({"pesq": "PESQ (1 to 4.6)"}, True, 0.25, "pesq"),
    "estoi": Metric({"estoi": "ESTOI (0 to 1)"}, True, 0.4, "pystoi"),
    "distillmos": Metric(
        {"distillmos": "DistillMOS (1 to 5)"}, True, 0.25, "distillmos", distillmos
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
        dnsmos,
    ),
}


@dataclass
class Scores:
    """The scores of one estimate."""

    values: dict[str, float] = field(default_factory=dict)  # of every column that is defined
    undefined: dict[str, str] = field(default_factory=dict)  # metric -> why it is not
    seconds: dict[str, float] = field(default_factory=dict)  # metric -> time that it took

    def with_nan(self) -> dict[str, float]:
        """Return every column's score, NaN where it is undefined."""
        return dict.fromkeys(columns_of(self.undefined), math.nan) | self.values


def columns_of(metrics: Iterable[str]) -> list[str]:
    """Return the columns of several metrics, in their order."""
    return [column for name in metrics for column in METRICS[name].labels]


def label_of(column: str) -> str:
    """Return what tables and pages call a column: its name and its unit or range."""
    labels = (metric.labels for metric in METRICS.values())
    return next((known[column] for known in labels if column in known), column)


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
            found = _compute(name, estimate, target, rate)
        except UndefinedScoreError as reason:
            scores.undefined[name] = str(reason).replace(";", ",")  # which separates them in a file
        else:
            values = found if isinstance(found, tuple) else (found,)
            # Four decimals are far below what any metric means, and make files easy to compare.
            rounded = (round(value, 4) for value in values)
            scores.values.update(zip(METRICS[name].labels, rounded, strict=True))
        scores.seconds[name] = time.perf_counter() - begun
    return scores


def _compute(name: str, estimate: Tensor, target: Tensor, rate: int) -> float | tuple[float, ...]:
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
        return score_clip(name, estimate, target, rate)
    except UndefinedScoreError as error:
        if "Not enough STFT frames" in str(error):
            raise UndefinedScoreError(
                "too little speech: ESTOI needs 0.4 s that are not silent"
            ) from None
        raise


@functools.cache
def _distillmos_model() -> Any:
    """Load the model once a process; the package prints where from, and stdout is not its own."""
    from distillmos import ConvTransformerSQAModel

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = ConvTransformerSQAModel()
    return model.eval()
