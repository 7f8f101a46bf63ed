"""Options of a dataset build and of an evaluation, in Python and on the command line.

Imports no torch: the fields are also flags, and their comments are the flags' help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first must not be above the second")
    return pair


def _sorted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names))


_SNR = Annotated[float, Field(ge=-100, le=100)]
_METRES = Annotated[float, Field(ge=0.01, le=10000)]
_SECONDS = Annotated[float, Field(ge=0.01, le=3600)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a DN-LM set is made."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    train: Annotated[int, Field(ge=1)] = 6480  # training clips
    valid: Annotated[int, Field(ge=0)] = 720  # validation clips
    test: Annotated[int, Field(ge=0)] = 0  # test clips, of valid's speakers and noise
    seconds: _SECONDS = 1.0  # length of a clip; shorter speech is padded
    test_seconds: _SECONDS = 6.0  # length of a test clip
    sample_rate: Annotated[int, Field(ge=1000)] = 16000  # Hz; other sources are resampled
    #: lowest and highest input SNR, dB
    snr: Annotated[tuple[_SNR, _SNR], AfterValidator(_rising)] = (-30.0, 0.0)
    #: nearest and farthest speaker, m
    distance: Annotated[tuple[_METRES, _METRES], AfterValidator(_rising)] = (5.0, 20.0)
    #: speakers (or files) of valid and test; default: drawn
    valid_speakers: Annotated[tuple[str, ...], AfterValidator(_sorted)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0  # of all random draws


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which clips are scored, and how."""

    data_path: str  # dataset folder, or shards
    dataset_type: int = 1  # as in train
    seconds: float | None = None  # cut clips to this length; default: whole clips
    limit: int | None = None  # score only the first N clips
    seed: int = 0  # of the diffusion noise
    batch_size: int = 8  # clips enhanced at a time
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True, kw_only=True)
class Job(Scoring):
    """What to evaluate: everything that another process needs."""

    model: str  # folder of a trained model, a run's folder, or a name such as diffbuf/cpu-demo
    metrics: tuple[str, ...] = ("si_sdr", "sdr", "pesq", "estoi")  # or distillmos dnsmos lps
    #: or noisereduce, noisereduce_nonstationary, deepfilternet, rnnoise, gtcrn
    baselines: tuple[str, ...] = ("noisy",)
    delay: int | None = None  # output delay, 1 to buffer_size frames (data prediction)
    overrides: tuple[str, ...] = ()  # changes to keys of the model's config
