"""Score an estimate by every metric asked for, with a reason where there is no score; scores.csv.

DistillMOS and DNSMOS estimate what listeners would say and need no clean signal; their packages
bring the weights. Both rate silence at about 1.9, so silence is refused before they see it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.data.audio import write_bytes
from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.evaluation.baselines import OURS
from diffbuf_lib.registry import METRICS
from diffbuf_lib.training import metrics as basics
from diffbuf_lib.training.metrics import UndefinedScoreError

SPEECH_RMS = 1e-4  # full scale 1: a target below it is rounding noise, which PESQ rates as good
# What the name `dnsmos` stands for: one network call gives all four.
DNSMOS = ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak", "dnsmos_p808")
_FIXED = ("clip", "method", "snr_db", "seconds", "checksum")


@dataclass
class Scores:
    """The scores of one estimate."""

    values: dict[str, float] = field(default_factory=dict)  # of every metric that is defined
    undefined: dict[str, str] = field(default_factory=dict)  # metric -> why it is not
    seconds: dict[str, float] = field(default_factory=dict)  # metric -> time that it took


@dataclass(frozen=True)
class ScoredClip:
    """A clip, averaged to mono, with every method's estimate; the noisy input is a method too."""

    index: int  # its place in the dataset
    name: str  # of its file or folder, below the dataset's root
    mix: Tensor  # [T] float32, full scale 1, the noisy signal
    target: Tensor  # [T] float32, the clean signal
    estimates: dict[str, Tensor] = field(default_factory=dict)  # method -> [T], aligned with mix
    scores: dict[str, Scores] = field(default_factory=dict)

    @property
    def estimate(self) -> Tensor:
        """[T], the model's estimate."""
        return self.estimates[OURS]

    @property
    def snr(self) -> float | None:
        """10 log10 of the energy ratio of target to mix - target, dB; None if either is silent."""
        powers = [x.double().square().mean().item() for x in (self.target, self.mix - self.target)]
        if not basics.SILENCE_RMS**2 <= min(powers) <= max(powers) < math.inf:
            return None
        return round(10 * math.log10(powers[0] / powers[1]), 3)

    @property
    def checksum(self) -> str:
        """12 hexadecimal digits of its samples: equal clips have equal ones, wherever they lie."""
        samples = torch.cat([self.mix, self.target]).numpy().tobytes()
        return hashlib.sha256(samples).hexdigest()[:12]


class Row(NamedTuple):
    """The scores of one clip for one method: a row of scores.csv."""

    clip: str
    method: str  # noisy, a baseline, or diffbuf
    snr: float | None  # of the input, dB; None where it is undefined
    seconds: float
    checksum: str  # of mix and target
    values: dict[str, float]
    undefined: dict[str, str]


def score(estimate: Tensor, target: Tensor, rate: int, metrics: Iterable[str]) -> Scores:
    """Score an estimate [T] against the clean target [T], both float32 on the CPU, full scale 1.

    The rate is in Hz, the metrics are those that `check_scoring` returned.
    """
    scores = Scores()
    for name in metrics:
        begun = time.perf_counter()
        try:
            _check_defined(name, estimate, target, rate)
            # Four decimals are far finer than any metric's meaning, and make files comparable.
            scores.values[name] = round(basics.score_clip(name, estimate, target, rate), 4)
        except UndefinedScoreError as error:
            reason = str(error).replace(";", ",")  # which separates reasons in a file
            if "Not enough STFT frames" in reason:
                reason = "too little speech: ESTOI needs 0.4 s that are not silent"
            scores.undefined[name] = reason
        scores.seconds[name] = time.perf_counter() - begun
    return scores


def check_scoring(metrics: Sequence[str], rate: int) -> list[str]:
    """Check that metrics can be computed at a rate in Hz; return them, dnsmos as four.

    ConfigError for no metric or one that is given twice; else as `check_metrics`.
    """
    names = [one for name in metrics for one in (DNSMOS if name == "dnsmos" else (name,))]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--metrics {' '.join(metrics)}: give each metric once, and at least one")
    basics.check_metrics(names, rate)
    return names


def label_of(metric: str) -> str:
    """Return what people call a metric, with its unit or range."""
    facts = METRICS[metric].facts if metric in METRICS else {}
    unit = facts.get("unit")
    return facts.get("label", metric) + (f" ({unit})" if unit else "")


def write_scores(path: Path, rows: Iterable[Row], metrics: Sequence[str]) -> None:
    """Write scores.csv: an undefined score is empty, its reason last."""
    lines = []
    for row in rows:
        reasons = "; ".join(f"{metric}: {why}" for metric, why in row.undefined.items())
        fixed = dict(zip(_FIXED, row, strict=False))
        lines.append(fixed | dict.fromkeys(metrics) | row.values | {"undefined": reasons})
    write_csv(path, lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that all have the columns of the first; None is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())


