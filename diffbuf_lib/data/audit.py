"""What is in a dataset: a sample of its clips measured, and whether two sets share clips.

`audit` reads the files themselves (not the crops that training draws from them) and returns facts;
what they mean is the doctor's matter (`diffbuf_lib.diagnostics`).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.data.audio import EXTENSIONS, AudioInfo, read_audio, read_info
from diffbuf_lib.data.datasets import ClipDataset
from diffbuf_lib.data.mixing import SILENCE_PEAK
from diffbuf_lib.errors import DataError

FULL_SCALE = 0.999  # samples from here on count as clipped
_LONGEST = 30  # seconds of a file that are read
_HEAD = 4096  # bytes of a file that are compared before the whole of it is


@dataclass(frozen=True)
class WaveFacts:
    """Numbers of one signal, full scale 1.

    Attributes:
        peak: largest magnitude of the finite samples.
        rms: root mean square of the finite samples.
        dc: their mean, of the channel where it is largest in magnitude.
        clipped: share of samples at full scale or above, 0 to 1.
        nonfinite: samples that are NaN or Inf.
    """

    peak: float
    rms: float
    dc: float
    clipped: float
    nonfinite: int

    @property
    def silent(self) -> bool:
        """Whether no sample stands out of 16-bit rounding."""
        return self.peak < SILENCE_PEAK


@dataclass(frozen=True)
class ClipFacts:
    """What one item of a dataset is; of an item that cannot be read, `error` says why.

    Attributes:
        name: files of the item.
        infos: headers of its files, as far as they could be read.
        mix: of the noisy signal.
        target: of the clean signal.
        snr_db: 10 log10 of the target's power over that of mix - target; inf if they are equal.
        residual_db: power of mix - target - noise over that of the target, dB; None without a
            noise.wav.
        wave: [C, T] float32, the target as training would read it.
        error: why the item cannot be used.
    """

    name: str
    infos: tuple[AudioInfo, ...] = ()
    mix: WaveFacts | None = None
    target: WaveFacts | None = None
    snr_db: float | None = None
    residual_db: float | None = None
    wave: Tensor | None = None
    error: DataError | None = None


@dataclass(frozen=True)
class Audit:
    """A sample of a dataset.

    Attributes:
        size: clips of the whole set.
        clips: what was looked at.
    """

    size: int
    clips: list[ClipFacts] = field(default_factory=list)

    @property
    def readable(self) -> list[ClipFacts]:
        """The clips that could be read."""
        return [clip for clip in self.clips if clip.error is None]

    @property
    def broken(self) -> list[ClipFacts]:
        """The clips that could not."""
        return [clip for clip in self.clips if clip.error is not None]


def audit(dataset: Any, limit: int = 64, seconds: float = 2.0) -> Audit:
    """Measure clips spread evenly over a dataset.

    Args:
        dataset: `[i] -> (mix, target)`, each [C, T] float32; of a `ClipDataset` the files are read.
        limit: clips to look at, at most.
        seconds: wall time after which no further clip is begun.

    Returns:
        The facts; of a set that cannot even be counted, none.
    """
    size = len(dataset)
    count = min(size, limit)
    indices = [i * size // count for i in range(count)]
    deadline = time.monotonic() + seconds
    clips: list[ClipFacts] = []
    for index in _spread(indices):
        if clips and time.monotonic() > deadline:
            break
        clips.append(_look(dataset, index))
    return Audit(size, clips)


def shared_targets(first: Any, second: Any, seconds: float = 1.0) -> list[tuple[str, str]]:
    """Return the pairs of clips, one of each set, whose target files hold the same bytes.

    Sizes and first bytes are compared first, so that few files are read as a whole.

    Args:
        first: a `ClipDataset`, such as the training set; of any other kind nothing is known.
        second: another.
        seconds: wall time for each of the two steps after which the rest is left out.
    """
    ours, theirs = _target_files(first), _target_files(second)
    deadline = time.monotonic() + seconds
    heads: dict[Any, list[Path]] = {}
    for path in theirs:
        heads.setdefault(_head(path), []).append(path)
    candidates = []
    for path in ours:
        if time.monotonic() > deadline:
            break
        candidates += [(path, other) for other in heads.get(_head(path), ())]
    hashes: dict[Path, str] = {}
    deadline = time.monotonic() + seconds
    pairs = []
    for one, other in candidates:
        if time.monotonic() > deadline:
            break
        for path in (one, other):
            hashes.setdefault(path, hashlib.sha256(path.read_bytes()).hexdigest())
        if hashes[one] == hashes[other]:
            pairs.append((str(one), str(other)))
    return pairs


def measure(wave: Tensor) -> WaveFacts:
    """Measure a signal [C, T], full scale 1."""
    finite = wave.isfinite()
    bad = int(wave.numel() - finite.sum())
    clean = wave.where(finite, torch.zeros_like(wave)).double()
    size = clean.abs()
    return WaveFacts(
        peak=float(size.max()),
        rms=float(clean.square().mean().sqrt()),
        dc=max(clean.mean(dim=-1).tolist(), key=abs),
        clipped=float((size >= FULL_SCALE).double().mean()),
        nonfinite=bad,
    )


def _look(dataset: Any, index: int) -> ClipFacts:
    """Read and measure one item."""
    name = dataset.name(index) if hasattr(dataset, "name") else f"clip {index}"
    infos: tuple[AudioInfo, ...] = ()
    try:
        files: Sequence[Path] = dataset.items[index] if isinstance(dataset, ClipDataset) else ()
        infos = tuple(read_info(path) for path in files)
        cropped_mix, wave = dataset[index]  # finds what does not match within the pair
        if len(files) == 2:
            mix, target = (_whole(info) for info in infos)
            length = min(mix.shape[-1], target.shape[-1])  # data.pair_tolerance
            mix, target = mix[..., :length], target[..., :length]
        else:
            mix, target = cropped_mix, wave
        noise = _noise(files, infos)
    except DataError as error:
        return ClipFacts(name, infos, error=error)
    except Exception as error:
        reason = " ".join(str(error).split())
        return ClipFacts(name, infos, error=DataError(f"{name}: {type(error).__name__}: {reason}"))
    residual = None
    if noise is not None and noise.shape == mix.shape == target.shape:
        residual = _ratio_db(mix - target - noise, target)
    return ClipFacts(
        name,
        infos,
        mix=measure(mix),
        target=measure(target),
        snr_db=_ratio_db(target, mix - target) if mix.shape == target.shape else None,
        residual_db=residual,
        wave=wave,
    )


def _whole(info: AudioInfo) -> Tensor:
    """Read a file, or of a very long one the beginning."""
    return read_audio(info.path, 0, min(info.frames, _LONGEST * info.sample_rate))[0]


def _noise(files: Sequence[Path], infos: Sequence[AudioInfo]) -> Tensor | None:
    """Return what lies beside a DN-LM mixture as noise.wav (or .flac), if it does."""
    if len(files) != 2 or files[0].stem != "mixture":
        return None
    for extension in EXTENSIONS:
        path = files[0].with_name(f"noise{extension}")
        if path.is_file():
            info = read_info(path)
            return _whole(info) if info.frames == infos[0].frames else None
    return None


def _ratio_db(wave: Tensor, other: Tensor) -> float:
    """Return 10 log10 of the power of one wave over that of another; inf over silence."""
    powers = [float(w.double().square().mean()) for w in (wave, other)]
    if powers[0] <= 0:
        return -math.inf
    return math.inf if powers[1] <= 0 else 10 * (math.log10(powers[0]) - math.log10(powers[1]))


def _spread(indices: list[int]) -> list[int]:
    """Put every eighth index first, so that a sample cut short still spans the set."""
    return [index for start in range(8) for index in indices[start::8]]


def _target_files(dataset: Any) -> list[Path]:
    """Return the target (or speech) file of every item."""
    return [files[-1] for files in dataset.items] if isinstance(dataset, ClipDataset) else []


def _head(path: Path) -> tuple[int, bytes] | None:
    """Return size and some bytes from the middle of a file, where speech is; None if unreadable."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size // 2 - _HEAD // 2))
            return size, file.read(_HEAD)
    except OSError:
        return None
