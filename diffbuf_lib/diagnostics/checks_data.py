"""The doctor's look at a dataset: can its files be read, do they fit the config, is it speech.

`audit` measures a sample of the files themselves, not of the crops that training draws from them;
`check_data` judges what it found.
"""

from __future__ import annotations

import filecmp
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import EXTENSIONS, AudioInfo, read_audio, read_info
from diffbuf_lib.data.datasets import ClipDataset, MixingDataset
from diffbuf_lib.data.mixing import SILENCE_PEAK
from diffbuf_lib.diagnostics.findings import Finding, from_error, judge
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import DataError

_FULL_SCALE = 0.999  # samples from here on count as clipped
_LONGEST = 30  # seconds of a file that are read
_HEAD = 4096  # bytes of a file that are compared before the whole of it is
_NAMED = 3  # clips that a message names before it only counts
_PADDING = 0.1  # share of a chunk
_SNR = (-40.0, 30.0)  # dB
_LEVEL = (0.2, 5.0)  # RMS of |S| over sigma's maximum; speech of peak 1 has about 0.6
_GOOD_LEVEL = 0.5


class WaveFacts(NamedTuple):
    """Numbers of one signal, full scale 1; peak, rms and dc are of the finite samples."""

    peak: float  # largest magnitude
    rms: float  # root mean square
    dc: float  # mean, of the channel where it is largest in magnitude
    clipped: float  # share of samples at full scale or above, 0 to 1
    nonfinite: int  # samples that are NaN or Inf

    @property
    def offset(self) -> float:
        """Magnitude of dc over the RMS; 0 of silence."""
        return 0.0 if self.silent else abs(self.dc) / self.rms

    @property
    def silent(self) -> bool:
        """Whether no sample stands out of 16-bit rounding."""
        return self.peak < SILENCE_PEAK


class ClipFacts(NamedTuple):
    """What one item of a dataset is; powers in dB, None where they cannot be told."""

    name: str  # files of the item
    infos: tuple[AudioInfo, ...]  # headers of its files
    mix: WaveFacts
    target: WaveFacts
    snr_db: float | None  # target over mix - target
    residual_db: float | None  # mix - target - noise over target, where there is a noise.wav
    wave: Tensor  # [C, T] float32, the target as training would read it


class BrokenClip(NamedTuple):
    """An item that cannot be read, and why."""

    name: str
    error: DataError


@dataclass(frozen=True)
class Audit:
    """A sample of a dataset of `size` clips."""

    size: int
    readable: list[ClipFacts] = field(default_factory=list)
    broken: list[BrokenClip] = field(default_factory=list)

    @property
    def clips(self) -> list[ClipFacts | BrokenClip]:
        """All that was looked at."""
        return [*self.readable, *self.broken]


