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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.registry import METRICS
from diffbuf_lib.training.metrics import UndefinedScoreError, check_audible, score_clip

SPEECH_RMS = 1e-4
"""Full scale 1. A target below it (-80 dB, three steps of 16 bits) is rounding noise, no speech;
PESQ would rate noise against like noise as excellent."""

DNSMOS = ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak", "dnsmos_p808")
"""What the name `dnsmos` stands for: one network call gives all four."""


@dataclass
class Scores:
    """The scores of one estimate."""

    values: dict[str, float] = field(default_factory=dict)  # of every metric that is defined
    undefined: dict[str, str] = field(default_factory=dict)  # metric -> why it is not
    seconds: dict[str, float] = field(default_factory=dict)  # metric -> time that it took

    def __getitem__(self, metric: str) -> float:
        """Return a score, NaN if it is undefined."""
        return self.values.get(metric, math.nan)


def score(estimate: Tensor, target: Tensor, rate: int, metrics: Iterable[str]) -> Scores:
    """Score one estimate.

    Args:
        estimate: [T] float32 on the CPU, full scale 1.
        target: [T] float32 on the CPU, the clean speech.
        rate: Hz.
        metrics: as `check_scoring` returned them.
    """
    scores = Scores()
    for name in metrics:
        begun = time.perf_counter()
        try:
            _check_defined(name, estimate, target, rate)
            # Four decimals are far below what any metric means, and make files easy to compare.
            scores.values[name] = round(score_clip(name, estimate, target, rate), 4)
        except UndefinedScoreError as error:
            reason = str(error).replace(";", ",")  # which separates them in a file
            if "Not enough STFT frames" in reason:
                reason = "too little speech: ESTOI needs 0.4 s that are not silent"
            scores.undefined[name] = reason
        scores.seconds[name] = time.perf_counter() - begun
    return scores


def check_scoring(metrics: Sequence[str], rate: int) -> list[str]:
    """Check, before anything is enhanced, that metrics can be computed at a rate in Hz.

    Returns:
        Their names, `dnsmos` written out as the four that it stands for.

    Raises:
        ConfigError: none, an unknown or repeated metric, or a rate that it is not defined for.
        MissingExtraError: a package is missing; the message has the command that installs it.
    """
    names = [one for name in metrics for one in (DNSMOS if name == "dnsmos" else (name,))]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--metrics {' '.join(metrics)}: give each metric once, and at least one")
    for name in names:
        facts = METRICS[name].facts
        package, rates = facts.get("package"), facts.get("sample_rates")
        if package and importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"metric {name} needs the package {package}: pip install 'diffbuf[metrics]', or "
                f"take {name} out of --metrics"
            )
        if rates and rate not in rates:
            known = " and ".join(map(str, rates))
            raise ConfigError(f"{name} is defined at {known} Hz, not at {rate} Hz: take it out")
    return names


def label_of(metric: str) -> str:
    """Return what tables and pages call a metric: its name and its unit or range."""
    facts = METRICS[metric].facts if metric in METRICS else {}
    unit = facts.get("unit")
    return facts.get("label", metric) + (f" ({unit})" if unit else "")


def distillmos(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Return DistillMOS, 1 to 5 (Stahl, Gamper 2025), of [T] at 16 kHz; its peak is no matter."""
    with torch.inference_mode():
        return float(_distillmos_model()(estimate.float().unsqueeze(0)))


@functools.lru_cache(maxsize=1)  # four metrics ask for one and the same tensor in turn
def dnsmos(estimate: Tensor) -> dict[str, float]:
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
    return {name: float(scores[f"{name.removeprefix('dnsmos_')}_mos"]) for name in DNSMOS}


def _dnsmos_column(name: str, estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    return dnsmos(estimate)[name]


dnsmos_ovrl, dnsmos_sig, dnsmos_bak, dnsmos_p808 = (
    functools.partial(_dnsmos_column, name) for name in DNSMOS
)


def _check_defined(name: str, estimate: Tensor, target: Tensor, rate: int) -> None:
    """Check what `score_clip` does not: UndefinedScoreError says why there is no score."""
    check_audible("estimate", estimate)
    check_audible("target", target)
    facts, seconds = METRICS[name].facts, len(estimate) / rate
    if seconds < (shortest := facts.get("shortest", 0)):
        raise UndefinedScoreError(f"{seconds:.3g} s is too short: {name} needs {shortest} s")
    if facts.get("speech") and target.square().mean().sqrt() < SPEECH_RMS:
        raise UndefinedScoreError("the target is below -80 dB: no speech to judge")
    if facts.get("unit") == "dB" and torch.equal(estimate, target):
        raise UndefinedScoreError("the estimate is the target itself, so the ratio is infinite")


@functools.cache
def _distillmos_model() -> Any:
    """Load the model once a process; the package prints where from, and stdout is not its own."""
    from distillmos import ConvTransformerSQAModel

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = ConvTransformerSQAModel()
    return model.eval()