def read_scores(folder: str | Path) -> tuple[list[str], list[Row]]:
    """Return the metrics and the rows (without reasons) of a results folder's scores.csv.

    DataError if there is none.
    """
    try:
        with open(Path(folder) / "scores.csv", encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError:
        fix = "give a folder that diffbuf evaluate has finished"
        raise DataError(f"{folder} has no scores.csv: {fix}") from None
    metrics = [name for name in lines[0] if name not in (*_FIXED, "undefined")]
    rows = []
    for line in lines:
        numbers = {name: float(line[name]) for name in (*metrics, "snr_db") if line[name]}
        snr, seconds = numbers.pop("snr_db", None), float(line["seconds"])
        rows.append(Row(line["clip"], line["method"], snr, seconds, line["checksum"], numbers, {}))
    return metrics, rows


def distillmos(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Return DistillMOS, 1 to 5 (Stahl, Gamper 2025), of [T] at 16 kHz, whatever its peak is."""
    with torch.inference_mode():
        return float(_distillmos_model()(estimate.float().unsqueeze(0)))


@functools.lru_cache(maxsize=1)  # four metrics ask for one and the same tensor in turn
def _dnsmos(estimate: Tensor) -> dict[str, float]:
    """Return DNSMOS, 1 to 5, of [T] at 16 kHz (Reddy, Gopal, Cutler 2021 and 2022).

    Overall, signal and background of P.835, and P.808's single score. A clip shorter than 9.01 s is
    repeated up to that, as the package's authors do; peaks above 1, which it refuses, are scaled.
    """
    from speechmos import dnsmos as package

    peak = float(estimate.abs().max())
    scores = package.run((estimate / max(peak, 1.0)).clamp(-1, 1).numpy(), 16000)
    return {name: float(scores[f"{name.removeprefix('dnsmos_')}_mos"]) for name in DNSMOS}


dnsmos_ovrl, dnsmos_sig, dnsmos_bak, dnsmos_p808 = (
    lambda estimate, target, sample_rate, name=name: _dnsmos(estimate)[name] for name in DNSMOS
)


def lps(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """Levenshtein phoneme similarity (Pirklbauer et al. 2023), at most 1, of [T] at 16 kHz.

    1 - the edits from the estimate's phonemes to the target's, over the number of the target's:
    sounds that a generative model invented or left out count, noise that hides no phoneme does not.
    Both are recognised by PocketSphinx with its English models, which often mishear, so only
    comparisons on the same clips are meaningful: a different sentence scores about 0.
    """
    from torchaudio.functional import edit_distance

    heard, said = _phonemes(estimate), _phonemes(target)
    if not said:
        raise UndefinedScoreError("no phoneme is recognised in the target")
    return 1 - edit_distance(heard, said) / len(said)


@functools.lru_cache(maxsize=16)  # of a batch: every method's estimate has the same target
def _phonemes(wave: Tensor) -> list[str]:
    decoder = _recogniser()
    decoder.start_utt()
    decoder.process_raw((wave.clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    words = [segment.word for segment in decoder.seg()]
    return [word for word in words if word != "SIL" and not word.startswith("+")]  # +NSN+: noise


@functools.cache
def _recogniser() -> Any:
    """Load the recogniser once per process, with its documentation's beams for phonemes."""
    from pocketsphinx import Decoder, get_model_path

    return Decoder(
        hmm=get_model_path("en-us/en-us"), allphone=get_model_path("en-us/en-us-phone.lm.bin"),
        lm=None, dict=None, lw=2.0, beam=1e-20, pbeam=1e-20, loglevel="FATAL",
    )  # fmt: skip


def _check_defined(name: str, estimate: Tensor, target: Tensor, rate: int) -> None:
    """Raise UndefinedScoreError, with the reason, for what `score_clip` itself does not refuse."""
    facts, seconds = METRICS[name].facts, len(estimate) / rate
    if seconds < (shortest := facts.get("shortest", 0)):
        raise UndefinedScoreError(f"{seconds:.3g} s is too short: {name} needs {shortest} s")
    if facts.get("speech") and target.square().mean().sqrt() < SPEECH_RMS:
        raise UndefinedScoreError("the target is below -80 dB: no speech to judge")
    if facts.get("unit") == "dB" and torch.equal(estimate, target):
        raise UndefinedScoreError("the estimate is the target itself, so the ratio is infinite")


@functools.cache
def _distillmos_model() -> Any:
    """Load the model once per process; stdout is redirected, as the package prints to it."""
    from distillmos import ConvTransformerSQAModel

    with contextlib.redirect_stdout(io.StringIO()):
        return ConvTransformerSQAModel().eval()