def audit(dataset: Any, limit: int = 64, seconds: float = 2.0) -> Audit:
    """Measure clips spread evenly over a dataset.

    Args:
        dataset: `[i] -> (mix, target)`, each [C, T] float32; of a `ClipDataset` the files are read.
        limit: clips to look at, at most.
        seconds: wall time after which no further clip is begun.
    """
    facts, deadline = Audit(len(dataset)), time.monotonic() + seconds
    count = min(facts.size, limit)
    # Every eighth comes first, so that a sample cut short still spans the set.
    for i in (i for start in range(8) for i in range(start, count, 8)):
        if facts.clips and time.monotonic() > deadline:
            break
        found = _look(dataset, i * facts.size // count)
        if isinstance(found, BrokenClip):
            facts.broken.append(found)
        else:
            facts.readable.append(found)
    return facts


def shared_targets(first: Any, second: Any, seconds: float = 2.0) -> list[tuple[str, str]]:
    """Return the pairs of clips, one of each set, whose target files hold the same bytes.

    Args:
        first: a `ClipDataset`, such as the training set; of any other kind nothing is known.
        second: another.
        seconds: wall time after which the rest is left out.
    """
    heads: dict[Any, list[Path]] = defaultdict(list)
    for path in _target_files(second):
        heads[_head(path)].append(path)
    pairs: list[tuple[str, str]] = []
    deadline = time.monotonic() + seconds
    for path in _target_files(first):
        for other in heads.get(_head(path), ()):
            if time.monotonic() > deadline:
                return pairs
            if filecmp.cmp(path, other, shallow=False):
                pairs.append((str(path), str(other)))
    return pairs


def measure(wave: Tensor) -> WaveFacts:
    """Measure a signal [C, T], full scale 1."""
    finite = wave.isfinite()
    clean = wave.where(finite, torch.zeros_like(wave)).double()
    return WaveFacts(
        peak=float(clean.abs().max()),
        rms=float(clean.square().mean().sqrt()),
        dc=max(clean.mean(dim=-1).tolist(), key=abs),
        clipped=float((clean.abs() >= _FULL_SCALE).double().mean()),
        nonfinite=int((~finite).sum()),
    )


def check_data(cfg: Config, dataset: Any, valid_set: Any = None) -> Iterator[Finding]:
    """Look at a sample of the training and of the validation clips."""
    facts = audit(dataset)
    if not facts.size:
        yield judge("data.size", 0, 1, error=True)
        return
    yield from _check_set(cfg, facts, "data")
    if facts.size < cfg.training.batch_size:
        yield judge("data.batches", facts.size, cfg.training.batch_size, warning=True)
    yield from _check_levels(cfg, facts.readable, isinstance(dataset, MixingDataset))
    if valid_set is None:
        return
    if not len(valid_set):
        yield judge("valid.size", 0, 1, warning=True)
        return
    yield from _check_set(cfg, audit(valid_set, limit=24, seconds=1.0), "valid")
    pairs = shared_targets(dataset, valid_set)
    both = len({other for _, other in pairs})
    names = f": {pairs[0][1]} = {pairs[0][0]}" if pairs else ""
    yield judge("valid.duplicates", both, 0, warning=both > 0, count=len(valid_set), names=names)


def _check_set(cfg: Config, facts: Audit, split: str) -> Iterator[Finding]:
    """Judge one set; `split` is "data" or "valid", the first part of the findings' names."""
    kinds: dict[str, list[BrokenClip]] = defaultdict(list)
    for broken in facts.broken:
        kinds[str(broken.error).rpartition(": ")[2]].append(broken)
    for same in kinds.values():  # of each kind the first clip is quoted
        why = "training stops when it comes to this clip"
        finding = from_error(same[0].error, f"{split}.files", why)
        more = f" (and {len(same) - 1} more of {len(facts.clips)})" if len(same) > 1 else ""
        names = [clip.name for clip in same]
        yield replace(finding, message=finding.message + more, value=names)
    clips = facts.readable
    if not clips:
        return
    shapes = " and ".join(sorted({str(list(clip.wave.shape)) for clip in clips}))
    yield judge(f"{split}.shape", shapes, seen=len(facts.clips), size=facts.size)
    yield from _check_format(cfg, clips, split)
    for rule in _RULES:
        numbers = [(clip, number) for clip in clips if (number := rule.number(clip)) is not None]
        if not numbers:
            continue
        bad = [clip for clip, number in numbers if number > rule.limit]
        yield judge(
            f"{split}.{rule.name}",
            max(number for _, number in numbers),
            rule.limit,
            error=bool(bad) and len(bad) >= rule.error_from * len(numbers),
            warning=bool(bad),
            bad=len(bad),
            count=len(numbers),
            names=_names(bad),
        )


class _Rule(NamedTuple):
    """A number of a clip and its limit; `error_from` this share of clips on it is an error."""

    name: str
    number: Callable[[ClipFacts], float | None]  # None where the rule does not apply
    limit: float
    error_from: float


_RULES = (
    _Rule("silence", lambda clip: float(clip.target.silent), 0, 0.5),
    _Rule("nonfinite", lambda clip: max(clip.mix.nonfinite, clip.target.nonfinite), 0, 0),
    _Rule("clipping", lambda clip: max(clip.mix.clipped, clip.target.clipped), 1e-3, math.inf),
    _Rule("dc", lambda clip: max(clip.mix.offset, clip.target.offset), 0.1, math.inf),
    # 16-bit rounding of three files stays far below -20 dB
    _Rule("mixture", lambda c: None if c.target.silent else c.residual_db, -20.0, 0.5),
    _Rule("noise", lambda clip: clip.snr_db, 100.0, 0.5),
)


def _check_format(cfg: Config, clips: Sequence[ClipFacts], split: str) -> Iterator[Finding]:
    """Judge channels, sample rate, and how much of the clips is zeros after short files."""
    counts = Counter(clip.wave.shape[0] for clip in clips)
    if len(counts) > 1 and cfg.training.batch_size > 1:
        found = " and ".join(f"{n} of {count}" for count, n in sorted(counts.items()))
        odd = [clip for clip in clips if clip.wave.shape[0] == min(counts, key=counts.__getitem__)]
        yield judge(
            f"{split}.channels", dict(counts), 1, error=True, found=found, names=_names(odd)
        )
    elif max(counts) > 1:
        yield judge(f"{split}.channels/many", max(counts), info=True)
    rate, chunk = cfg.audio.sample_rate, cfg.audio.chunk_size
    if {info.sample_rate for clip in clips for info in clip.infos} == {rate}:
        yield judge(f"{split}.sample_rate", rate, rate)
    lengths = [clip.infos[0].frames for clip in clips if clip.infos]
    if lengths:
        padding = fmean(max(0, chunk - length) / chunk for length in lengths)
        yield judge(
            f"{split}.padding",
            padding,
            _PADDING,
            warning=padding > _PADDING,
            shortest=min(lengths),
            longest=max(lengths),
            middle=int(median(lengths)),
            chunk=chunk,
        )


def _check_levels(cfg: Config, clips: Sequence[ClipFacts], mixing: bool) -> Iterator[Finding]:
    """Judge the training set's SNR, and its spectrum beside the noise that diffusion adds to it.

    DN-LM attenuates speech by 1 / distance and then scales the mixture to full scale, so that |S|
    can lie far below sigma: what the score has to tell apart is then mostly the model's own noise.
    """
    snrs = [c.snr_db for c in clips if c.snr_db is not None and abs(c.snr_db) < 200]
    if snrs:
        value = {"min": min(snrs), "median": median(snrs), "max": max(snrs)}
        unusual = not _SNR[0] <= value["median"] <= _SNR[1]
        yield judge("data.snr/mixing" if mixing else "data.snr", value, _SNR, warning=unusual)
    compression, buffer = cfg.preprocessing.magnitude_compression, cfg.diffusion_buffer
    waves = [clip.wave.mean(dim=0) for clip in clips if not clip.target.silent]
    waves = [w for w in waves if w.shape == waves[0].shape and w.isfinite().all() and w.any()]
    times = torch.linspace(buffer.t_eps, buffer.t_max, 200, dtype=torch.float64)
    sigma = float(make_sde(cfg.sde).std(times).max())
    if not waves or not sigma:
        return
    power = Spectral.from_config(cfg.audio.stft, compression)(torch.stack(waves)).abs().square()
    power = power.mean(dim=1)  # [N, K]
    sounding = (power > 0).sum(dim=1).clamp_min(1)  # [N]: frames of zero padding do not count
    level = median((power.sum(dim=1) / sounding).sqrt().tolist())
    ratio = level / sigma
    yield judge(
        "data.level",
        ratio,
        _LEVEL,
        warning=not _LEVEL[0] <= ratio < _LEVEL[1],
        level=level,
        sigma=sigma,
        beta=float(f"{compression.beta * _GOOD_LEVEL / ratio:.2g}"),
    )


def _names(clips: Sequence[ClipFacts]) -> str:
    """Return a colon and the names of the first clips, and count the others."""
    named = ", ".join(clip.name for clip in clips[:_NAMED])
    more = f" and {len(clips) - _NAMED} more" if len(clips) > _NAMED else ""
    return f": {named}{more}" if clips else ""


def _look(dataset: Any, index: int) -> ClipFacts | BrokenClip:
    """Read and measure one item."""
    name = dataset.name(index) if hasattr(dataset, "name") else f"clip {index}"
    try:
        files: Sequence[Path] = dataset.items[index] if isinstance(dataset, ClipDataset) else ()
        infos = tuple(read_info(path) for path in files)
        mix, wave = dataset[index]  # finds what does not match within the pair
        target = wave
        if len(files) == 2:
            mix, target = (_whole(info) for info in infos)
            length = min(mix.shape[-1], target.shape[-1])  # data.pair_tolerance
            mix, target = mix[..., :length], target[..., :length]
        noise = _noise(files, infos)
    except DataError as error:
        return BrokenClip(name, error)
    except Exception as error:
        reason = " ".join(str(error).split())
        return BrokenClip(name, DataError(f"{name}: {type(error).__name__}: {reason}"))
    same = mix.shape == target.shape
    residual = None
    if noise is not None and same and noise.shape == mix.shape:
        residual = _ratio_db(mix - target - noise, target)
    snr = _ratio_db(target, mix - target) if same else None
    return ClipFacts(name, infos, measure(mix), measure(target), snr, residual, wave)


def _whole(info: AudioInfo) -> Tensor:
    """Read a file, or of a very long one the beginning."""
    return read_audio(info.path, 0, min(info.frames, _LONGEST * info.sample_rate))[0]


def _noise(files: Sequence[Path], infos: Sequence[AudioInfo]) -> Tensor | None:
    """Return what lies beside a DN-LM mixture as noise.wav (or .flac), if it does."""
    if len(files) == 2 and files[0].stem == "mixture":
        for path in (files[0].with_name(f"noise{extension}") for extension in EXTENSIONS):
            if path.is_file():
                info = read_info(path)
                return _whole(info) if info.frames == infos[0].frames else None
    return None


def _ratio_db(wave: Tensor, other: Tensor) -> float:
    """Return 10 log10 of the power of one wave over that of another; inf over silence."""
    power, divisor = (float(w.double().square().mean()) for w in (wave, other))
    if power <= 0:
        return -math.inf
    return math.inf if divisor <= 0 else 10 * (math.log10(power) - math.log10(divisor))


def _target_files(dataset: Any) -> list[Path]:
    """Return the target (or speech) file of every item."""
    return [files[-1] for files in dataset.items] if isinstance(dataset, ClipDataset) else []


def _head(path: Path) -> tuple[int, bytes]:
    """Return size and some bytes from the middle of a file, where speech is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size // 2 - _HEAD // 2))
            return size, file.read(_HEAD)
    except OSError:
        return -1, bytes(path)  # like no other file
